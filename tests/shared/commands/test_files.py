"""A file appears whole or not at all, whatever happens while it is written."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from shared import files
from shared.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_written_with_its_folder_and_replaced(tmp_path):
    file = tmp_path / "a" / "b.txt"
    for content in (b"old", b"new"):
        files.atomic_write(file, content)
        assert file.read_bytes() == content
    assert names(file.parent) == ["b.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "b.txt"
    file.write_bytes(b"old")

    def work() -> None:
        with files.replacing(file) as temporary:
            temporary.write_bytes(b"half")
            assert file.read_bytes() == b"old"
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        work()
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == ["b.txt"]


KILLED = """
import os, pathlib, signal, sys
from shared import files
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], die)
files.atomic_write(pathlib.Path(sys.argv[1]), b"new")
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file(tmp_path, moment):
    file = tmp_path / "b.txt"
    file.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(file), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert file.read_bytes() == b"old"
    assert [name for name in names(tmp_path) if not name.endswith(".part")] == ["b.txt"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    files.atomic_write(tmp_path / "b.txt", b"x")
    assert [c if c in ("rename", tmp_path) else c.suffix for c in calls] == [
        ".part", "rename", tmp_path,
    ]  # fmt: skip


def test_a_full_disk_is_one_line_and_the_old_file_stays(small_disk):
    file = small_disk / "page.html"
    files.atomic_write(file, b"old")
    with pytest.raises(UserError, match=r"no space left to write .*page\.html") as caught:
        files.atomic_write(file, b"x" * 1_000_000)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no space left"):
        files.atomic_save({"x": torch.zeros(1_000_000)}, file)
    assert file.read_bytes() == b"old"
    assert names(small_disk) == ["page.html"]


def test_permissions_are_those_asked_for_less_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.atomic_write(tmp_path / "shared", b"")
        files.atomic_write(tmp_path / "secret", b"", 0o600)
        files.atomic_save({"x": torch.zeros(1)}, tmp_path / "weights")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {"shared": 0o640, "secret": 0o600, "weights": 0o640}


def test_json_is_strict(tmp_path):
    file = tmp_path / "a.json"
    files.atomic_json(file, {"x": [1, None, "ü"]})
    assert files.read_json(file) == json.loads(file.read_text()) == {"x": [1, None, "ü"]}
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.atomic_json(file, {"x": number})
    assert files.read_json(file) == {"x": [1, None, "ü"]}
    assert files.read_json(tmp_path / "none.json") is None
    file.write_text('{"x": ')
    with pytest.raises(UserError, match=r"a\.json is damaged \(.*\); name another --out"):
        files.read_json(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_written_and_the_old_file_stays(tmp_path, dtype, wrong):
    file = tmp_path / "w.safetensors"
    whole = {"a": torch.ones(2).to(dtype), "n": torch.tensor(3)}
    files.atomic_save(whole, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"^the trained model: 'b' holds NaN or infinity") as caught:
        files.atomic_save({**whole, "b": torch.tensor([0.0, wrong]).to(dtype)}, file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before
    assert names(tmp_path) == ["w.safetensors"]


def test_tensors_keep_their_names_bits_and_metadata(tmp_path):
    file = tmp_path / "w.safetensors"
    tensors = {"a.b": torch.randn(3, 4).T, "n": torch.tensor(3)}
    files.atomic_save(tensors, file, {"steps": "7"})
    loaded = load_file(file)
    assert {name: t.tolist() for name, t in loaded.items()} == {
        name: t.tolist() for name, t in tensors.items()
    }
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"steps": "7"}


def test_a_folder_takes_the_place_of_another_when_it_is_whole(tmp_path):
    folder = tmp_path / "data"
    for content in ("old", "new"):
        with files.atomic_folder(folder) as temporary:
            (temporary / f"{content}.txt").write_text(content)
            (temporary / "within").mkdir()
        assert names(folder) == [f"{content}.txt", "within"]

    def work() -> None:
        with files.atomic_folder(folder) as temporary:
            (temporary / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert names(folder) == ["new.txt", "within"]
    assert names(tmp_path) == ["data"]


def test_files_join_a_folder_the_last_one_after_all_others(tmp_path, monkeypatch):
    (tmp_path / "log").write_text("kept")
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    with files.atomic_files(tmp_path, last="b") as temporary:
        for name in "cba":
            (temporary / name).write_text(name)
        assert not (tmp_path / "a").exists()
    assert order == ["a", "c", "b"]
    assert names(tmp_path) == ["a", "b", "c", "log"]

    def work() -> None:
        with files.atomic_files(tmp_path) as temporary:
            (temporary / "d").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert names(tmp_path) == ["a", "b", "c", "log"]


def test_files_of_folders_below_replace_those_there(tmp_path):
    for text in ("old", "new"):
        with files.atomic_files(tmp_path) as temporary:
            (temporary / "below").mkdir()
            (temporary / "below" / "a").write_text(text)
    assert names(tmp_path) == ["below"]
    assert (tmp_path / "below" / "a").read_text() == "new"


def test_sha256_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()
    with pytest.raises(UserError, match="none: No such file"):
        files.sha256(tmp_path / "none")


def test_remove_takes_what_is_there(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    files.remove(*(tmp_path / name for name in ("folder", "file", "link", "none")))
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "file").exists()
