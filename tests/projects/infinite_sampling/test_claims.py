"""Every claim fails on rows that must fail it, and holds on rows that must hold it; in between it
says so.
"""

import pandas as pd
import pytest

from projects.infinite_sampling import claims
from shared.claims import require_falsifiable


def memory(
    micro: float = 25,
    peak: float = 30,
    framework: float = 25,
    formula: float = 25,
    grown: float = 1.0,
    full: float = 4.0,
) -> dict:
    base = {
        "model": "m",
        "group": 32,
        "slots": 8,
        "weight_bytes": 100,
        "prompt_tokens": 5,
        "max_new_tokens": 9,
    }
    modes = {
        "full group": (100, 100),
        "micro groups": (micro, peak),
        "continuous, fixed slots": (micro, peak),
        "full framework": (framework, peak),
    }
    rows = [
        {
            **base,
            "kind": "modes",
            "mode": mode,
            "kv_bytes": kv,
            "peak_bytes": p,
            "formula_bytes": formula,
        }
        for mode, (kv, p) in modes.items()
    ]
    for mode, factor in (("full group", full), ("micro groups", grown), ("full framework", grown)):
        for group, size in ((8, 1.0), (16, 10.0), (64, 10.0 * factor)):
            slots = group if mode == "full group" else 8
            rows.append(
                {
                    **base,
                    "kind": "groups",
                    "mode": mode,
                    "group": group,
                    "slots": slots,
                    "peak_bytes": size,
                }
            )
    return {"memory": rows}


def schedule(
    framework: float = 60,
    oracle: float = 52,
    wrong: int = 0,
    speed: float = 1.5,
    peer: float = 0.8,
    plan: float = 0.001,
    prompts: int = 8,
    cut: int = 0,
    live: int = 8,
    rounds: int = 6,
    arrival: float = 70,
    slow: float = 0.0,
    name: str = "schedule",
) -> dict:
    rows = []
    steps = {
        "micro groups": 100,
        "continuous, FIFO": arrival,
        "framework (predicted)": framework,
        "plan (oracle)": oracle,
    }
    common = {"model": "m", "group": 32, "slots": 8}
    for prompt in range(prompts):
        for one, count in steps.items():
            rows.append(
                {
                    **common,
                    "kind": "rollout",
                    "schedule": one,
                    "prompt": prompt,
                    "steps": count,
                    "replayed": count + wrong,
                    "lower_bound": 50,
                }
                | {
                    "occupancy_share": 0.9,
                    "reingests": 0,
                    "kv_bytes": 10,
                    "plan_seconds": plan,
                    "predict_seconds": 0.01,
                    "rollout_seconds": 1.0,
                    "truncated": cut,
                    "live": prompt < live,
                }
            )
    rates = {
        "micro groups": 1.0,
        "continuous, FIFO": 1.2,
        "framework (predicted)": speed,
        "generate, chunks": peer,
        "generate_batch": 0.5,
    }
    for repeat in range(rounds):
        rates["framework (predicted)"] = speed if repeat else speed - slow
        rows += [
            {
                **common,
                "kind": "time",
                "schedule": one,
                "repeat": repeat,
                "tokens_per_second": 100 * rate,
            }
            for one, rate in rates.items()
        ]
    return {name: rows}


def exactness(
    same: int = 10,
    redrawn: int = 10,
    difference: float = 1e-15,
    losses=("grpo", "dapo", "dr_grpo"),
    chance: int = 1,
    own: float = 0.3,
) -> dict:
    rows = []
    for dtype, fixed in (("float64", False), ("float32", True), ("float32", False)):
        row = {
            "kind": "completions",
            "dtype": dtype,
            "fixed_shape": fixed,
            "schedule": "s",
            "completions": 10,
        }
        rows.append(
            {
                **row,
                "same": same if dtype == "float64" or fixed else 9,
                "redrawn": None if fixed else redrawn,
            }
        )
        rows.append({**row, "schedule": "full group, another seed", "same": chance})
    rows.append({"kind": "own advantages", "dtype": "float64", "relative_difference_ratio": own})
    rows += [
        {
            "kind": "gradient",
            "dtype": "float64",
            "loss_type": loss,
            "micro_batch": 3,
            "relative_difference_ratio": difference,
        }
        for loss in losses
    ]
    return {"exactness": rows}


def theorems(violations: int = 0, instances: int = 20_000) -> dict:
    return {
        "theorems": [
            {"theorem": "a", "instances": instances, "violations": violations},
            {"theorem": "b", "instances": 9, "violations": None},
        ]
    }


