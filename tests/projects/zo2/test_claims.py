"""Every claim of ZO2 fails on rows that must fail it, and holds on rows that must hold it; in
between it says so.
"""

import math

import pandas as pd
import pytest

from projects.zo2 import claims
from shared.claims import require_falsifiable


def equality(bits: int = 0, steps: int = 32, losses: int = 0) -> dict:
    row = {
        "model": "opt",
        "variant": "disk",
        "kind": "must be equal",
        "steps": steps,
        "differing_losses": losses,
    }
    fault = {**row, "kind": "known fault", "differing_gradients": 9, "differing_bits": 99}
    return {"equality": [{**row, "differing_gradients": 0, "differing_bits": bits}, fault]}


def accuracy(digest: str = "aa", loss: float = 0.5, start: float = 0.6, seeds: int = 5) -> dict:
    row = {
        "kind": "end",
        "seed": 0,
        "step": 40,
        "test_accuracy": 0.7,
        "test_loss": 0.5,
        "weights_sha256": "aa",
    }
    return {
        "accuracy": [
            {**row, "method": "zero-shot", "test_loss": start},
            {**row, "method": "ZO2", "weights_sha256": digest, "test_loss": loss},
            *(
                {**row, "method": "ZO2", "seed": seed, "test_loss": loss + seed / 1000}
                for seed in range(1, seeds)
            ),
            {**row, "method": "MeZO"},
        ]
    }


def memory(
    zo2: tuple[float, ...] = (100, 101, 101),
    mezo: tuple[float, ...] = (150, 250, 400),
    depths: tuple[int, ...] = (4, 16, 32),
) -> dict:
    rows = []
    for method, peaks in (("zo2-3", zo2), ("mezo", mezo), ("zo2-resident", mezo)):
        rows += [
            {
                "model": "opt-h768",
                "hidden": 768,
                "layers": d,
                "method": method,
                "peak_bytes": p,
                "counter": "allocator",
            }
            for d, p in zip(depths, peaks, strict=True)
        ]
    return {"memory": rows}


def on_gpu(models: list[str], bytes_: float) -> dict:
    rows = [
        {
            "model": m,
            "hidden": 2048,
            "layers": 24,
            "method": "zo2-3",
            "peak_bytes": bytes_,
            "counter": "nvml",
        }
        for m in models
    ]
    return {"memory": rows}


def limit(mezo: bool = False, zo2: bool = True, loss: float = 4.0, memory: bool = True) -> dict:
    row = {
        "model": "m",
        "limit_bytes": 1e9,
        "peak_rss_bytes": 1.5e9,
        "last_loss": 4.0,
        "outcome": "ended",
        "out_of_memory": memory,
    }
    return {
        "limit": [
            {**row, "method": "mezo", "limit_bytes": math.nan, "finished": True},
            {**row, "method": "mezo", "finished": mezo},
            {**row, "method": "zo2", "finished": zo2, "last_loss": loss},
        ]
    }


def ablation(
    times: dict[str, float] | None = None,
    unfused: int = 2,
    losses: int = 0,
    buffers: int = 3,
    visits: int = 1,
) -> dict:
    times = {"no overlap": 1.5, "no deferred update": 1.2, "no reused slots": 1.1, **(times or {})}
    bytes_ = {"full": 1, "no deferred update": unfused, "no dual forward (three visits)": 3}
    rows = []
    for tier in ("RAM", "disk"):
        for variant in (
            "full",
            "no overlap",
            "no deferred update",
            "no dual forward (three visits)",
            "no reused slots",
        ):
            for repeat in range(6):
                moved = 100 * bytes_.get(variant, 1)
                rows.append(
                    {
                        "tier": tier,
                        "variant": variant,
                        "repeat": repeat,
                        "step_seconds": times.get(variant, 1.0) * (1 + 0.01 * repeat),
                        "bytes_up": moved,
                        "bytes_down": moved,
                        "uploads": visits * moved // 100,
                        "offloads": visits * moved // 100,
                        "blocks": 1,
                        "waited_seconds": 0.0,
                        "buffers": None if variant == "no reused slots" else buffers,
                        "differing_losses": losses if variant == "full" else 0,
                    }
                )
    return {"ablation": rows}


def throughput(device: str = "cpu", tokens: int = 256, **times: float) -> dict:
    found = {
        "MeZO": 2.0,
        "ZO2, all on the device": 1.0,
        "ZO2, RAM": 1.0,
        "ZO2, disk warm": 1.0,
        "ZO2, disk cold": 1.0,
    }
    found.update(
        {name.replace("_", " ").replace("ZO2 ", "ZO2, "): value for name, value in times.items()}
    )
    common = {
        "model": "m",
        "dtype": "float32",
        "device": device,
        "tokens": tokens,
        "bytes_up": 1,
        "bytes_down": 1,
        "waited_seconds": 0.0,
    }
    return {
        "throughput": [
            {**common, "variant": v, "repeat": r, "step_seconds": s}
            for v, s in found.items()
            for r in range(3)
        ]
    }


def lowbit(e4m3: float | None = 0.95, bf16: float = 0.95, eighth: float = 0.25) -> dict:
    cosines = {
        "float32": (1.0, 1.0),
        "bfloat16": (bf16, 0.5),
        "float16": (0.99, 0.5),
        "float8_e5m2": (0.95, eighth),
        "float8_e4m3": (e4m3, 0.25),
    }
    return {
        "lowbit": [
            {
                "storage_dtype": n,
                "rounding": "nearest",
                "offloaded_bytes": 1000 * size,
                "update_cosine": c,
            }
            for n, (c, size) in cosines.items()
        ]
    }


