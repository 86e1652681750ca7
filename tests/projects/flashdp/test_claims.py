"""Every claim of FlashDP fails on rows that must fail it, and holds on rows that must hold it; in
between it says so.
"""

import math

import pandas as pd
import pytest

from projects.flashdp import claims
from projects.flashdp.labels import METHODS, clipping
from shared.claims import require_falsifiable

ABSOLUTE = {
    "non-private": 1.0,
    "FlashDP": 1.1,
    "explicit": 1.3,
    "Opacus, per layer": 1.9,
    "Opacus, FGC": 2.3,
    "Opacus, ghost": 2.3,
}


def speed(
    seconds: dict[str, float] | None = None,
    cells=((1, 256), (4, 256)),
    model: str = "4M",
    device: str = "cpu",
    by_tokens=None,
):
    """Timed rows of every method; `seconds` of a step by method, `by_tokens` those of FlashDP by
    length.
    """
    times = {**dict.fromkeys(METHODS, 1.6), **ABSOLUTE, **(seconds or {})}
    rows = []
    for batch, tokens in cells:
        for method in METHODS:
            common = {
                "model": model,
                "batch_size": batch,
                "tokens": tokens,
                "device": device,
                "method": method,
                "clipping": clipping(method),
            }
            rows.append({**common, "peak_bytes": 100})
            for repeat in range(6):
                step = (
                    (by_tokens or {}).get(tokens, times[method])
                    if method == "FlashDP"
                    else times[method]
                )
                rows.append(
                    {
                        **common,
                        "repeat": repeat,
                        "step_seconds": step,
                        "tokens_per_second": tokens / step,
                    }
                )
    return rows


def batch_size(*args, **kwargs) -> dict:
    return {"batch_size": speed(*args, **kwargs)}


def sequence(short: float, long: float) -> dict:
    return {"sequence_length": speed(cells=((8, 64), (1, 512)), by_tokens={64: short, 512: long})}


def utility(
    off: float = 0.0,
    losses=(6.0, 5.8, 5.5),
    plain: float = 5.0,
    spent: float = 2.99,
    steps: int = 100,
    seed: int = 0,
    untrained: float = 7.0,
    runs: int = 5,
    scatter: float = 0.01,
) -> dict:
    rows = []
    ends = [
        ("untrained", 0.0, untrained, 0.0),
        *(
            ("FlashDP", epsilon, loss, min(epsilon, spent) if epsilon != 3.0 else spent)
            for epsilon, loss in zip((1.0, 3.0, 8.0), losses, strict=True)
        ),
        ("non-private", math.nan, plain, math.nan),
    ]
    for number, (method, epsilon, loss, used) in enumerate(ends):
        for run in range(runs):
            rows.append(
                {
                    "kind": "end",
                    "method": method,
                    "target_epsilon": epsilon,
                    "seed": run,
                    "step": steps,
                    "held_out_loss": loss + scatter * (-1) ** (run + number),
                    "spent_epsilon": used,
                }
            )
    for step in range(steps):
        row = {"kind": "step", "target_epsilon": 3.0, "step": step}
        rows.append({**row, "method": "FlashDP", "seed": 0, "train_loss": 6.0})
        rows.append(
            {
                **row,
                "method": "explicit",
                "seed": seed,
                "train_loss": 6.0 * (1 + off * (step == 50)),
            }
        )
    return {"utility": rows}


def memory(flash: float = 1.01) -> dict:
    row = {"model": "21M", "batch_size": 16, "tokens": 128, "parameters": 21_000_000}
    peaks = {
        "non-private": 1000,
        "FlashDP": 1000 * flash,
        "explicit": 1500,
        "Opacus, per layer": 2000,
    }
    return {
        "memory": [{**row, "method": method, "peak_bytes": peak} for method, peak in peaks.items()]
    }


