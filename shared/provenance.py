"""What ran where: enough to judge a number by, nothing that names a person, a host or a folder."""

import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from shared import paths

PACKAGES = (
    "torch", "torchvision", "triton", "transformers", "datasets", "tokenizers", "peft",
    "accelerate", "timm", "networkx", "numpy", "scipy",
    "pandas", "scikit-learn", "safetensors", "gguf", "opacus", "dp-accounting", "matplotlib",
    "pydantic", "snakemake",
)  # fmt: skip


def collect(scale: str) -> dict[str, Any]:
    """The machine and the software, at the start of a run; `finish` completes it."""
    return {
        "scale": scale,
        "commit": _git("rev-parse", "HEAD"),
        # Results are written while experiments run, so they must not make the sources look changed.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":(exclude)results")),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": None,  # known at the end: the one that computed, not the one that is there
        "torch_threads": _torch_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "started_monotonic": time.monotonic(),
        "started_core_seconds": core_seconds(),
        "load_start": round(os.getloadavg()[0], 2),
    }


def finish(started: dict[str, Any]) -> dict[str, Any]:
    """`started` with the duration, the processor time (see `core_seconds`), the load at the end,
    the threads (torch may be loaded only now) and the GPU, if one has computed.
    """
    done = dict(started)
    done["duration_seconds"] = round(time.monotonic() - done.pop("started_monotonic"), 3)
    done["core_seconds"] = round(core_seconds() - done.pop("started_core_seconds"), 3)
    done["load_end"] = round(os.getloadavg()[0], 2)
    done["torch_threads"] = _torch_threads()
    done["gpu"] = _gpu_model()
    return done


def core_seconds() -> float:
    """Processor time of this process and of its children that have ended, of user and kernel, in
    seconds.
    """
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def device(provenance: dict[str, Any]) -> str:
    """The device in words: the GPU's name, else the CPU's with its cores and the threads used."""
    if provenance.get("gpu"):
        return str(provenance["gpu"])
    threads = provenance.get("torch_threads")
    used = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    return f"{provenance.get('cpu') or 'CPU'} ({provenance.get('cores')} cores{used})"


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository, or None without git or outside a clone."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=paths.ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _gpu_model() -> str | None:
    """The GPU that held tensors of this process. One that is only there is not asked: that would
    make a CUDA context on it.
    """
    torch = sys.modules.get("torch")
    used = (
        torch is not None and torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0
    )
    return str(torch.cuda.get_device_name()) if used and torch is not None else None


def _torch_threads() -> int | None:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else None
