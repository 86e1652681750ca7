"""Where ranks compute; what experiments say when something is missing; real training on ranks where
the data are there.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from projects.distzo2 import meshes
from projects.distzo2.data import Digits, global_batches, noise_seed
from projects.distzo2.experiments import (
    accuracy,
    common,
    largebatch,
    plan,
    throughput,
    training,
)
from projects.distzo2.labels import MODES
from projects.zo2 import MeZO
from projects.zo2.data import Classification
from projects.zo2.digests import unordered_digest
from shared import manifest
from shared.data import path
from shared.errors import UserError
from shared.experiment import Config, Run, load


def configured(name: str, scale: str = "cpu", **values: object) -> Config:
    """The configuration of an experiment at a scale, with some values in place of the scale's."""
    return load("distzo2", name, scale, values)[1]


@pytest.mark.parametrize(
    ("gpus", "rank", "wanted"),
    [
        (4, 3, "cuda:3"),
        (1, 0, "cuda:0"),
        (1, 1, "cuda:0"),
        (2, 3, "cuda:1"),
    ],
)
def test_each_rank_has_its_gpu_and_shares_one_where_there_are_too_few(
    gpus, rank, wanted, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert str(meshes.place("cuda")) == wanted
    assert meshes.place("cpu") == torch.device("cpu")


def test_a_gpu_that_is_wanted_and_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="there is no GPU here"):
        meshes.place("cuda")
    for scale in ("gpu", "paper"):
        for name in manifest.scale_config("distzo2", scale):
            module, config = load("distzo2", name, scale)
            if getattr(config, "device", "cpu") == "cuda":
                assert manifest.needs("distzo2", name, scale).gpu
                with pytest.raises(
                    UserError, match=f"distzo2/{name} wants [0-9]+ GPUs? and here are 0"
                ):
                    module.run(config, Run(quiet=True))


def test_what_is_timed_wants_a_gpu_a_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    common.check_device("equality", "cuda", 2)
    with pytest.raises(UserError, match="distzo2/throughput wants 2 GPUs and here are 1"):
        common.check_device("throughput", "cuda", 2)
    timed = {name for name, one in manifest.manifest("distzo2").experiments.items() if one.timed}
    assert set(common.TIMED) == timed


def test_the_scales_have_what_the_claims_need():
    paper = manifest.scale_config("distzo2", "paper")
    assert paper["throughput"]["model"] == "opt-175b"
    assert paper["accuracy"]["model"] == "facebook/opt-13b"
    assert manifest.scale_config("distzo2", "gpu")["throughput"]["model"] == "opt-1.3b"
    for scale in ("gpu", "paper"):
        for name, entry in manifest.scale_config("distzo2", scale).items():
            assert set(entry.get("modes", [])) <= set(MODES), name
    with pytest.raises(UserError, match="opt-3b"):
        configured("throughput", model="opt-3b")


def test_throughput_rows_name_the_model():
    run = Run(quiet=True)
    throughput.run(configured("throughput", "smoke", modes=["DDP"]), run)
    assert {row["model"] for row in run.rows} == {"llama 2 x 32"}
    assert {row["mode"] for row in run.rows} == {"one process, 1 thread", "DDP"}


def test_a_model_that_is_missing_is_one_line():
    config = {"task": "sst2", "model": "facebook/opt-13b", "test_rows": 4, "steps": 20}
    for name, module in (("accuracy", accuracy), ("largebatch", largebatch)):
        with pytest.raises(UserError, match="not in the hub cache"):
            module.run(configured(name, **config), Run(quiet=True))


def test_plans_cover_the_sizes_and_say_what_bounds_them():
    run = Run(quiet=True)
    plan.run(configured("plan", "smoke", counts=[2, 4]), run)
    rows = {
        tuple(row[k] for k in ("model", "gpus", "mode", "links", "transfer", "same_batch")): row
        for row in run.rows
    }
    assert len(rows) == len(run.rows) == 2 * 2 * 2 * 2 * 2 * 2
    weak = rows["opt-175b", 4, "DDP", "own", "sliced", "a GPU"]
    assert weak["speedup_ratio"] == pytest.approx(4)  # each GPU does what the one did
    shared = rows["opt-175b", 4, "DDP", "shared", "replicated", "in all"]
    assert shared["busiest"] == "link to the host"
    assert (
        shared["speedup_ratio"]
        < rows["opt-175b", 4, "DDP", "shared", "sliced", "in all"]["speedup_ratio"]
    )
    assert weak["host_bytes"] == pytest.approx(shared["host_bytes"] / 4)
    for row in run.rows:
        assert row["speedup_ratio"] <= row["gpus"] * (1 + 1e-9)
        parts = [row[f"{lane}_share"] for lane in ("compute", "upload", "exchange", "offload")]
        assert math.isclose(sum(parts), 1)


