"""Provenance: enough to judge a number by, and nothing that names a person or a host."""

import getpass
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import paths, provenance


def collected():
    return provenance.finish(provenance.collect("cpu"))


def test_what_a_reader_needs_is_there():
    origin = collected()
    assert origin["scale"] == "cpu"
    assert origin["cores"] >= 1
    assert origin["cpu"]
    assert "numpy" in origin["packages"]
    assert origin["duration_seconds"] >= 0
    assert origin["load_start"] >= 0 <= origin["load_end"]
    assert origin["started"].endswith("+00:00")
    assert "started_monotonic" not in origin
    assert "started_core_seconds" not in origin
    json.dumps(origin, allow_nan=False)


def test_nothing_names_a_host_a_user_or_a_folder():
    text = json.dumps(collected())
    for secret in (socket.gethostname(), str(Path.home()), str(paths.ROOT)):
        assert len(secret) < 4 or secret not in text
    assert f'"{getpass.getuser()}"' not in text


def test_processor_time_is_that_of_this_process_and_its_children_and_no_sleep():
    origin = provenance.collect("cpu")
    burn = "import time; e = time.process_time() + 0.3\nwhile time.process_time() < e: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    time.sleep(0.5)
    used = provenance.finish(origin)
    assert 0.3 <= used["core_seconds"] < used["duration_seconds"] - 0.4


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)

    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e@e", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    return tmp_path


def test_a_change_is_seen_and_a_result_is_no_change(clone):
    (clone / "results").mkdir()
    (clone / "results" / "x").write_text("1")
    origin = provenance.collect("cpu")
    assert len(origin["commit"]) == 40
    assert origin["dirty"] is False
    (clone / "file").write_text("2")
    assert provenance.collect("cpu")["dirty"] is True


def test_outside_version_control(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    origin = provenance.collect("cpu")
    assert (origin["commit"], origin["dirty"]) == (None, False)


@pytest.mark.parametrize(
    ("initialised", "allocated", "named"),
    [(False, 5, None), (True, 0, None), (True, 5, "H200")],
    ids=["no context", "unused", "used"],
)
def test_a_gpu_is_named_when_it_computed_and_is_left_alone_when_not(
    monkeypatch, initialised, allocated, named
):
    import torch

    def touched(*_):
        assert initialised, "this makes a CUDA context"
        return allocated

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", touched)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: touched() and "H200")
    started = provenance.collect("cpu")
    assert started["gpu"] is None
    assert provenance.finish(started)["gpu"] == named


def test_the_device_in_words():
    assert provenance.device({"gpu": "H200", "cpu": "x"}) == "H200"
    assert (
        provenance.device({"gpu": None, "cpu": "EPYC", "cores": 2, "torch_threads": 1})
        == "EPYC (2 cores, 1 thread)"
    )
    assert (
        provenance.device({"gpu": None, "cpu": "EPYC", "cores": 2, "torch_threads": None})
        == "EPYC (2 cores)"
    )
