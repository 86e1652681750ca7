"""Every claim of SSCBM fails on rows that must fail it, and holds on rows that must hold it; in
between it says so.
"""

import pandas as pd
import pytest

from projects.sscbm import claims, labels
from shared.claims import require_falsifiable

NOISE = (0.004, -0.004, 0.002, -0.002, 0.0)  # by seed, so that intervals have a width
LEVELS = {  # concepts and classes
    labels.MAJORITY: (0.70, 0.10),
    labels.KNN: (0.85, 0.60),
    labels.LABELLED_ONLY: (0.86, 0.60),
    labels.NO_PSEUDO: (0.90, 0.80),
    labels.CBM_SSL: (0.88, 0.75),
    labels.CEM_SSL: (0.90, 0.78),
    labels.FIXMATCH: (0.90, 0.78),
    labels.SSCBM: (0.94, 0.82),
    labels.SSCBM_LABELED: (0.88, 0.65),
    labels.CBM_FULL: (0.90, 0.80),
    labels.CEM_FULL: (0.95, 0.84),
}


def main(seeds=5, sets=("fashion", "strokes"), agreement=0.9, **changed):
    """Rows of `main`; `changed` are levels by a name of `labels`."""
    levels = {**LEVELS, **{getattr(labels, name): value for name, value in changed.items()}}
    return [
        {
            "dataset": dataset,
            "seed": seed,
            "method": method,
            "labelled_share": 0.1,
            "agreement_share": agreement,
            "concept_accuracy": concepts + NOISE[seed] * (method == labels.SSCBM),
            "task_accuracy": task + NOISE[seed] * (method == labels.SSCBM),
        }
        for dataset in sets
        for seed in range(seeds)
        for method, (concepts, task) in levels.items()
    ]


def ratios(seeds=5, concepts=(0.90, 0.92, 0.96), task=0.80, alone=0.60):
    rows = []
    for dataset in ("fashion", "strokes"):
        for share, level in zip((0.01, 0.05, 0.2), concepts, strict=True):
            for seed in range(seeds):
                common = {
                    "dataset": dataset, "seed": seed, "ratio_share": share, "labelled_share": share,
                }  # fmt: skip
                for method, right in ((labels.SSCBM, task), (labels.LABELLED_ONLY, alone)):
                    rows.append(
                        {
                            **common,
                            "method": method,
                            "concept_accuracy": level + NOISE[seed],
                            "task_accuracy": right - NOISE[seed] / 2,
                        }
                    )
    return rows


def interventions(seeds=5, right=(0.8, 0.85, 0.9), wrong=0.5):
    return [
        {
            "dataset": dataset,
            "seed": seed,
            "method": labels.SSCBM,
            "order": labels.RANDOM_ORDER,
            "expert": expert,
            "told_share": share,
            "task_accuracy": value + NOISE[seed] * share,
        }
        for dataset in ("fashion", "strokes")
        for seed in range(seeds)
        for expert, values in (
            (labels.RIGHT, right),
            (labels.WRONG, (right[0], (right[0] + wrong) / 2, wrong)),
        )
        for share, value in zip((0.0, 0.5, 1.0), values, strict=True)
    ]


def saliency(seeds=5, aligned=0.64, untrained=0.49, ink=0.5):
    return [
        {"seed": seed, "variant": variant, "pointing_accuracy": value + noise * NOISE[seed]}
        for seed in range(seeds)
        for variant, value, noise in (
            (labels.INK, ink, 0),
            (labels.UNTRAINED_MAP, untrained, -1),
            (labels.ALIGNED, aligned, 1),
            (labels.TRUE_PSEUDO, 0.7, 1),
        )
    ]


def ablation(seeds=5, faulty=0.7):
    common = [
        {"dataset": dataset, "seed": seed, "variant": labels.AS_RELEASED}
        for dataset in ("fashion", "strokes")
        for seed in range(seeds)
    ]
    return [
        *(
            {**one, "kind": "labels", "agreement_share": faulty + NOISE[one["seed"]]}
            for one in common
        ),
        *({**one, "kind": "training", "concept_accuracy": 0.9} for one in common),
    ]