def test_a_rank_that_fails_ends_the_others_and_is_one_line():
    with pytest.raises(UserError, match=r"^distzo2/lanes on 2 ranks failed: KeyError: 'modes'$"):
        common.launch("lanes", 2, {"device": "cpu", "link_megabytes_per_second": 1})


def test_a_cost_run_needs_enough_sizes():
    with pytest.raises(UserError, match="cases"):
        configured("cost", cases=[])


# ---- training ------------------------------------------------------------------------------------


class Parity(Classification):
    """Whether a number is odd, told from its bits by a small network; made up, so that no data are
    needed.
    """

    def __init__(self):
        numbers = [[float(bit) for bit in f"{n:06b}"] for n in range(64)]
        odd = np.arange(64) % 2
        super().__init__((numbers[:48], odd[:48]), (numbers[48:], odd[48:]))

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 17), nn.Tanh(), nn.Linear(17, 2)
            )

    def encode(self, texts):
        return {"bits": torch.tensor(texts)}

    def logits(self, model, inputs):
        return model(inputs["bits"])


def test_a_global_batch_is_its_micro_batches_in_order():
    task = Parity()
    parts = global_batches(task, {"shares": 3, "steps": 6, "seed": 1}, 12)
    assert [[len(part["labels"]) for part in step] for step in parts] == [[4] * 3] * 6
    # the rows of a step are the same however it is cut
    for step, batch in zip(parts, task.train_batches(6, 12, 1), strict=True):
        assert torch.cat([part["inputs"]["bits"] for part in step]).equal(batch["inputs"]["bits"])


def test_a_rank_trains_as_mezo_does(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "make_task", lambda config: Parity())
    values = {
        "shares": 2,
        "steps": 8,
        "seed": 3,
        "lr": 1e-2,
        "eps": 1e-3,
        "device": "cpu",
        "test_rows": 16,
    }
    with meshes.distributed():
        (found,) = training.on_rank({**values, "modes": ["ZO2"], "batch_sizes": [8]}, tmp_path)
    task = Parity()
    model = task.model()
    mezo = MeZO(model, lr=1e-2, eps=1e-3, loss=task.loss)
    losses = [
        mezo.step(batch, noise_seed(3, number))[0]
        for number, batch in enumerate(global_batches(task, values, 8))
    ]
    assert found["losses"] == losses
    assert found["scores"] == task.evaluate(model, 16)
    assert found["weights"] == unordered_digest(model.named_parameters())


# ---- real data -----------------------------------------------------------------------------------


def _fetched(*names: str) -> bool:
    try:
        return all(path(name) for name in names)
    except UserError:
        return False


@pytest.mark.data
@pytest.mark.skipif(not _fetched("digits"), reason="digits are not fetched")
def test_ranks_train_on_digits_and_learn():
    task = Digits()
    sizes = [len(labels) for _, labels in task.splits.values()]
    assert sizes == [1437, 360]
    assert not {text.tobytes() for text in task.splits["train"][0]} & {
        text.tobytes() for text in task.splits["test"][0]
    }
    run = Run(quiet=True)
    largebatch.run(
        configured("largebatch", batch_sizes=[16, 64], steps=120, test_rows=60, lr=5e-3), run
    )
    for size in (16, 64):
        losses = [
            row["train_loss"]
            for row in run.rows
            if row["batch_size"] == size and row["kind"] == "step"
        ]
        assert len(losses) == 120
        assert sum(losses[-20:]) < sum(losses[:20])
        assert sum(row["kind"] == "end" and row["batch_size"] == size for row in run.rows) == 1


@pytest.mark.data
@pytest.mark.skipif(not _fetched("digits"), reason="digits are not fetched")
def test_every_mode_is_mezo_on_real_data():
    run = Run(quiet=True)
    accuracy.run(
        configured(
            "accuracy",
            task="digits",
            modes=["PertP", "DDP"],
            steps=25,
            batch_size=32,
            test_rows=60,
            lr=3e-3,
            seeds=[0, 1],
        ),
        run,
    )
    ends = {row["mode"]: row for row in run.rows if row["kind"] == "end" and row["seed"] == 0}
    assert set(ends) == {"start", "ZO2", "MeZO", "PertP", "DDP"}
    for mode in ("ZO2", "PertP", "DDP"):
        assert ends[mode] | {"mode": "", "ranks": 1} == ends["MeZO"] | {"mode": "", "ranks": 1}
        losses = {
            m: [
                row["train_loss"]
                for row in run.rows
                if row["mode"] == m and row["kind"] == "step" and row["seed"] == 0
            ]
            for m in (mode, "MeZO")
        }
        assert losses[mode] == losses["MeZO"]
        assert len(losses[mode]) == 25
    assert ends["start"]["weights_sha256"] != ends["MeZO"]["weights_sha256"]
    assert ends["MeZO"]["test_loss"] < ends["start"]["test_loss"]
    (other,) = (row for row in run.rows if row["kind"] == "end" and row["seed"] == 1)
    assert other["mode"] == "ZO2"
    assert other["weights_sha256"] != ends["ZO2"]["weights_sha256"]
