"""The experiments that need data, on a task small enough to make up; the others run in the smoke
run of the whole workflow.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from projects.zo2.data import Classification, random_tokens, text_tokens
from projects.zo2.experiments import accuracy, drift, limit, lowbit, memory, peers, schedule
from shared.data import path
from shared.errors import UserError
from shared.experiment import Config, Run, load


def configured(name: str, scale: str = "cpu", **values: object) -> Config:
    """The configuration of an experiment at a scale, with some values in place of the scale's."""
    return load("zo2", name, scale, values)[1]


class Parity(Classification):
    """Whether a text has an even number of letters, told from its first letters by a small residual
    network.
    """

    def __init__(self, *_):
        texts = ["".join(chr(97 + (7 * i + j) % 26) for j in range(3 + i % 4)) for i in range(40)]
        labels = np.array([len(text) % 2 for text in texts])
        super().__init__((texts[:30], labels[:30]), (texts[30:], labels[30:]))

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 17), nn.Tanh(), nn.Linear(17, 2)
        )

    def encode(self, texts):
        return {
            "letters": torch.tensor(
                [[ord(text[i]) / 100 if i < len(text) else 0.0 for i in range(6)] for text in texts]
            )
        }

    def logits(self, model, inputs):
        return model(inputs["letters"])


def test_accuracy_shows_that_mezo_and_zo2_are_one_and_what_a_flush_is_for(monkeypatch):
    monkeypatch.setattr(accuracy, "classification", Parity)
    run = Run(quiet=True)
    accuracy.run(configured("accuracy", steps=4, batch_size=8, test_rows=10, lr=1e-2), run)
    trained = [row for row in run.rows if row["kind"] == "end" and row["method"] == "ZO2"]
    assert [row["seed"] for row in trained] == [0, 1, 2, 3, 4]
    assert len({row["weights_sha256"] for row in trained}) == 5
    ends = {row["method"]: row for row in run.rows if row["kind"] == "end" and row["seed"] == 0}
    assert set(ends) == {"zero-shot", "ZO2, not flushed", "ZO2", "MeZO", "AdamW (first order)"}
    assert ends["ZO2"] | {"method": ""} == ends["MeZO"] | {"method": ""}
    assert (
        len(
            {
                ends[name]["weights_sha256"]
                for name in ("zero-shot", "ZO2, not flushed", "ZO2", "AdamW (first order)")
            }
        )
        == 4
    )
    losses = {
        m: [
            row["train_loss"]
            for row in run.rows
            if row["kind"] == "step" and row["method"] == m and row["seed"] == 0
        ]
        for m in ("ZO2", "MeZO")
    }
    assert losses["ZO2"] == losses["MeZO"]
    assert len(losses["ZO2"]) == 4


def test_accuracy_can_leave_methods_out(monkeypatch):
    monkeypatch.setattr(accuracy, "classification", Parity)
    run = Run(quiet=True)
    accuracy.run(configured("accuracy", steps=2, batch_size=4, methods=["MeZO"]), run)
    assert {row["method"] for row in run.rows} == {"MeZO"}


def test_a_loss_that_is_not_finite_is_a_gap_and_not_the_end(monkeypatch):
    class Lost(Parity):
        def loss(self, model, batch):
            return super().loss(model, batch) * float("inf")

    monkeypatch.setattr(accuracy, "classification", Lost)
    run = Run(quiet=True)
    methods = ["zero-shot", "ZO2"]
    accuracy.run(configured("accuracy", steps=2, batch_size=4, methods=methods, seeds=[0]), run)
    assert [row["train_loss"] for row in run.rows if row["kind"] == "step"] == [None, None]


def test_drift_is_told_from_the_update(monkeypatch):
    monkeypatch.setattr(drift, "FineFood", Parity)
    run = Run(quiet=True)
    drift.run(configured("drift", batch_size=8), run)
    rows = {(row["dtype"], row["probe"]): row for row in run.rows}
    for dtype in ("float32", "float16", "bfloat16"):
        fresh, inplace = rows[dtype, "fresh"], rows[dtype, "inplace"]
        assert fresh["drifted_share"] == fresh["drift_ratio"] == 0
        assert inplace["drifted_share"] > 0
        assert fresh["update_norm"] == inplace["update_norm"]
    assert rows["float32", "fresh"]["update_cosine"] > 0.999
    assert (
        rows["bfloat16", "inplace"]["drift_ratio"] > 10 > rows["float32", "inplace"]["drift_ratio"]
    )


