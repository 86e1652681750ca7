"""Every claim of PAHQ has rows on which it fails and rows on which it holds; tables and figures are
made of the same rows.
"""

import itertools

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from projects.pahq import figures, tables
from projects.pahq.labels import (
    AREA,
    ATTRIBUTION,
    CIRCUIT,
    EAP,
    EAP_IG,
    EFFECTS,
    FP32,
    NONE,
    PAHQ,
    PLAIN,
    POINT,
    RANDOM,
    RELEASED,
    RTN,
)
from shared.claims import require_falsifiable

SEEDS, TASKS = range(5), ("a", "b", "c", "d", "e")


def speed(low=0.45, high=0.7, share=0.35, search=1.0, apart=0, kept=40):
    """Relative times: int8 in all linear layers, PAHQ, an evaluation, a search."""
    times = {"fp32": 1.0, "int8, qkv": 1.0, "int8, linear": low, "PAHQ, int8, qkv": high}
    steps = {"plain": 9.0, "unembed": 1.0, "PAHQ: int8": 0.9}
    rows = [
        {"kind": kind, "model": "m", "variant": name, "place": place, "repeat": repeat,
         "evaluation_seconds": seconds * (1 + 0.001 * repeat)}
        for kind, these in (("precision", times), ("step", steps))
        for place, (name, seconds) in enumerate(these.items())
        for repeat in range(6)
    ]  # fmt: skip
    rows += [
        {"kind": "layer", "variant": "mean", "repeat": repeat, "evaluation_seconds": share,
         "full_seconds": 1.0, "edges": 100}
        for repeat in range(6)
    ]  # fmt: skip
    rows += [
        {"kind": "whole", "variant": name, "search_seconds": seconds, "evaluations": 90,
         "edges": kept, "of_edges": 100}
        for name, seconds in ((FP32, search), (PLAIN, 10.0), (RTN, 1.0), (PAHQ, 1.0))
    ]  # fmt: skip
    return [*rows, {"kind": "whole", "variant": "agreement", "edges": apart, "of_edges": 100}]


def memory(low=20, activations=30, computed=30):
    plain = {
        "shape": "s", "policy": "fp32", "format": None, "scope": None, "placement": "resident",
        "low_bytes": 0, "full_bytes": 100, "slice_bytes": 0, "activation_bytes": activations,
        "computed_bytes": computed,
    }  # fmt: skip
    paper = plain | {
        "policy": "pahq-receiver", "format": "int8", "scope": "qkv", "low_bytes": low,
        "full_bytes": 50,
    }  # fmt: skip
    return [
        plain,
        paper | {"slice_bytes": 80},
        paper | {"placement": "prefetched", "slice_bytes": 1},
    ]


def trained(pahq=0.8, rank=0.02, kl=0.11):
    rows = []
    for task, seed in itertools.product(TASKS[:4], SEEDS):
        same = {"task": task, "seed": seed}
        nudge = 1 + 0.01 * seed
        for form, method in itertools.product(("int8", "e4m3"), (RTN, PAHQ)):
            own = method == PAHQ
            values = {
                "method": method, "format": form, "scope": "qkv", "scale": "head", "edges": 10,
                "effect_error": (pahq if own else 1.0) * nudge, "effect_deviation": 5.0,
                "rank_correlation": 0.9 + (rank if own else 0.0) * nudge,
                "other_side": 1, "floor_nats": 0.01,
            }  # fmt: skip
            rows += [{"kind": kind, **same, **values} for kind in (EFFECTS, ATTRIBUTION)]
        for method, value in (*((FP32, 0.1), (RTN, 0.11), (PAHQ, kl), (RANDOM, 5.0), (NONE, 6.0)),):
            rows.append(
                {"kind": CIRCUIT, **same, "method": method, "edges": 20, "format": None,
                 "kl_nats": value * nudge, "task_accuracy": 0.9, "jaccard_share": 0.8}
            )  # fmt: skip
    return rows


def ground_truth(pahq=1.0, exact=6, released=0.2, full=1.0):
    rows = []
    for circuit, seed in itertools.product(("reverse", "induction", "proportion"), SEEDS):
        same = {"kind": AREA, "circuit": circuit, "seed": seed, "edges": 80, "true_edges": 4}
        for method, form, auc, count in (
            (FP32, None, full, 6 if full == 1 else 0),
            *((PAHQ, form, pahq, exact) for form in ("int8", "e4m3", "int4")),
            *((RTN, form, 1.0, 4) for form in ("int8", "e4m3", "int4")),
            (RELEASED, "e4m3", 1.0 if circuit == "proportion" else released, 0),
            (EAP, None, 0.8, None),
            (RANDOM, None, 0.4, None),
        ):
            rows.append(
                {**same, "method": method, "format": form, "pessimistic_auc": auc,
                 "trapezoid_auc": auc, "node_auc": auc, "exact_thresholds": count,
                 "thresholds": 7, "false_edges": 0 if method == PAHQ else 2, "missed_edges": 0}
            )  # fmt: skip
    for method in (FP32, PAHQ, RTN, RELEASED, EAP):
        for x, y in ((0, 0), (0.1, 0.8), (1, 1)):
            rows.append(
                {"kind": POINT, "circuit": "reverse", "seed": 0, "method": method, "format": None,
                 "false_positive_rate": x, "true_positive_rate": y}
            )  # fmt: skip
    return rows


