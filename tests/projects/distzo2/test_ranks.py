"""Ranks under torchrun against one process: equal losses, gradients and weights to the last bit,
however work and transfers are divided.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ranks.py")


def _module():
    specification = importlib.util.spec_from_file_location("distzo2_ranks", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


ONE = _module()
CASES = [(world, name) for world, scenarios in ONE.SCENARIOS.items() for name in scenarios]
_launched: dict[int, list[dict]] = {}


def launch(
    world: int, folder: Path, script: Path = SCRIPT, timeout: float = 170
) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        str(script),
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        command,
        env=environment,
        cwd=SCRIPT.parents[3],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distzo2")


@pytest.fixture
def ranks(folder):
    """world size -> what each rank found; one launch a world size."""

    def of(world: int) -> list[dict]:
        if world not in _launched:
            own = folder / str(world)
            own.mkdir()
            done = launch(world, own)
            assert done.returncode == 0, done.stderr[-3000:]
            _launched[world] = [
                json.loads((own / f"{rank}.json").read_text()) for rank in range(world)
            ]
        return _launched[world]

    return of


@pytest.mark.parametrize(("world", "name"), CASES)
def test_every_rank_is_one_process(world, name, ranks):
    *_, sizes, by_rows = ONE.SCENARIOS[world][name]
    found = [one[name] for one in ranks(world)]
    assert all(
        one["steps"] == found[0]["steps"] and one["weights"] == found[0]["weights"] for one in found
    )
    assert len(found[0]["steps"]) == ONE.STEPS >= 20
    wanted = ONE.one_process(name, world)
    # ZO2's own mean takes micro-batches to be alike; all rows in one are the same loss but for its
    # rounding
    if by_rows:
        assert len(set(sizes)) > 1
        whole = ONE.ZO2(ONE.model(), **ONE.options(storage="ram"))
        step = whole.step(ONE.batches(0, [sum(sizes)])[0])
        assert float.fromhex(found[0]["steps"][0][0]) == pytest.approx(step.loss, rel=1e-6)
        assert float.fromhex(found[0]["steps"][0][0]) != pytest.approx(
            float.fromhex(wanted["steps"][0][0]), rel=1e-4
        )
    elif "other order, float64" in name:
        # added in another order, losses in float64 round otherwise
        pairs = [[float.fromhex(value) for value in step] for step in found[0]["steps"]]
        for (loss, g), (wanted_loss, wanted_g) in zip(
            pairs, ([float.fromhex(v) for v in s] for s in wanted["steps"]), strict=True
        ):
            assert loss == pytest.approx(wanted_loss, rel=1e-13)
            assert g == pytest.approx(wanted_g, rel=1e-9, abs=1e-11)
    else:
        assert found[0]["steps"] == wanted["steps"]
        assert found[0]["weights"] == wanted["weights"]


def test_g_is_the_mean_of_the_shards_and_varies_the_less_the_more_there_are(ranks):
    """At one point and in one direction: g on D independent micro-batches has a D-th of the
    variance of g on one.
    """
    shards, alone = 4, ONE.at_rest()
    made = [
        [alone.step(part, seed=7) for part in ONE.batches(step, [2] * shards)]
        for step in range(ONE.DRAWS)
    ]
    each = np.array([[step.projected_gradient for step in steps] for steps in made])
    largest = max(step.loss for steps in made for step in steps)
    for one in ranks(shards):
        found = np.array([float.fromhex(g) for g in one["spread"]])
        # losses are rounded to float32 before their difference is divided by 2 eps, as published
        rounding = np.spacing(np.float32(largest)) / (2 * alone.options.eps)
        np.testing.assert_allclose(found, each.mean(axis=1), rtol=1e-6, atol=2 * rounding)
    assert 0.7 / shards < found.var(ddof=1) / each.var(ddof=1) < 1.4 / shards


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, name in CASES if world > 1])
def test_a_rank_sends_24_bytes_a_micro_batch_and_step(world, name, ranks):
    dp, _, _, _, sizes, _ = ONE.SCENARIOS[world][name]
    for one in ranks(world):
        assert one[name]["sent"] == 24 * ONE.STEPS * -(-len(sizes) // dp)


@pytest.mark.parametrize(
    ("world", "name"), [(w, n) for w, n in CASES if ONE.SCENARIOS[w][n][2] == "sliced"]
)
def test_slices_of_the_ranks_make_up_each_block_once(world, name, ranks):
    """Together the ranks move each block once a visit, to the byte; no rank more than its N-th,
    rounded up to the alignment.
    """
    found = [one[name] for one in ranks(world)]
    codecs = ONE.ZO2(ONE.model(), **ONE.options(storage="ram")).store.codecs
    for lane, visits, writable in (("up", "uploads", False), ("down", "offloads", True)):
        counts = found[0][visits]
        assert min(counts) >= ONE.STEPS
        assert all(one[visits] == counts for one in found)
        whole = [
            sum(f.nbytes for f in codec.stored.fields if f.writable or not writable)
            for codec in codecs
        ]
        assert sum(one[lane] for one in found) == sum(
            n * nbytes for n, nbytes in zip(counts, whole, strict=True)
        )
        slices = [-(-codec.stored.nbytes // world) + 63 for codec in codecs]
        assert all(
            one[lane] <= sum(n * nbytes for n, nbytes in zip(counts, slices, strict=True))
            for one in found
        )
    assert all(one["exchanged"] > 0 for one in found)


@pytest.mark.parametrize(("world", "name"), [(2, "PertP"), (2, "DDP, sliced"), (4, "2D, sliced")])
def test_what_is_saved_is_the_weights_of_one_process(world, name, ranks, folder):
    ranks(world)
    saved = load_file(folder / str(world) / f"{name}.out.safetensors".replace(", ", "-"))
    *_, sizes, _ = ONE.SCENARIOS[world][name]
    engine = ONE.ZO2(ONE.model(), **ONE.options(storage="ram"))
    for step in range(ONE.STEPS):
        engine.step(ONE.batches(step, sizes))
    wanted = engine.state_dict()
    assert saved.keys() == wanted.keys()
    assert all(saved[name].equal(wanted[name]) for name in wanted)


REFUSALS = {
    "alone": "must share its forwards out",
    "seed": "seed of rank 1 differs",
    "weights": "weights of rank 1 differs",
    "eps": "eps of rank 1 differs",
    "ram sliced": "need a file that the ranks share",
    "mesh": "needs 4 processes, and there are 3",
    "odd": "needs 2 processes, and there are 3",
    "one file": "need a file each",
    "transfer": "replicated or sliced",
    "one bit": "have parted after step 2: weights of rank 2 differs",
    "NaN on one rank": "as it should be",
    "no batch": "takes micro-batches",
    "weights of nothing": "some above 0",
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_all_ranks_are_told_in_one_line(fault, ranks):
    for one in ranks(3):
        assert REFUSALS[fault] in one["refusals"][fault]
        assert "\n" not in one["refusals"][fault]
    assert ranks(3)[0]["refusals"].keys() == REFUSALS.keys()


DYING = """
import os, signal, sys, time
import torch
sys.path.insert(0, {root!r})
from projects.distzo2 import DistZO2, Ranks, device_mesh, distributed
from projects.zo2 import ZO2
import importlib.util
s = importlib.util.spec_from_file_location("r", {script!r})
r = importlib.util.module_from_spec(s)
s.loader.exec_module(r)
with distributed(timeout_seconds=20):
    import torch.distributed as dist
    engine = ZO2(r.model(), forwards=Ranks(device_mesh(2)), **r.options(storage="ram"))
    ddp = DistZO2(engine, check_every=0)
    for step in range(6):
        if step == 3 and dist.get_rank() == 1:
            {fault}
        ddp.step(r.batches(step, [2, 2]))
    print("went on", flush=True)
"""


@pytest.mark.parametrize(
    "fault", ["os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('a rank raises')"]
)
def test_the_others_end_when_a_rank_dies(fault, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(SCRIPT.parents[3]), script=str(SCRIPT), fault=fault))
    done = launch(2, tmp_path, script, timeout=60)
    assert done.returncode != 0
    assert "went on" not in done.stdout
