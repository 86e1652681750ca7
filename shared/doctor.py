"""`repro doctor`: whether this machine and this environment can run the experiments, one line per
fact.
"""

import shutil
import sys
from importlib import metadata

import psutil

from shared import paths
from shared.errors import UserError


def check() -> int:
    """Print what is there. Returns 1 when something must be mended, with what to do on its line."""
    problems = 0
    for fine, what, value in (_system(), _python(), *_pins(), *_torch(), *_machine(), *_cache()):
        problems += not fine
        print(f"{'ok ' if fine else '!! '} {what:<12} {value}")
    return 1 if problems else 0


def _system() -> tuple[bool, str, str]:
    return sys.platform == "linux", "system", f"{sys.platform} (needed: linux)"


def _python() -> tuple[bool, str, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    return (3, 11) <= sys.version_info < (3, 13), "python", f"{version} (needed: 3.11 or 3.12)"


def _pins() -> list[tuple[bool, str, str]]:
    """Installed versions against constraints.txt. A difference is told, and is no fault:
    pyproject.toml says what is allowed.
    """
    file = paths.ROOT / "constraints.txt"
    if not file.is_file():
        return [(True, "packages", "no constraints.txt to compare with")]
    other, absent = [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.split("#")[0].split(";")[0].strip().partition("==")
        if not pinned:
            continue
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if installed.split("+")[0] != version.split("+")[0]:
            other.append(f"{name} {installed} (pinned {version})")
    said = "as pinned" if not other else "differ from constraints.txt: " + ", ".join(other)
    return [(True, "packages", said + (f"; not installed: {', '.join(absent)}" if absent else ""))]


def _torch() -> list[tuple[bool, str, str]]:
    try:
        import torch
    except ImportError as error:
        return [
            (False, "torch", f"{error}; install the project: pip install -e . -c constraints.txt")
        ]
    gpu = f"CUDA, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU"
    facts = [(True, "torch", f"{torch.__version__}, {gpu}, {torch.get_num_threads()} threads")]
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        return [*facts, (False, "torchvision", f"does not import: {error}")]
    from shared import torchvision_cpu

    mended = bool(torchvision_cpu._keep_alive)
    return [
        *facts,
        (
            True,
            "torchvision",
            torchvision.__version__
            + (" (mended: detection operators are not available)" if mended else ""),
        ),
    ]


def _machine() -> list[tuple[bool, str, str]]:
    from shared import manifest

    memory = psutil.virtual_memory()
    entries = [
        manifest.needs(paper, name, "cpu")
        for paper in manifest.manifests()
        for name in manifest.scale_config(paper, "cpu")
    ]
    needed = max((entry.memory_gb for entry in entries), default=1)
    disk = shutil.disk_usage(paths.ROOT)
    return [
        (
            memory.total >= 0.94e9 * needed,  # firmware keeps some of what was bought
            "memory",
            (
                f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free ({needed:g} GB"
                " in all are needed)"
            ),
        ),
        (disk.free >= 5e9, "disk", f"{disk.free / 1e9:.1f} GB free here (5 GB are needed)"),
        (True, "cores", f"{psutil.cpu_count()}"),
    ]


def _cache() -> list[tuple[bool, str, str]]:
    from shared import data, manifest

    try:
        needed = manifest.data_needed(None, "cpu")
        absent = [name for name in needed if not data.stamp(name).exists()]
    except UserError as error:
        return [(False, "data", str(error))]
    said = (
        f"{len(needed) - len(absent)} of the {len(needed)} entries that scale cpu needs are in"
        f" {paths.cache_dir()}"
    )
    return [
        (True, "data", said + (f"; the first run fetches {', '.join(absent)}" if absent else ""))
    ]
