"""SSCBM's claims, each bound to a check over measured rows. Differences are paired by seed, with a
95 % interval.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from projects.sscbm import labels
from projects.sscbm.labels import (
    AS_RELEASED,
    CBM_SSL,
    CEM_SSL,
    FIXMATCH,
    FULLY_SUPERVISED,
    LABELLED_ONLY,
    NO_PSEUDO,
    RIGHT,
    SSCBM,
    SSCBM_LABELED,
    WRONG,
)
from projects.sscbm.tables import paired, points, step_ratio, with_main
from shared.claims import Verdict, VerdictWord, claim
from shared.statistics import Mean, mean_interval
from shared.tables import paper_numbers

SEEDS = 5  # fewer give no interval worth the name
GAIN = 0.10  # over CEM on annotated images alone, in shares
STEP = 1.25  # a step of SSCBM over one of CEM
SEARCH_SECONDS, SEARCH_BYTES = 30.0, 1e9
_HEADLINE = paper_numbers("sscbm", "headline").set_index("quantity")["value"]
_CONCEPTS_LOST, _TASK_LOST = (float(value) for value in _HEADLINE)
UNKNOWN = "paper value not available"
FEW = Verdict("not tested here", f"fewer than {SEEDS} seeds")


def _enough(rows: pd.DataFrame) -> bool:
    return int(rows["seed"].nunique()) >= SEEDS


def _count(right: int, of: int) -> VerdictWord:
    return "holds" if right == of else "partly" if right else "fails"


def _by_set(
    rows: pd.DataFrame, column: str, first: str, second: str, label: str = "method"
) -> dict[str, Mean]:
    """Differences by seed, for each set that has both."""
    return {
        str(name): paired(one, column, first, second, label)
        for name, one in rows.groupby("dataset", sort=False)
        if {first, second} <= set(one[label])
    }


def _told(found: dict[str, Mean]) -> str:
    return ", ".join(f"{name} {points(value)}" for name, value in found.items())


@claim(
    id="sscbm.headline",
    claim=(
        "With a tenth of the images annotated, accuracies are close to those of the best fully"
        " supervised model: on average over four data sets 2.44 points below in concepts and 3.93"
        " in classes."
    ),
    source="abstract, version 3",
    bound=(
        "means over the sets, best fully supervised model of a set less SSCBM, no more than the"
        " paper's with their upper ends, over at least 5 seeds; and SSCBM above the null, the same"
        " network without pseudo labels, in concepts with its interval; partly: without the latter"
    ),
    paper=f"{100 * _CONCEPTS_LOST:.2f} points in concepts, {100 * _TASK_LOST:.2f} in classes",
    needs="rows of sscbm/main with at least 5 seeds",
)
def headline(main: pd.DataFrame) -> Verdict:
    if not _enough(main):
        return FEW
    lost = {column: _lost(main, column) for column in ("concept_accuracy", "task_accuracy")}
    over = _mean_over_sets(main, "concept_accuracy", SSCBM, NO_PSEUDO)
    close = (
        lost["concept_accuracy"].high <= _CONCEPTS_LOST and lost["task_accuracy"].high <= _TASK_LOST
    )
    word: VerdictWord = "fails" if not close else "holds" if over.low > 0 else "partly"
    return Verdict(
        word,
        f"lost {points(lost['concept_accuracy'])} in concepts, {points(lost['task_accuracy'])} in"
        f" classes; over the same network without pseudo labels {points(over, 2)} in concepts",
    )


def _lost(main: pd.DataFrame, column: str) -> Mean:
    """What SSCBM loses against the fully supervised model that is the better one on a set, a mean
    over the sets for each seed.
    """
    found = []
    for _, rows in main.groupby("dataset"):
        values = rows.pivot(index="seed", columns="method", values=column)
        best = values[list(FULLY_SUPERVISED)].mean().idxmax()
        found.append(values[best] - values[SSCBM])
    return mean_interval(pd.concat(found, axis=1).mean(axis=1))


def _mean_over_sets(main: pd.DataFrame, column: str, first: str, second: str) -> Mean:
    found = []
    for _, rows in main.groupby("dataset"):
        values = rows.pivot(index="seed", columns="method", values=column)
        found.append(values[first] - values[second])
    return mean_interval(pd.concat(found, axis=1).mean(axis=1))


@claim(
    id="sscbm.unlabelled",
    claim=(
        "Images without annotations help: SSCBM is far above a concept model that is trained on the"
        " annotated images alone."
    ),
    source="abstract, introduction (figure 1)",
    bound=(
        "classes, SSCBM less CEM on annotated images with as many steps, more than 10 points with"
        " the lower end of the interval over at least 5 seeds, on every set at 5 and 10 %; partly:"
        " on some"
    ),
    paper=UNKNOWN,
    needs="rows of sscbm/main and sscbm/ratios with at least 5 seeds",
)
def unlabelled(main: pd.DataFrame, ratios: pd.DataFrame) -> Verdict:
    if not (_enough(main) and _enough(ratios)):
        return FEW
    at_five = ratios[np.isclose(ratios["ratio_share"], 0.05)]
    gains = {
        **{
            f"{name} at 10 %": value
            for name, value in _by_set(main, "task_accuracy", SSCBM, LABELLED_ONLY).items()
        },
        **{
            f"{name} at 5 %": value
            for name, value in _by_set(at_five, "task_accuracy", SSCBM, LABELLED_ONLY).items()
        },
    }
    without = _mean_over_sets(main, "task_accuracy", NO_PSEUDO, LABELLED_ONLY)
    hidden = _mean_over_sets(main, "task_accuracy", SSCBM_LABELED, LABELLED_ONLY)
    return Verdict(
        _count(sum(gain.low > GAIN for gain in gains.values()), len(gains)),
        f"{_told(gains)}. The class labels buy it: with them and no pseudo labels"
        f" {points(without)}, with pseudo labels and the class labels of annotated images alone"
        f" {points(hidden)}",
    )


@claim(
    id="sscbm.alignment",
    claim="Pseudo labels, by way of the alignment loss, make the concepts better.",
    source="abstract; ablation",
    bound=(
        "concepts, SSCBM less the same network with all class labels and no pseudo labels, above 0"
        " with its interval over at least 5 seeds on every set; partly: on some"
    ),
    paper=UNKNOWN,
    needs="rows of sscbm/main with at least 5 seeds",
)
def alignment(main: pd.DataFrame) -> Verdict:
    if not _enough(main):
        return FEW
    gains = _by_set(main, "concept_accuracy", SSCBM, NO_PSEUDO)
    return Verdict(_count(sum(gain.low > 0 for gain in gains.values()), len(gains)), _told(gains))


@claim(
    id="sscbm.baselines",
    claim=(
        "SSCBM is better than concept models that take the pseudo labels as targets (CBM+SSL,"
        " CEM+SSL)."
    ),
    source="main table",
    bound=(
        "concepts and classes, SSCBM less each of the two, above 0 with their intervals over at"
        " least 5 seeds on every set; partly: in some of these"
    ),
    paper=UNKNOWN,
    needs="rows of sscbm/main with at least 5 seeds",
)
def baselines(main: pd.DataFrame) -> Verdict:
    if not _enough(main):
        return FEW
    better, worse, cells, told = 0, 0, 0, []
    for baseline in (CBM_SSL, CEM_SSL, FIXMATCH):
        means = []
        for column, what in (("concept_accuracy", "concepts"), ("task_accuracy", "classes")):
            gains = _by_set(main, column, SSCBM, baseline)
            means.append(f"{what} {points(_mean_over_sets(main, column, SSCBM, baseline))}")
            if baseline != FIXMATCH:  # ours, for comparison; the paper does not name it
                better += sum(gain.low > 0 for gain in gains.values())
                worse += sum(gain.high < 0 for gain in gains.values())
                cells += len(gains)
        told.append(f"less {baseline}: {', '.join(means)}")
    return Verdict(
        _count(better, cells),
        f"better in {better}, worse in {worse} of {cells} cells; means over the sets, "
        + "; ".join(told),
    )


@claim(
    id="sscbm.pseudo",
    claim="Neighbours in a frozen feature space give useful concept labels.",
    source="method, pseudo labels",
    bound=(
        "concepts of test images by their neighbours less the majority's, above 0 with its interval"
        " over at least 5 seeds on every set; partly: on some"
    ),
    paper=UNKNOWN,
    needs="rows of sscbm/main with at least 5 seeds",
)
def pseudo(main: pd.DataFrame) -> Verdict:
    if not _enough(main):
        return FEW
    gains = _by_set(main, "concept_accuracy", labels.KNN, labels.MAJORITY)
    return Verdict(_count(sum(gain.low > 0 for gain in gains.values()), len(gains)), _told(gains))


@claim(
    id="sscbm.ratio",
    claim="More annotations make the concepts better.",
    source="main table; figure 1",
    bound=(
        "concepts of SSCBM rise from each share to the next on every set, and from the smallest to"
        " the largest by more than 0 with the interval over at least 5 seeds; partly: the latter on"
        " some sets"
    ),
    paper="trained on annotated images alone, CUB: 78.31 % at 1 % to 96.39 % at 100 %",
    needs="rows of sscbm/main and sscbm/ratios with at least 5 seeds",
)
def ratio(main: pd.DataFrame, ratios: pd.DataFrame) -> Verdict:
    if not (_enough(main) and _enough(ratios)):
        return FEW
    rows = with_main(ratios, main)
    rows = rows[rows["method"] == SSCBM]
    rising, gained, told = [], [], []
    for name, one in rows.groupby("dataset", sort=False):
        means = one.groupby("ratio_share")["concept_accuracy"].mean()
        ends = one[one["ratio_share"].isin([means.index[0], means.index[-1]])]
        first, last = means.index[0], means.index[-1]
        gain = paired(ends, "concept_accuracy", last, first, "ratio_share")
        rising.append(bool((means.diff().dropna() > 0).all()))
        gained.append(gain.low > 0)
        steps = ", ".join(f"{100 * value:.1f}" for value in means)
        told.append(f"{name} {steps} % from {first:.0%} to {last:.0%} ({points(gain)})")
    word = "holds" if all(rising) and all(gained) else "partly" if any(gained) else "fails"
    return Verdict(word, "; ".join(told))  # type: ignore[arg-type]


@claim(
    id="sscbm.interventions",
    claim=(
        "An expert who corrects concepts at test time makes the classes better, the more concepts"
        " the better."
    ),
    source="interventions, figure (version 1)",
    bound=(
        "classes of SSCBM with all groups told right less none told above 0 with its interval over"
        " at least 5 seeds on every set, no step down by more than a point between stops (means,"
        " random order), and told wrong below 0; partly: on some sets"
    ),
    paper="CUB 84.85 to 96.11 %, AwA2 68.03 to 98.16 %",
    needs="rows of sscbm/interventions with at least 5 seeds",
)
def interventions(interventions: pd.DataFrame) -> Verdict:
    if not _enough(interventions):
        return FEW
    own = interventions[
        (interventions["method"] == SSCBM) & (interventions["order"] == labels.RANDOM_ORDER)
    ]
    right, told = 0, []
    for name, rows in own.groupby("dataset", sort=False):
        ends = rows[rows["told_share"].isin([0.0, 1.0])]
        changes = {
            expert: paired(ends[ends["expert"] == expert], "task_accuracy", 1.0, 0.0, "told_share")
            for expert in (RIGHT, WRONG)
        }
        means = rows[rows["expert"] == RIGHT].groupby("told_share")["task_accuracy"].mean()
        steady = bool((means.diff().dropna() >= -0.01).all())
        right += changes[RIGHT].low > 0 and changes[WRONG].high < 0 and steady
        told.append(
            f"{name} {100 * means.iloc[0]:.1f} to {100 * means.iloc[-1]:.1f} %"
            f" ({points(changes[RIGHT])}; wrong {points(changes[WRONG])}"
            f"{'' if steady else '; not steadily'})"
        )
    return Verdict(_count(right, len(told)), "; ".join(told))


@claim(
    id="sscbm.saliency",
    claim="Heat maps show where a concept is: the alignment makes their peaks trustworthy.",
    source="abstract; trustworthiness of concept saliency",
    bound=(
        "share of peaks in the digit's quadrant: SSCBM less no alignment, and less a random pixel"
        " of ink, above 0 with their intervals over at least 5 seeds; partly: one of the two"
    ),
    paper=UNKNOWN,
    needs="rows of sscbm/saliency with at least 5 seeds",
)
def saliency(saliency: pd.DataFrame) -> Verdict:
    if not _enough(saliency):
        return FEW
    gains = {
        name: paired(saliency, "pointing_accuracy", labels.ALIGNED, name, "variant")
        for name in (labels.UNTRAINED_MAP, labels.INK)
    }
    means = saliency.groupby("variant")["pointing_accuracy"].mean()
    oracle = means.get(labels.TRUE_PSEUDO)
    more = "" if oracle is None else f"; with true concepts as pseudo labels {100 * oracle:.1f} %"
    return Verdict(
        _count(sum(gain.low > 0 for gain in gains.values()), 2),
        f"{100 * means[labels.ALIGNED]:.1f} %; less no alignment"
        f" {points(gains[labels.UNTRAINED_MAP])}, less ink {points(gains[labels.INK])}{more}",
    )


@claim(
    id="sscbm.released",
    claim=(
        "(Ours, not the paper's.) The pseudo labels of the public code are worse than those that"
        " the method describes."
    ),
    source="found in the public code",
    bound=(
        "hidden concepts that pseudo labels are right about: corrected less as released, above 0"
        " with its interval over at least 5 seeds on every set; partly: on some"
    ),
    needs="rows of sscbm/ablation and sscbm/main with at least 5 seeds",
)
def released(ablation: pd.DataFrame, main: pd.DataFrame) -> Verdict:
    if not _enough(ablation):
        return FEW
    made = ablation[(ablation["kind"] == "labels") & (ablation["variant"] == AS_RELEASED)]
    corrected = main[(main["method"] == SSCBM) & main["dataset"].isin(made["dataset"])]
    both = pd.concat([made, corrected.assign(variant=labels.CORRECTED)])
    gains = _by_set(both, "agreement_share", labels.CORRECTED, AS_RELEASED, "variant")
    trained = pd.concat(
        [
            ablation[ablation["kind"] == "training"],
            corrected.assign(variant=labels.CORRECTED),
        ]
    )
    concepts = _by_set(trained, "concept_accuracy", labels.CORRECTED, AS_RELEASED, "variant")
    return Verdict(
        _count(sum(gain.low > 0 for gain in gains.values()), len(gains)),
        f"{_told(gains)}; concepts of SSCBM trained with them {_told(concepts)}",
    )


@claim(
    id="sscbm.cost",
    claim="(Ours, not the paper's.) The alignment and the pseudo labels cost little.",
    source="measured here",
    bound=(
        f"a training step of SSCBM at most {STEP} times one of CEM with its interval, and pseudo"
        f" labels of 50,000 images from 5,000 in under {SEARCH_SECONDS:.0f} s of a core and 1 GB"
        " besides the features; partly: one of the two"
    ),
    needs="rows of sscbm/cost",
)
def cost(cost: pd.DataFrame) -> Verdict:
    found, search = step_ratio(cost), cost[cost["kind"] == "neighbours"].iloc[0]
    if search["queries"] < 50_000:
        return Verdict("not tested here", f"pseudo labels of {search['queries']:,.0f} images only")
    fast = search["work_seconds"] < SEARCH_SECONDS and search["peak_bytes"] < SEARCH_BYTES
    checks: Sequence[bool] = (found.high <= STEP, bool(fast))
    return Verdict(
        _count(sum(checks), 2),
        f"a step {found.value:.2f}x [{found.low:.2f}, {found.high:.2f}];"
        f" {search['work_seconds']:.1f} s and {search['peak_bytes'] / 1e6:.0f} MB",
    )