def growth(opacus: float = 500.0, excess: float = 0.01, parameters: int = 100) -> dict:
    """Opacus takes `opacus` more bytes a sample, FlashDP `excess` of the parameters' bytes more."""
    rows = []
    for batch in (1, 2, 4):
        row = {"model": "smollm2-135m", "batch_size": batch, "tokens": 64, "parameters": parameters}
        plain = 1000 + 200 * batch
        peaks = {
            "non-private": plain,
            "FlashDP": plain + 4 * parameters * excess * batch,
            "Opacus, per layer": plain + opacus * batch,
        }
        rows += [{**row, "method": method, "peak_bytes": peak} for method, peak in peaks.items()]
    return {"memory": rows}


def cost(bk: float = 1.5, flash: float = 1.0, moved: float = 2.2) -> dict:
    """`moved` is what the method that moves most moves, over FlashDP."""
    flops = {
        "non-private": 1.0,
        "FlashDP": flash,
        "BK": bk,
        "GhostClip": 1.8,
        "Opacus, ghost": 2.2,
        "Opacus, FGC": 2.0,
    }
    bytes_ = {
        "non-private": 0.7,
        "FlashDP": 1.0,
        "BK": 1.2,
        "GhostClip": 1.25,
        "Opacus, ghost": 1.25,
        "Opacus, FGC": moved,
    }
    return {
        "cost": [
            {"method": m, "step_flops": 1e9 * flops[m], "moved_bytes": 1e9 * bytes_[m]}
            for m in flops
        ]
    }


def amp(difference: float = 0.01, contribution: float = 1.0001, narrow: float = 1.1) -> dict:
    rows = [{"kind": "gradient", "backend": "loop", "relative_difference": difference}]
    rows.append({"kind": "bound", "backend": "loop", "largest_contribution_ratio": contribution})
    for method, dtype, seconds in (
        ("non-private", "float32", 1.0), ("non-private", "bfloat16", 1.0), ("FlashDP", "float32",
        1.1), ("FlashDP", "bfloat16", narrow),
    ):  # fmt: skip
        rows += [
            {
                "kind": "time",
                "method": method,
                "autocast": dtype,
                "repeat": r,
                "step_seconds": seconds,
            }
            for r in range(6)
        ]
    return {"amp": rows}


def parallel(difference: float = 1e-7, sent: int = 100, seconds: float = 1.1) -> dict:
    rows = []
    for layout in ("data parallel", "pipeline"):
        rows.append(
            {"kind": "equal", "layout": layout, "method": "without noise", "rank": 0}
            | {"relative_difference": difference, "sent_bytes": sent, "gradient_bytes": 100}
        )
        for method, step in (("non-private", 1.0), ("FlashDP", seconds)):
            rows += [
                {
                    "kind": "time",
                    "layout": layout,
                    "method": method,
                    "rank": rank,
                    "repeat": r,
                    "step_seconds": step - 0.1 * rank,
                }
                for r in range(6)
                for rank in (0, 1)
            ]
    return {"parallel": rows}


FAILING = {
    "flashdp.equal": utility(off=2e-4),
    "flashdp.utility": utility(losses=(5.0, 5.1, 5.2), plain=5.3),
    "flashdp.throughput": batch_size({"FlashDP": 1.4}),
    "flashdp.throughput_large": batch_size(
        {"FlashDP": 1.2}, cells=((1, 1024), (4, 2048)), model="llama-1b", device="cuda"
    ),
    "flashdp.memory": memory(1.3),
    "flashdp.memory_batch": growth(opacus=0.0, excess=0.5),
    "flashdp.fastest": batch_size({"BK": 1.05}),
    "flashdp.opacus": batch_size({"Opacus, per layer": 1.4}),
    "flashdp.sequence": sequence(1.5, 1.7),
    "flashdp.redundant": cost(flash=1.1),
    "flashdp.movement": cost(moved=1.3),
    "flashdp.amp": amp(contribution=1.05),
    "flashdp.parallel": parallel(difference=1e-4),
}
HOLDING = {
    "flashdp.equal": utility(),
    "flashdp.utility": utility(),
    "flashdp.throughput": batch_size(),
    "flashdp.throughput_large": batch_size(
        {"FlashDP": 1.1}, cells=((1, 1024), (4, 2048)), model="llama-1b", device="cuda"
    ),
    "flashdp.memory": memory(),
    "flashdp.memory_batch": growth(),
    "flashdp.fastest": batch_size(),
    "flashdp.opacus": batch_size(),
    "flashdp.sequence": sequence(1.7, 1.1),
    "flashdp.redundant": cost(),
    "flashdp.movement": cost(),
    "flashdp.amp": amp(),
    "flashdp.parallel": parallel(),
}