def test_lowbit_counts_what_survives(monkeypatch):
    monkeypatch.setattr(lowbit, "FineFood", Parity)
    run = Run(quiet=True)
    lowbit.run(configured("lowbit", steps=3, batch_size=8, test_rows=10, lr=1e-4), run)
    rows = {(row["storage_dtype"], row["rounding"]): row for row in run.rows}
    full, half, eighth = (rows[name, "nearest"] for name in ("float32", "bfloat16", "float8_e4m3"))
    assert full["largest_loss_difference"] == 0
    assert full["update_cosine"] > 0.999
    assert 0 <= eighth["surviving_share"] < half["surviving_share"] < full["surviving_share"]
    assert full["host_bytes"] > half["host_bytes"] > eighth["host_bytes"]


def test_what_does_not_fit_is_not_tried():
    run = Run(quiet=True)
    config = configured(
        "memory",
        "smoke",
        hidden=32,
        heads=4,
        depths=[2],
        methods=["mezo", "zo2-3"],
        tokens=4,
        largest_resident_gigabytes=0.001,
    )
    memory.run(config, run)
    assert {row["method"]: row["counter"] for row in run.rows} == {
        "mezo": "not tried",
        "zo2-3": "allocator",
    }
    assert next(row for row in run.rows if row["method"] == "mezo")["peak_bytes"] is None


def test_a_gpu_that_is_wanted_and_not_there_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="wants a GPU"):
        memory.run(configured("memory", hidden=32, depths=[2], device="cuda"), Run(quiet=True))


def test_lanes_overlap_only_where_they_may():
    run = Run(quiet=True)
    schedule.run(configured("schedule", "smoke"), run)
    spans = {v: [row for row in run.rows if row["variant"] == v] for v in ("overlap", "no overlap")}
    assert {row["lane"] for row in spans["overlap"]} == {"upload", "compute", "offload"}
    ordered = sorted(spans["no overlap"], key=lambda row: row["start_seconds"])
    assert all(a["end_seconds"] <= b["start_seconds"] for a, b in pairwise(ordered))


def test_text_is_cut_into_consecutive_pieces_and_must_suffice():
    def tokenizer(text):
        return {"input_ids": [ord(letter) for letter in text]}

    batches = text_tokens(tokenizer, ["abcdefgh", "ijklmnop"], batch_size=2, tokens=3, steps=2)
    assert ["".join(map(chr, row)) for batch in batches for row in batch["input_ids"].tolist()] == [
        "abc",
        "def",
        "ghi",
        "jkl",
    ]
    with pytest.raises(UserError, match="16 tokens, 18 are needed"):
        text_tokens(tokenizer, ["abcdefgh", "ijklmnop"], batch_size=3, tokens=3, steps=2)
    again = random_tokens(11, 2, 3, 2, seed=5)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(again, random_tokens(11, 2, 3, 2, seed=5), strict=True)
    )


def _needs(name):
    try:
        return path(name)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.data
def test_the_published_mezo_updates_along_another_direction_than_it_probes():
    _needs("mezo-pypi")
    peer = peers.load_mezo()
    for shape, same in (([300, 300], True), ([400, 304], True), ([400, 300], False)):
        assert (peers._cosine(*peers._peer_directions(peer, shape)) > 0.999) is same
        assert peers._cosine(*peers._own_directions(shape)) > 0.999


@pytest.mark.data
def test_both_trainers_of_the_limit_draw_the_same_noise(tmp_path):
    import shutil

    from shared.models import local_model

    _needs("wiki100")
    _needs("smollm2-135m")
    source = local_model("smollm2-135m")
    found = []
    for method in ("mezo", "zo2"):
        working = shutil.copy(source / "model.safetensors", tmp_path / f"{method}.safetensors")
        found.append(limit.train(method, source, working, tokens=4, steps=2, seed=0)["losses"])
    assert found[0] == found[1]