def cost(step=1.1, seconds=15.0, peak=4e8, queries=50_000):
    rows = [
        {"kind": "step", "method": method, "repeat": repeat, "work_seconds": value}
        for method, value in ((labels.CEM, 1.0), (labels.SSCBM, step))
        for repeat in range(12)
    ]
    search = {"kind": "neighbours", "queries": queries, "labelled": 5000, "work_seconds": seconds}
    return [*rows, {**search, "peak_bytes": peak, "features_bytes": 2.56e8}]


HOLDING = {
    "sscbm.headline": {"main": main()},
    "sscbm.unlabelled": {"main": main(), "ratios": ratios()},
    "sscbm.alignment": {"main": main()},
    "sscbm.baselines": {"main": main()},
    "sscbm.pseudo": {"main": main()},
    "sscbm.ratio": {"main": main(), "ratios": ratios()},
    "sscbm.interventions": {"interventions": interventions()},
    "sscbm.saliency": {"saliency": saliency()},
    "sscbm.released": {"ablation": ablation(), "main": main()},
    "sscbm.cost": {"cost": cost()},
}
FAILING = {
    "sscbm.headline": {"main": main(CEM_FULL=(0.99, 0.84))},
    "sscbm.unlabelled": {
        "main": main(LABELLED_ONLY=(0.86, 0.73)),
        "ratios": ratios(alone=0.71),
    },
    "sscbm.alignment": {"main": main(NO_PSEUDO=(0.945, 0.80))},
    "sscbm.baselines": {"main": main(CBM_SSL=(0.95, 0.83), CEM_SSL=(0.95, 0.83))},
    "sscbm.pseudo": {"main": main(KNN=(0.69, 0.6))},
    "sscbm.ratio": {"main": main(), "ratios": ratios(concepts=(0.94, 0.92, 0.93))},
    "sscbm.interventions": {"interventions": interventions(right=(0.8, 0.78, 0.75))},
    "sscbm.saliency": {"saliency": saliency(aligned=0.47)},
    "sscbm.released": {"ablation": ablation(faulty=0.95), "main": main()},
    "sscbm.cost": {"cost": cost(step=1.4, seconds=40.0)},
}


def test_every_claim_can_fail_and_can_hold():
    require_falsifiable("sscbm", failing=FAILING, holding=HOLDING)


def judged(name, **rows):
    return getattr(claims, name)(**{key: pd.DataFrame(value) for key, value in rows.items()})


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("headline", {"main": main(NO_PSEUDO=(0.945, 0.8))}),
        ("unlabelled", {"main": main(), "ratios": ratios(alone=0.75)}),
        ("baselines", {"main": main(CEM_SSL=(0.95, 0.83))}),
        ("ratio", {"main": main(), "ratios": ratios(concepts=(0.90, 0.95, 0.96))}),
        ("saliency", {"saliency": saliency(ink=0.7)}),
        ("cost", {"cost": cost(step=1.4)}),
        ("cost", {"cost": cost(peak=2e9)}),
    ],
)
def test_some_of_a_claim_is_partly(name, rows):
    assert judged(name, **rows).verdict == "partly"


def test_an_expert_whose_every_word_harms_on_the_way_is_no_gain():
    assert (
        judged("interventions", interventions=interventions(right=(0.8, 0.7, 0.9))).verdict
        == "fails"
    )


@pytest.mark.parametrize("name", [name.split(".")[1] for name in HOLDING if name != "sscbm.cost"])
def test_too_few_seeds_decide_nothing(name):
    made = {"main": main, "ratios": ratios, "interventions": interventions, "saliency": saliency,
            "ablation": ablation}  # fmt: skip
    few = {key: made[key](seeds=4) for key in HOLDING[f"sscbm.{name}"]}
    assert judged(name, **few).verdict == "not tested here"


def test_fewer_images_than_were_promised_decide_nothing():
    assert judged("cost", cost=cost(queries=1000)).verdict == "not tested here"