def test_every_claim_can_fail_and_can_hold():
    require_falsifiable("flashdp", failing=FAILING, holding=HOLDING)


def verdict(name: str, rows: dict) -> str:
    (experiment,) = rows
    return getattr(claims, name)(**{experiment: pd.DataFrame(rows[experiment])}).verdict


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("equal", utility(steps=40), "partly"),  # too short for what the claim asks
        ("equal", utility(seed=1), "not tested here"),  # another seed has other noise
        ("utility", utility(losses=(6.0, 6.1, 5.5)), "partly"),
        ("utility", utility(scatter=0.5), "partly"),  # the scatter of seeds drowns the order
        ("utility", utility(runs=2), "partly"),  # too few seeds
        ("utility", utility(untrained=5.9), "fails"),  # training did harm
        ("utility", utility(spent=3.2), "fails"),  # overspending, whatever the losses
        ("throughput", batch_size({"FlashDP": 1.25}), "partly"),
        ("throughput", batch_size(cells=((1, 64), (4, 64))), "not tested here"),
        # on a CPU
        (
            "throughput_large",
            batch_size({"FlashDP": 1.0}, cells=((1, 1024),), model="llama-1b"),
            "not tested here",
        ),
        # small
        (
            "throughput_large",
            batch_size({"FlashDP": 1.0}, cells=((1, 1024),), model="gpt2", device="cuda"),
            "not tested here",
        ),
        # short
        (
            "throughput_large",
            batch_size({"FlashDP": 1.0}, cells=((1, 512),), model="llama-1b", device="cuda"),
            "not tested here",
        ),
        ("memory", memory(1.1), "partly"),
        ("memory", growth(), "not tested here"),
        ("memory_batch", growth(excess=0.2), "partly"),
        ("memory_batch", memory(), "not tested here"),
        (
            "opacus",
            {"batch_size": speed() + speed({"Opacus, per layer": 1.2}, cells=((8, 256),))},
            "partly",
        ),
        ("sequence", sequence(1.5, 1.55), "partly"),  # ahead, and losing ground
        ("sequence", sequence(1.9, 1.7), "partly"),  # gaining, and behind
        ("redundant", cost(bk=1.1), "partly"),
        ("redundant", cost(flash=1.06, bk=3.0), "fails"),  # not lean itself
        ("movement", cost(moved=1.6), "partly"),
        ("amp", amp(narrow=1.5), "partly"),
        ("amp", amp(difference=0.2), "fails"),
        ("parallel", parallel(sent=101), "fails"),
        ("parallel", parallel(seconds=1.5), "partly"),
    ],
)
def test_what_lies_between_is_said(name, rows, expected):
    assert verdict(name, rows) == expected


def test_short_sequences_do_not_count_for_the_throughput():
    rows = speed() + speed({"FlashDP": 9.0}, cells=((2, 64),))
    assert verdict("throughput", {"batch_size": rows}) == "holds"


def test_the_slower_rank_counts():
    rows = parallel()["parallel"]
    for row in rows:
        if row["kind"] == "time" and row["rank"] == 1 and row["method"] == "FlashDP":
            row["step_seconds"] = 2.0
    assert verdict("parallel", {"parallel": rows}) == "partly"
