"""Every claim of IDP has rows on which it fails and rows on which it holds; and what must decide
between the two.
"""

import numpy as np
import pandas as pd
import pytest

from projects.idp import claims
from projects.idp.labels import FAR, GREY, METHODS, NEAR
from projects.idp.tables import mean, shown
from shared.claims import require_falsifiable

TARGETS = (*NEAR, *GREY, *FAR)
COUNTS = dict.fromkeys(METHODS, 40)


def tasks(tasks=60, one=0, five=20, **gain):
    """Rows of `main`: counts of 75, a few more or fewer from task to task, `one` and `five` more by
    shots, and `gain` by method.
    """
    return [
        {
            "target": target,
            "shots": shots,
            "task": task,
            "queries": 75,
            **{
                name: count + task % 3 + more + gain.get(name, 0) * (1 + task % 2)
                for name, count in COUNTS.items()
            },
        }
        for target in TARGETS
        for shots, more in ((1, one), (5, five))
        for task in range(tasks)
    ]


def domains(errors, between=True, near_error=0.15, networks=5):
    """Rows of `proxies`; `errors` of the targets that are not the nearest."""
    found = []
    for kind in ("clustered", "random"):
        control = kind == "random"
        for draw, network in ((d, n) for d in range(5) for n in range(networks)):
            for name, error in [
                ("source", 0.1),
                ("quickdraw", near_error),
                *zip(TARGETS[1:], errors, strict=True),
            ]:
                found.append(
                    {
                        "domain": name,
                        "network": network,
                        "codebook": kind,
                        "rows": 9,
                        "draw": draw,
                        "error_ratio": error + 1e-4 * (draw + network) * (1 + len(name) % 3),
                        "centred_ratio": error,
                        "cosine_ratio": 0.9,
                        "dimension_ratio": 0.1,
                        "moments_target_source_ratio": 5.0,
                        "moments_proxy_source_ratio": 4.0 if between and not control else 6.0,
                        "moments_proxy_target_ratio": 4.0,
                    }
                )
    return found


def with_learned(error, default):
    rows = domains([default] * 7)
    learned = [
        {**row, "codebook": "learned", "rows": 320, "error_ratio": error, "dimension_ratio": 0.99}
        for row in rows
        if row["codebook"] == "clustered"
    ]
    return [*rows, *learned]


def settings(gain=0, released=0, tasks=40):
    return [
        {
            "target": target,
            "shots": 1,
            "task": task,
            "what": what,
            "value": value,
            "queries": 75,
            "right": 40 + task % 3 + more * (1 + task % 2),
            "dimension_ratio": 0.1,
        }
        for target in ("mnist", "photos")
        for what, value, more in (
            ("default", "", gain),
            ("steps", "0", 0),
            ("losses", "T", 0),
            ("released", "random class codebooks", released),
        )
        for task in range(tasks)
    ]


def times(alone=2.0, once=1.0, single=0.3, trained=500, same=1.0, rounds=6):
    return [
        {
            "target": "mnist",
            "shots": shots,
            "way": way,
            "repeat": repeat,
            "core_seconds": seconds * (1 + 0.01 * repeat),
            "tasks": 8,
            "single_steps": 20,
            "trained": trained,
            "parameters": 50_000,
            "same_share": same,
        }
        for shots in (1, 5)
        for way, seconds in (
            ("one at a time", alone),
            ("many at once", once),
            ("one task, all steps", single),
        )
        for repeat in range(rounds)
    ]