def prediction(none: float = 0.0, few: float = 0.9, nothing: float = 8.0) -> dict:
    return {
        "prediction": [
            {
                "predictor": predictor,
                "pooled_tau_ratio": 0.3,
                "total_error_tokens": error,
                "prefix": k,
                "group_tau_ratio": tau,
            }
            for k, tau in ((0, none), (1, few), (8, 0.9))
            for predictor, error in (("transformer", 5.0), ("constant", nothing))
        ]
    }


def ablation(
    fifo=1.2, sjf=1.1, plan_sjf=1.05, plan_lpt=1.06, lpt=1.1, prompts=6, apart=0.0
) -> dict:
    """With `apart`, shortest first differs from prompt to prompt."""
    steps = {
        "fifo": fifo,
        "sjf_global": sjf,
        "lpt_global": lpt,
        "plan_sjf": plan_sjf,
        "plan_lpt": plan_lpt,
    }
    return {
        "ablation": [
            {
                "kind": "steps",
                "lengths": known,
                "refill": refill,
                "prompt": prompt,
                "steps": 100 * (value + (apart * (-1) ** prompt if "sjf" in refill else 0)),
                "lower_bound": 100,
            }
            for known in ("none", "k = 0", "k = 4", "oracle")
            for refill, value in steps.items()
            for prompt in range(prompts)
        ]
    }


def training(
    same: bool = True,
    last: float = 0.8,
    online: float = 1.0,
    frozen: float = 2.0,
    hooked: bool = True,
    peak: float = 20.0,
    framework: float = 0.9,
    full: float = 0.7,
    seeds: int = 5,
    chance: bool = False,
) -> dict:
    rows = []
    seconds = {"full group": full, "framework": framework, "TRL": 1.0, "TRL, this rollout": 1.1}
    for dtype in ("float64", "float32"):
        for mode in seconds:
            if dtype == "float64" and mode.startswith("TRL"):
                continue
            equal = {
                "full group": True,
                "framework": same,
                "TRL": chance,
                "TRL, this rollout": hooked,
            }[mode]
            times = {"rollout_seconds": 1.0, "step_seconds": 10 * seconds[mode]}
            for step in range(10):
                row = {
                    "kind": "step",
                    "dtype": dtype,
                    "mode": mode,
                    "step": step,
                    "same_rewards": equal or step < 9,
                    **times,
                }
                row |= {
                    "length_tokens": 10.0,
                    "kv_bytes": None,
                    "steps": None,
                    "mismatch_ratio": None,
                }
                row |= {"frozen_error_tokens": frozen, "online_error_tokens": online}
                rows.append({**row, "seed": step % seeds})
            for kind in ("pool", "held out"):
                for step, score in ((0, 0.3), (4, last)):
                    row = {
                        "kind": "evaluation",
                        "dtype": dtype,
                        "mode": mode,
                        "step": step,
                        "prompts": kind,
                    }
                    rows.append({**row, "reward_score": score})
            bytes_ = {
                "rollout_peak_bytes": peak if mode == "TRL, this rollout" else 100.0,
                "step_peak_bytes": 100.0,
            }
            rows.append({"kind": "memory", "dtype": dtype, "mode": mode, **bytes_})
    return {"training": rows}


def test_every_claim_can_fail_and_can_hold():
    failing = {
        "memory": memory(micro=60),
        "equal_memory": memory(framework=26),
        "group_size": memory(grown=1.2),
        "steps": schedule(framework=100),
        "near_oracle": schedule(oracle=60, framework=80),
        "throughput": schedule(speed=0.9),
        "pretrained": schedule(framework=100, speed=0.9, name="pretrained"),
        "peers": schedule(speed=0.4),
        "exact": exactness(same=9),
        "gradient": exactness(difference=1e-9),
        "theorems": theorems(violations=1),
        "plan_time": schedule(plan=0.1),
        "prediction": prediction(few=0.2),
        "shortest_first": ablation(sjf=1.3, plan_sjf=1.2),
        "training": training(same=False),
        "drift": training(online=3.0),
        "trl_rollout": training(hooked=False, peak=80.0),
        "trl_time": training(framework=1.4, full=1.2),
    }
    holding = {
        "memory": memory(),
        "equal_memory": memory(),
        "group_size": memory(),
        "steps": schedule(),
        "near_oracle": schedule(framework=55),
        "throughput": schedule(),
        "pretrained": schedule(name="pretrained"),
        "peers": schedule(),
        "exact": exactness(),
        "gradient": exactness(),
        "theorems": theorems(),
        "plan_time": schedule(),
        "prediction": prediction(),
        "shortest_first": ablation(),
        "training": training(),
        "drift": training(),
        "trl_rollout": training(),
        "trl_time": training(),
    }
    prefixed = [
        {f"infinite_sampling.{name}": rows for name, rows in given.items()}
        for given in (failing, holding)
    ]
    require_falsifiable("infinite_sampling", *prefixed)