def pretrained(agreement=0.95, kl=0.12):
    rows = []
    for task in TASKS:
        for method, scope, value in (
            (NONE, None, 6.0), (EAP_IG, None, 0.1), (RANDOM, None, 5.0), (FP32, None, 0.1),
            (RTN, "qkv", 0.12), (PAHQ, "qkv", kl),
        ):  # fmt: skip
            rows.append(
                {"task": task, "method": method, "scope": scope, "format": None, "edges": 20,
                 "kl_nats": value, "task_accuracy": 0.9, "jaccard_share": agreement}
            )  # fmt: skip
    return rows


def scheduler(waits=1, prefetched=1.0, gpu=True):
    return [
        {"placement": placement, "repeat": repeat, "heads": 32, "evaluations": 400,
         "uploads": uploads, "waits": waiting, "uploaded_bytes": 10, "search_seconds": seconds,
         "same_circuit": True, "peak_bytes": peak if gpu else None}
        for repeat in range(6)
        for placement, uploads, waiting, seconds, peak in (
            ("resident", 0, 0, 1.0, 100),
            ("on demand", 32, 32, 1.1, 60),
            ("prefetched", 32, waits, prefetched, 61),
        )
    ]  # fmt: skip


def test_every_claim_can_fail_and_can_hold():
    require_falsifiable(
        "pahq",
        failing={
            "pahq.runtime": {"speed": speed(high=1.05)},
            "pahq.memory": {"memory": memory(low=50)},
            "pahq.faithful": {"trained": trained(kl=2.0)},
            "pahq.high_head": {"trained": trained(pahq=1.1)},
            "pahq.ground_truth": {"ground_truth": ground_truth(full=0.7, pahq=0.7)},
            "pahq.thresholds": {"ground_truth": ground_truth(exact=3)},
            "pahq.release": {"ground_truth": ground_truth(released=0.95)},
            "pahq.linear": {"speed": speed(low=1.2)},
            "pahq.engine": {"speed": speed(share=0.6, search=5.0)},
            "pahq.activations": {"memory": memory(computed=40)},
            "pahq.scheduler": {"scheduler": scheduler(waits=32)},
            "pahq.other_methods": {"trained": trained(rank=-0.01)},
            "pahq.pretrained": {"pretrained": pretrained(agreement=0.5)},
        },
        holding={
            "pahq.runtime": {"speed": speed()},
            "pahq.memory": {"memory": memory()},
            "pahq.faithful": {"trained": trained()},
            "pahq.high_head": {"trained": trained()},
            "pahq.ground_truth": {"ground_truth": ground_truth()},
            "pahq.thresholds": {"ground_truth": ground_truth()},
            "pahq.release": {"ground_truth": ground_truth()},
            "pahq.linear": {"speed": speed()},
            "pahq.engine": {"speed": speed()},
            "pahq.activations": {"memory": memory(activations=50, computed=50)},
            "pahq.scheduler": {"scheduler": scheduler()},
            "pahq.other_methods": {"trained": trained()},
            "pahq.pretrained": {"pretrained": pretrained()},
        },
    )


def test_a_degenerate_search_is_no_comparison():
    from projects.pahq.claims import engine

    assert engine(speed=pd.DataFrame(speed())).verdict == "holds"
    assert engine(speed=pd.DataFrame(speed(kept=0))).verdict == "partly"
    assert engine(speed=pd.DataFrame(speed(apart=5))).verdict == "partly"


def test_counts_without_a_gpu_hold_in_part():
    from projects.pahq.claims import scheduler as claim

    assert claim(scheduler=pd.DataFrame(scheduler(gpu=False))).verdict == "partly"


FRAMES = {
    "ground_truth": ground_truth, "trained": trained, "pretrained": pretrained, "speed": speed,
    "memory": memory, "scheduler": scheduler,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("ground_truth", "ground_truth"), ("effects", "trained"), ("circuits", "trained"),
        ("ablation", "trained"), ("attribution", "trained"), ("pretrained", "pretrained"),
        ("speed", "speed"), ("steps", "speed"), ("memory", "memory"), ("scheduler", "scheduler"),
    ],
)  # fmt: skip
def test_tables_are_made_of_rows(name, rows):
    table = getattr(tables, name)(pd.DataFrame(FRAMES[rows]()))
    assert table.to_markdown().count("\n") > 5
    assert "nan" not in table.to_markdown()


def test_a_step_is_told_against_the_line_above():
    frame = tables.steps(pd.DataFrame(speed())).frame
    assert frame["saved"].iloc[0] == 0
    assert frame["saved"].iloc[1] == pytest.approx(1 - 1 / 9, abs=1e-3)
    assert frame["step"].iloc[1].startswith("9.00")


@pytest.mark.parametrize(
    ("name", "rows"), [("roc", "ground_truth"), ("effects", "trained"), ("steps", "speed")]
)
def test_figures_are_made_of_rows(name, rows):
    figure = getattr(figures, name)(pd.DataFrame(FRAMES[rows]()))
    assert figure.axes
    plt.close(figure)