HOLDING = {
    "idp.gain": {"main": tasks(idp=3)},
    "idp.proxies_pay": {"main": tasks(idp=3)},
    "idp.transductive": {"main": tasks(idp_batch=3)},
    "idp.ridge": {"main": tasks(ridge=3)},
    "idp.chance": {"main": tasks()},
    "idp.shots": {"main": tasks()},
    "idp.content": {"proxies": domains([0.2, 0.21, 0.22, 0.23, 0.24, 0.25, 0.26])},
    "idp.style": {"proxies": domains([0.2] * 7)},
    "idp.codebook": {"proxies": with_learned(0.001, 0.2)},
    "idp.losses": {"ablation": settings(gain=2)},
    "idp.noise": {"ablation": settings(gain=2)},
    "idp.cost": {"cost": times()},
    "idp.together": {"cost": times()},
}
FAILING = {
    "idp.gain": {"main": tasks(ridge=1)},
    "idp.proxies_pay": {"main": tasks()},
    "idp.transductive": {"main": tasks(ridge_batch=1)},
    "idp.ridge": {"main": tasks(nearest_mean=1)},
    "idp.chance": {"main": [{**row, **dict.fromkeys(METHODS, 15)} for row in tasks()]},
    "idp.shots": {"main": tasks(one=20, five=0)},
    "idp.content": {"proxies": domains([0.1] * 7)},
    "idp.style": {"proxies": domains([0.2] * 7, between=False)},
    "idp.codebook": {"proxies": with_learned(0.2, 0.2)},
    "idp.losses": {"ablation": settings()},
    "idp.noise": {"ablation": settings(released=1)},
    "idp.cost": {"cost": times(single=0.9, trained=30_000)},
    "idp.together": {"cost": times(alone=0.9)},
}


def test_every_claim_can_fail_and_can_hold():
    require_falsifiable("idp", failing=FAILING, holding=HOLDING)


@pytest.mark.parametrize("name", ["gain", "proxies_pay", "transductive", "ridge_head", "chance"])
def test_few_tasks_decide_nothing(name):
    check = getattr(claims, name)
    assert check(pd.DataFrame(tasks(tasks=20, idp=3))).verdict == "not tested here"


def test_a_gain_in_some_cells_is_partly_unless_as_many_lose():
    frame = pd.DataFrame(tasks())
    up, down = frame["target"].isin(["mnist", "digits"]), frame["target"].isin(["photos", "emoji"])
    some = frame.assign(idp=frame["idp"] + 3 * up + up * (frame["task"] % 2))
    assert claims.gain(some).verdict == "partly"  # a quarter of the cells
    one = frame["target"] == "mnist"
    fewer = frame.assign(idp=frame["idp"] + 3 * one + one * (frame["task"] % 2))
    assert claims.gain(fewer).verdict == "fails"
    assert claims.gain(some).measured.endswith("without proxies: 0 above, 0 below")
    both = some.assign(idp=some["idp"] - 3 * down - down * (frame["task"] % 2))
    assert claims.gain(both).verdict == "fails"


def test_style_between_means_nothing_where_a_random_codebook_does_it():
    rows = domains([0.2] * 7)
    alike = [{**row, "moments_proxy_source_ratio": 4.0} for row in rows]
    assert claims.style(pd.DataFrame(alike)).verdict == "fails"


def test_the_mean_alone_makes_content_partly():
    rows = pd.DataFrame(domains([0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3]))
    assert claims.content(rows).verdict == "partly"
    few = rows[(rows["draw"] < 3) & (rows["network"] == 0)]
    assert claims.content(few).verdict == "not tested here"


def test_one_source_network_is_partly():
    rows = pd.DataFrame(domains([0.2, 0.21, 0.22, 0.23, 0.24, 0.25, 0.26], networks=1))
    assert claims.content(rows).verdict == claims.style(rows).verdict == "partly"


def test_without_known_targets_content_and_style_say_nothing():
    rows = pd.DataFrame(domains([0.2] * 7))
    other = rows[rows["domain"] == "source"]
    assert claims.content(other).verdict == claims.style(other).verdict == "not tested here"


def test_a_speed_with_other_answers_is_none():
    assert claims.together(pd.DataFrame(times(same=0.9))).verdict == "fails"
    assert claims.together(pd.DataFrame(times(alone=1.2))).verdict == "partly"
    assert claims.together(pd.DataFrame(times(rounds=3))).verdict == "not tested here"


def test_cheap_by_one_measure_is_partly():
    assert claims.cost(pd.DataFrame(times(single=0.9))).verdict == "partly"


def test_the_interval_is_the_fields():
    """1.96 standard deviations / √n of a known list."""
    found = mean([0.2, 0.4, 0.6, 0.8])
    half = 1.96 * np.sqrt(0.2 / 3) / 2
    assert found.value == pytest.approx(0.5)
    assert found.high - found.value == pytest.approx(half)
    assert shown(found) == f"50.0 ± {100 * half:.1f}"
