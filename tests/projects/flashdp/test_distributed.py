"""Two processes, each with its part of the batch, are one process with all of it: clipped where
they are, noised once.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks.py")
WORLD = 2


@pytest.fixture(scope="module")
def one():
    """The module that the ranks run, for the process that has all samples."""
    specification = importlib.util.spec_from_file_location("flashdp_ranks", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    commands = [
        [sys.executable, str(SCRIPT), str(rank), str(WORLD), str(folder)] for rank in range(WORLD)
    ]
    started = [
        subprocess.Popen(
            command,
            env=environment,
            cwd=SCRIPT.parents[3],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * WORLD, said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def close(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm()) <= 1e-6 * max(1.0, float(b.norm()))


SCENARIOS = [
    ("uneven", 0.0, 5),
    ("one empty", 0.0, 5),
    ("all empty", 0.0, 5),
    ("uneven", 0.8, 5),
    ("all empty", 0.8, 5),
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_two_ranks_are_one_process(scenario, ranks, one):
    """With noise too: it is the same noise, added once."""
    wanted = one.train(*scenario)
    for found in ranks:
        for step in range(2):
            close(found[repr(scenario)]["gradients"][step], wanted["gradients"][step])
        close(found[repr(scenario)]["weights"], wanted["weights"])
    if scenario[0] != "all empty":
        assert any(float(g.norm()) > 0 for g in wanted["gradients"][0])


@pytest.mark.parametrize("scenario", [*SCENARIOS, ("uneven", 0.8, None)], ids=str)
def test_weights_and_key_agree_to_the_last_bit_though_ranks_began_apart(scenario, ranks):
    first, second = (found[repr(scenario)] for found in ranks)
    assert torch.equal(first["key"], second["key"])
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


def test_a_rank_sends_its_gradients_once_a_step_and_nothing_else(ranks, one):
    count = sum(p.numel() for p in one.model().parameters())
    for found in ranks:
        assert {seen["elements"] for seen in found.values()} == {2 * count}


def test_without_a_seed_the_key_is_drawn_anew(ranks):
    keys = {
        repr(scenario): ranks[0][repr(scenario)]["key"]
        for scenario in (("uneven", 0.8, 5), ("uneven", 0.8, None))
    }
    drawn = keys[repr(("uneven", 0.8, None))]
    assert len(drawn) == 32
    assert len(set(drawn.tolist())) > 16
    assert not torch.equal(*keys.values())