@pytest.mark.parametrize(
    ("check", "rows", "wanted"),
    [
        ("memory", memory(peak=60), "partly"),
        ("equal_memory", memory(formula=26), "partly"),
        ("group_size", memory(full=1.5), "partly"),
        ("steps", schedule(framework=80), "partly"),
        ("steps", schedule(prompts=3), "partly"),
        ("steps", schedule(arrival=60), "partly"),
        ("steps", schedule(wrong=1), "fails"),
        ("near_oracle", schedule(framework=80), "partly"),
        ("near_oracle", schedule(framework=55, arrival=55), "partly"),
        ("near_oracle", schedule(framework=55, prompts=4), "partly"),
        ("throughput", schedule(speed=1.1), "partly"),
        ("throughput", schedule(slow=0.3), "partly"),
        ("throughput", schedule(rounds=5), "partly"),
        ("pretrained", schedule(framework=90, name="pretrained"), "partly"),
        ("pretrained", schedule(speed=1.1, name="pretrained"), "partly"),
        ("pretrained", schedule(live=1, name="pretrained"), "partly"),
        ("peers", schedule(speed=0.7), "partly"),
        ("exact", exactness(redrawn=9), "fails"),
        ("exact", exactness(chance=10), "partly"),
        ("gradient", exactness(own=1e-9), "partly"),
        ("gradient", exactness(losses=("grpo",)), "partly"),
        ("gradient", exactness(difference=float("nan")), "fails"),
        ("theorems", theorems(instances=100), "partly"),
        ("plan_time", schedule(plan=0.03), "partly"),
        ("prediction", prediction(none=0.1), "partly"),
        ("prediction", prediction(nothing=4.0), "fails"),
        ("shortest_first", ablation(plan_sjf=1.2), "fails"),
        ("shortest_first", ablation(lpt=1.0), "fails"),
        ("shortest_first", ablation(plan_sjf=1.1, apart=0.2), "partly"),
        ("shortest_first", ablation(sjf=1.3, prompts=3), "partly"),
        ("training", training(last=0.2), "partly"),
        ("training", training(chance=True), "partly"),
        ("drift", training(seeds=1), "partly"),
        ("trl_rollout", training(hooked=False), "partly"),
        ("trl_rollout", training(peak=80.0), "partly"),
        ("trl_time", training(framework=1.4), "partly"),
    ],
)
def test_in_between_a_claim_says_so(check, rows, wanted):
    frames = {name: pd.DataFrame(value) for name, value in rows.items()}
    assert getattr(claims, check)(**frames).verdict == wanted


def test_without_the_rows_that_decide_nothing_is_said():
    rows = [row for row in schedule()["schedule"] if "generate" not in row["schedule"]]
    assert claims.peers(pd.DataFrame(rows)).verdict == "not tested here"
    rows = [row for row in training()["training"] if not row["mode"].startswith("TRL")]
    for check in (claims.trl_rollout, claims.trl_time):
        assert check(pd.DataFrame(rows)).verdict == "not tested here"
        assert (
            check(pd.DataFrame([row for row in rows if row["dtype"] == "float64"])).verdict
            == "not tested here"
        )
    rows = [{**row, "rollout_peak_bytes": None} for row in training()["training"]]
    assert claims.trl_rollout(pd.DataFrame(rows)).verdict == "not tested here"
    rows = [row for row in exactness()["exactness"] if not row.get("fixed_shape")]
    assert claims.exact(pd.DataFrame(rows)).verdict == "not tested here"


def test_what_a_verdict_says_is_what_was_measured():
    assert (
        claims.throughput(pd.DataFrame(schedule()["schedule"])).measured
        == "1.50x (1.50 to 1.50), m"
    )
    assert claims.steps(pd.DataFrame(schedule()["schedule"])).measured.startswith(
        "100.0 to 60.0 steps (-40%) over 8 prompts, order of arrival 70.0; 32 of 32"
    )
    assert (
        "16 of 20 identical" in claims.exact(pd.DataFrame(exactness(same=8)["exactness"])).measured
    )
