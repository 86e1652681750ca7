"""Every claim of DistZO2 fails on rows that must fail it, and holds on rows that must hold it; in
between it says so.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from projects.distzo2 import claims
from projects.distzo2.labels import one_process
from projects.distzo2.tables import (
    curves,
    links,
    measured_slicing,
    peaks,
    per_rank,
    speedups,
    streams,
)
from shared.claims import require_falsifiable


def _beside(name: str):
    specification = importlib.util.spec_from_file_location(
        f"distzo2_{name}", Path(__file__).with_name(f"{name}.py")
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


make_cost = _beside("modelled").make_cost


def equality(
    differing: int = 0,
    weights: bool = True,
    replicas: bool = True,
    steps: int = 30,
    naive: int = 50,
) -> dict:
    common = {"ranks": 2, "steps": steps, "gradients_differing": 0}
    good = {"losses_differing": differing, "weights_equal": weights, "replicas_equal": replicas}
    bad = {"losses_differing": naive, "weights_equal": False, "replicas_equal": False}
    return {
        "equality": [
            {**common, "mode": "PertP", **good},
            {**common, "mode": "PertP, naive restore", **bad},
        ]
    }


def throughput(ddp: float = 1.7, model: str = "llama 6 x 384") -> dict:
    rows = []
    for repeat in range(6):
        for mode, seconds in (
            (one_process(1), 1.0),
            ("one process, 2 threads", 0.8),
            ("DDP", 1 / ddp),
        ):
            for rank in range(2):
                own = seconds if rank == 0 else seconds * 0.9  # the slower rank counts
                row = {"mode": mode, "model": model, "repeat": repeat, "rank": rank, "tokens": 100}
                rows.append({**row, "step_seconds": own, "process_seconds": own})
    return {"throughput": rows}


def memory(rank: float = 0.9, deep: float = 1.0) -> dict:
    rows = []
    for layers, growth in ((4, 1.0), (12, deep)):
        for mode, ranks, share in (("ZO2", 1, 1.0), ("PertP", 2, rank)):
            rows += [
                {
                    "mode": mode,
                    "ranks": ranks,
                    "rank": r,
                    "layers": layers,
                    "device_peak_bytes": 100 * share * (growth if mode != "ZO2" else 1),
                }
                for r in range(ranks)
            ]
    return {"memory": rows}


def communication(scalars: float = 24.0, busiest: float = 50.0) -> dict:
    rows = []
    for mode, ups in (
        ("DDP", (100.0, 100.0)),
        ("DDP, sliced", (busiest, 100.0 - busiest)),
        ("first-order DDP", (0.0, 0.0)),
    ):
        for rank, up in enumerate(ups):
            sent = 4e6 if mode.startswith("first") else scalars
            rows.append(
                {
                    "mode": mode,
                    "ranks": 2,
                    "rank": rank,
                    "parameters": 10**6,
                    "micro_batches": 1,
                    "host_up_bytes": up,
                    "host_down_bytes": up,
                }
                | {"exchanged_bytes": 0.0, "scalar_bytes": sent}
            )
    return {"communication": rows}


def link(slow: float = 1.7) -> dict:
    rows = []
    for rate, gain in ((0.0, 0.95), (0.1, 1.2), (0.05, slow)):
        for mode, seconds in (("DDP", 1.0), ("DDP, sliced", 1 / gain)):
            for repeat in range(3):
                for rank in range(2):
                    row = {
                        "link_gigabytes_per_second": rate,
                        "mode": mode,
                        "repeat": repeat,
                        "rank": rank,
                        "uploaded_bytes": 2e7,
                    }
                    rows.append(row | {"step_seconds": seconds})
    return {"link": rows}


def accuracy(
    rank: float = 0.7,
    mezo: float = 0.7,
    weights: str = "a",
    loss: float = 0.5,
    step: float = 0.6,
    start: float = 0.7,
    seeds: int = 5,
) -> dict:
    rows = [
        {"mode": "ZO2", "kind": "end", "seed": seed, "step": 3, "test_loss": 0.5 + seed / 1000}
        for seed in range(seeds)
    ]
    for mode, right, lost, digest in (
        ("start", 0.6, start, "s"),
        ("MeZO", mezo, 0.5, "a"),
        ("PertP", rank, loss, weights),
    ):
        for number in range(3 if mode != "start" else 0):
            rows.append(
                {
                    "mode": mode,
                    "kind": "step",
                    "seed": 0,
                    "step": number,
                    "train_loss": step if mode == "PertP" and number == 2 else 0.6,
                }
            )
        rows.append(
            {
                "mode": mode,
                "kind": "end",
                "seed": 0,
                "step": 3,
                "test_accuracy": right,
                "test_loss": lost,
                "weights_sha256": digest,
            }
        )
    return {"accuracy": rows}


def largebatch(
    fall: float = 0.5, noise: tuple[float, ...] = (0.4, 0.2, 0.1), small_fall: float | None = None
) -> dict:
    rows = []
    for place, (size, amplitude) in enumerate(zip((16, 64, 256), noise, strict=True)):
        last = small_fall if small_fall is not None and place == 0 else fall
        for number in range(100):
            loss = 2 + (2 * last - 2) * number / 99 + amplitude * (-1) ** number
            rows.append(
                {
                    "mode": "DDP",
                    "batch_size": size,
                    "kind": "step",
                    "step": number,
                    "train_loss": loss,
                }
            )
        rows.append(
            {"mode": "DDP", "batch_size": size, "kind": "end", "step": 100, "test_accuracy": 0.5}
        )
    return {"largebatch": rows}


def lanes(moving: float = 0.5, exchange: float = 0.1) -> dict:
    """With slices the link is busy for `moving` of what it is with whole blocks."""
    rows = []
    for mode, part in (("DDP", 1.0), ("DDP, sliced", moving)):
        for rank in range(2):
            for lane, seconds in (
                ("upload", 4 * part),
                ("offload", 4 * part),
                ("compute", 1.0),
                ("exchange", exchange if part < 1 else 0.0),
            ):
                row = {
                    "mode": mode,
                    "rank": rank,
                    "lane": lane,
                    "begin_seconds": 0.0,
                    "end_seconds": seconds,
                    "step_seconds": 9.0,
                }
                rows.append(row)
    return {"lanes": rows}


def plan(
    a_gpu: float = 4.0, in_all: float = 3.2, other: float = 3.1, held_out: float = 1.0
) -> dict:
    rows = []
    for gpu, ratios in (
        ("one", {"a GPU": a_gpu, "in all": in_all}),
        ("two", {"a GPU": 4.0, "in all": other}),
    ):
        for same_batch, ratio in ratios.items():
            for mode, part in (("DDP", 1.0), ("2D", 0.5)):  # the better mode counts
                row = {
                    "model": "opt-175b",
                    "gpu": gpu,
                    "gpus": 4,
                    "mode": mode,
                    "links": "own",
                    "transfer": "sliced",
                    "same_batch": same_batch,
                }
                rows.append({**row, "speedup_ratio": part * ratio})
    extra = [
        {**rows[0], "links": "shared", "speedup_ratio": 9.0},
        {**rows[0], "gpus": 8, "speedup_ratio": 9.0},
    ]
    return {"plan": rows + [{**one, "gpu": "three"} for one in extra], "cost": make_cost(held_out)}


HOLDING = {
    "distzo2.equal": equality(),
    "distzo2.large": throughput(3.5, "opt-175b"),
    "distzo2.throughput": throughput(),
    "distzo2.memory": memory(),
    "distzo2.communication": communication(),
    "distzo2.slices": communication(),
    "distzo2.link": link(),
    "distzo2.accuracy": accuracy(),
    "distzo2.largebatch": largebatch(),
    "distzo2.streams": lanes(),
    "distzo2.large_predicted": plan(),
}
FAILING = {
    "distzo2.equal": equality(differing=1),
    "distzo2.large": throughput(0.9, "opt-175b"),
    "distzo2.throughput": throughput(0.9),
    "distzo2.memory": memory(rank=1.5),
    "distzo2.communication": communication(scalars=32.0),
    "distzo2.slices": communication(busiest=90.0),
    "distzo2.link": link(slow=0.9),
    "distzo2.accuracy": accuracy(rank=0.65),
    "distzo2.largebatch": largebatch(fall=0.95),
    "distzo2.streams": lanes(moving=1.1),
    "distzo2.large_predicted": plan(in_all=2.9, other=2.0),
}


def test_every_claim_can_fail_and_can_hold():
    require_falsifiable("distzo2", failing=FAILING, holding=HOLDING)


@pytest.mark.parametrize(
    ("check", "rows", "wanted"),
    [
        (claims.equal, equality(weights=False), "fails"),
        (claims.equal, equality(replicas=False), "fails"),
        (claims.equal, equality(steps=10), "partly"),
        (claims.large, throughput(), "not tested here"),
        (claims.large, throughput(2.0, "opt-175b"), "partly"),
        (claims.throughput, throughput(1.3), "partly"),
        (claims.memory, memory(rank=1.1), "partly"),
        (claims.memory, memory(deep=1.1), "partly"),
        (claims.slices, communication(busiest=60.0), "partly"),
        (claims.link, link(slow=1.2), "partly"),
        (claims.accuracy, accuracy(weights="b"), "partly"),
        (claims.accuracy, accuracy(step=0.61), "partly"),
        (claims.accuracy, accuracy(loss=0.51), "fails"),
        # equal, and no better than at the start
        (claims.accuracy, accuracy(start=0.5), "fails"),
        (claims.accuracy, accuracy(seeds=4), "partly"),
        (claims.accuracy, {"accuracy": accuracy()["accuracy"][:-1]}, "not tested here"),
        (claims.largebatch, largebatch(noise=(0.2, 0.4, 0.1)), "partly"),
        (claims.largebatch, largebatch(small_fall=1.2), "partly"),
        (claims.largebatch, largebatch(noise=(0.1, 0.2, 0.4)), "fails"),
        (claims.streams, lanes(moving=0.9), "partly"),
        (claims.streams, {"lanes": lanes()["lanes"][:8]}, "not tested here"),
        (claims.large_predicted, plan(other=2.9), "partly"),
        (claims.large_predicted, plan(a_gpu=2.0, other=2.0), "fails"),
        # a model that is off predicts nothing
        (claims.large_predicted, plan(held_out=1.5), "fails"),
        (claims.large_predicted, {**plan(), "plan": plan()["plan"][-2:]}, "not tested here"),
    ],
)
def test_in_between_it_says_so(check, rows, wanted):
    assert check(**{name: pd.DataFrame(one) for name, one in rows.items()}).verdict == wanted


def test_the_slower_rank_is_the_step_and_rounds_are_paired():
    rows = [
        {
            "mode": mode,
            "repeat": r,
            "rank": rank,
            "step_seconds": s,
            "process_seconds": s,
            "tokens": 10,
        }
        for r, (one, two) in enumerate([(4.0, 2.0), (40.0, 20.0), (8.0, 4.0)])
        for mode, both in ((one_process(1), (one, 0.1)), ("DDP", (0.1, two)))
        for rank, s in enumerate(both)
    ]
    found = speedups(pd.DataFrame(rows)).set_index("mode")
    assert found.loc["DDP", "speedup_ratio"] == 2.0
    assert found.loc["DDP", "tokens_per_second"] == 2.5


def test_shares_are_of_the_blocks_and_of_zo2():
    found = per_rank(pd.DataFrame(communication(busiest=60.0)["communication"])).set_index("mode")
    assert found.loc["DDP, sliced", ["host_share", "all_share"]].tolist() == [0.6, 1.0]
    assert peaks(pd.DataFrame(memory(rank=0.7)["memory"])).set_index(["mode", "layers"]).loc[
        ("PertP", 12), "zo2_ratio"
    ] == pytest.approx(0.7)


def test_a_link_is_predicted_by_the_longer_of_the_step_and_the_bytes_of_both_ranks():
    found = links(pd.DataFrame(link()["link"])).set_index("link_gigabytes_per_second")
    assert found.loc[0.0, "predicted_seconds"] == 1.0
    # 2 x 20 MB at 50 MB/s are 0.8 s: the step is longer
    assert found.loc[0.05, "predicted_seconds"] == pytest.approx(1.0)
    slower = [{**row, "uploaded_bytes": 5e7} for row in link()["link"]]
    assert links(pd.DataFrame(slower)).set_index("link_gigabytes_per_second").loc[
        0.05, "predicted_seconds"
    ] == pytest.approx(2.0)


def test_roughness_is_the_noise_of_a_step_and_not_the_fall():
    generator = np.random.default_rng(0)
    losses = np.linspace(3, 1, 5000) + generator.normal(0, 0.05, 5000)
    rows = [
        {"mode": "DDP", "batch_size": 8, "kind": "step", "step": i, "train_loss": loss}
        for i, loss in enumerate(losses)
    ]
    rows.append({"mode": "DDP", "batch_size": 8, "kind": "end", "step": 5000, "test_accuracy": 0.5})
    found = curves(pd.DataFrame(rows[::-1])).iloc[0]  # whatever the order of the rows
    assert found["roughness_loss"] == pytest.approx(0.05, rel=0.05)
    assert found["first_loss"] == pytest.approx(2.9, abs=0.01)
    assert found["last_loss"] == pytest.approx(1.1, abs=0.01)


def test_streams_are_compared_without_the_exchange():
    for exchange in (0.1, 5.0):
        (found,) = measured_slicing(pd.DataFrame(lanes(exchange=exchange)["lanes"])).to_dict(
            "records"
        )
        assert found["whole_share"] == pytest.approx(1 / 9)
        assert (
            found["sliced_share"] == pytest.approx(1 / 5) == pytest.approx(found["expected_share"])
        )
        assert found["ranks"] == 2


def test_a_table_without_a_pair_of_modes_is_empty_and_not_wrong():
    rows = [
        {**row, "model": "opt-1.3b", "mode": "2D"} for row in plan()["plan"] if row["mode"] == "2D"
    ]
    shares = {f"{lane}_share": 0.25 for lane in ("upload", "exchange", "compute", "offload")}
    predicted = [
        {**row, **shares, "transfer": transfer}
        for row in rows
        for transfer in ("replicated", "sliced")
    ]
    sliced = [row for row in lanes()["lanes"] if row["mode"] == "DDP, sliced"]
    assert streams(pd.DataFrame(sliced), pd.DataFrame(predicted)).frame.empty
    assert len(streams(pd.DataFrame(lanes()["lanes"]), pd.DataFrame(predicted)).frame) == 1