def sensitivity(few: float = 1.4, many: float = 1.02) -> dict:
    rows = []
    for tokens, overlap in ((16, few), (1024, many)):
        for variant, seconds in (("resident", 1.0), ("overlap", overlap), ("no overlap", 2.0)):
            for repeat in range(3):
                rows.append(
                    {
                        "batch_size": 1,
                        "sequence": tokens,
                        "tokens": tokens,
                        "variant": variant,
                        "repeat": repeat,
                        "step_seconds": seconds,
                        "upload_lane_seconds": 0.1,
                        "compute_lane_seconds": 0.8,
                        "offload_lane_seconds": 0.1,
                    }
                )
    return {"sensitivity": rows}


HOLDING = {
    "zo2.bitwise": equality(),
    "zo2.accuracy": accuracy(),
    "zo2.flat_memory": memory(),
    "zo2.saving": memory(),
    "zo2.limit": limit(),
    "zo2.one_transfer": ablation(),
    "zo2.no_extra_time": throughput(),
    "zo2.overlap": ablation(),
    "zo2.deferred_update": ablation(),
    "zo2.reused_memory": ablation(),
    "zo2.lowbit": lowbit(),
    "zo2.tokens": sensitivity(),
    "zo2.opt175b": on_gpu(["opt-175b"], 18e9),
    "zo2.gpu_memory": on_gpu(list(claims.ON_ONE_GPU), 3.5e9),
    "zo2.gpu_throughput": throughput(device="cuda"),
}
FAILING = {
    "zo2.bitwise": equality(bits=1),
    "zo2.accuracy": accuracy(digest="bb", loss=0.51),
    "zo2.flat_memory": memory(zo2=(100, 104, 108)),
    "zo2.saving": memory(mezo=(110, 150, 190)),
    "zo2.limit": limit(zo2=False),
    "zo2.one_transfer": ablation(unfused=1),
    "zo2.no_extra_time": throughput(ZO2_RAM=1.3, ZO2_disk_warm=1.3, ZO2_disk_cold=1.3),
    "zo2.overlap": ablation({"no overlap": 0.9}),
    "zo2.deferred_update": ablation({"no deferred update": 0.9}),
    "zo2.reused_memory": ablation({"no reused slots": 0.9}),
    "zo2.lowbit": lowbit(bf16=0.2),
    "zo2.tokens": sensitivity(few=1.0, many=1.4),
    "zo2.opt175b": on_gpu(["opt-175b"], 30e9),
    "zo2.gpu_memory": on_gpu(list(claims.ON_ONE_GPU), 30e9),
    "zo2.gpu_throughput": throughput(device="cuda", ZO2_RAM=2.0),
}


def test_every_claim_can_hold_and_can_fail():
    require_falsifiable("zo2", failing=FAILING, holding=HOLDING)


@pytest.mark.parametrize(
    ("check", "rows", "verdict"),
    [
        (claims.bitwise, equality(losses=1), "fails"),
        (claims.bitwise, equality(steps=8), "partly"),
        (claims.accuracy, accuracy(digest="bb"), "partly"),
        (claims.accuracy, accuracy(seeds=4), "partly"),
        # two models that have learnt nothing are equal too
        (claims.accuracy, accuracy(start=0.5), "fails"),
        (claims.accuracy, {"accuracy": accuracy()["accuracy"][1:]}, "not tested here"),
        (claims.flat_memory, memory(mezo=(100, 100, 100)), "fails"),
        (claims.flat_memory, memory((100,), (150,), (4,)), "not tested here"),
        (claims.saving, memory(mezo=(110, 150, 400)), "partly"),
        (claims.saving, memory((100, 100), (300, 300), (4, 8)), "not tested here"),
        (claims.limit, limit(mezo=True), "fails"),
        (claims.limit, limit(loss=4.1), "partly"),
        (claims.limit, limit(memory=False), "not tested here"),
        (claims.one_transfer, ablation(losses=1), "fails"),
        (claims.one_transfer, ablation(visits=2), "fails"),
        (claims.no_extra_time, throughput(ZO2_RAM=1.3), "partly"),
        (claims.no_extra_time, throughput(tokens=64), "not tested here"),
        (claims.no_extra_time, throughput(device="cuda"), "not tested here"),
        (claims.overlap, ablation({"no overlap": 1.0001}), "holds"),
        (claims.reused_memory, ablation(buffers=4), "fails"),
        (claims.lowbit, lowbit(e4m3=None), "partly"),
        (claims.lowbit, lowbit(eighth=0.5), "fails"),
        (claims.tokens, sensitivity(many=1.2), "partly"),
        (claims.tokens, sensitivity(few=1.02, many=1.02), "partly"),
        (claims.opt175b, memory(), "not tested here"),
        (claims.gpu_memory, on_gpu(["opt-1.3b"], 3.5e9), "partly"),
        (claims.gpu_throughput, throughput(), "not tested here"),
    ],
)
def test_verdicts_in_between(check, rows, verdict):
    assert check(**{name: pd.DataFrame(values) for name, values in rows.items()}).verdict == verdict
