"""ECIF's claims, each bound to a check over measured rows. Differences are paired by seed, with a
95 % interval.
"""

import numpy as np
import pandas as pd

from projects.ecif.labels import (
    CLIP_SCORE,
    COSINE,
    ECIF,
    HESSIAN,
    INFLUENCE,
    LOGRA,
    NO_REMOVAL,
    PAIR_LOSS,
    PEERS,
    POSITIVE_ONLY,
    RANDOM,
    RELATIVE_INFLUENCE,
    RETRAIN,
    RETRAIN_WARM,
    RETRAIN_WITH_HESSIAN,
    TRACIN_BY_GRADIENTS,
    TRACIN_FORWARD,
    TRAK,
)
from projects.ecif.tables import costs, distances, fine_tuned, mean, paired
from shared.claims import Verdict, VerdictWord, claim
from shared.statistics import Mean, ratio
from shared.tables import paper_numbers

_HEADLINE = paper_numbers("ecif", "headline").set_index("quantity")["value"]
_HITS, _GAIN, _SPEED = (
    _HEADLINE[name]
    for name in (
        "exchanged among the ten most negative",
        "gain of removing the most harmful tenth",
        "speed over retraining",
    )
)
_HARMFUL = paper_numbers("ecif", "harmful").set_index("method").filter(like="accuracy")
_GAINS = _HARMFUL.loc[ECIF] - _HARMFUL.loc[NO_REMOVAL]
_LOSSES = _HARMFUL.loc[list(PEERS)] - _HARMFUL.loc[NO_REMOVAL]
_LEADS = _HARMFUL.loc[ECIF] - _HARMFUL.loc[list(PEERS)]
UNKNOWN = "paper value not available"
SEEDS = 5  # fewer give no interval worth the name


def _told(value: Mean, digits: int = 3) -> str:
    return f"{value.value:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def _points(value: Mean) -> str:
    return f"{100 * value.value:+.1f} points [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _count(right: int, of: int) -> VerdictWord:
    return "holds" if right == of else "partly" if right else "fails"


@claim(
    id="ecif.negative",
    claim=(
        "A pair's influence as a negative matters: with it the change of the parameters is"
        " predicted better than without."
    ),
    source="motivation, abstract",
    bound=(
        "error of the positive part alone minus that of ECIF, single pairs, above 0 with its"
        " interval, in exact and in linear mode, over at least 5 seeds; partly: in one mode"
    ),
    paper=UNKNOWN,
    needs="rows of ecif/ablation with at least 5 seeds",
)
def negative(ablation: pd.DataFrame) -> Verdict:
    pairs = _single(ablation)
    if pairs.empty:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    gains = {
        mode: paired(pairs, "parameter_error", "positive", mode, label="variant")
        for mode in ("exact", "paper")
    }
    errors = pairs.groupby("variant")["parameter_error"].mean()
    measured = ", ".join(f"{mode} {_told(gain)}" for mode, gain in gains.items())
    levels = (
        f"; errors {errors['exact']:.3f} exact, {errors['paper']:.3f} linear,"
        f" {errors['positive']:.3f} positive only"
    )
    return Verdict(_count(sum(gain.low > 0 for gain in gains.values()), 2), measured + levels)


@claim(
    id="ecif.exact",
    claim=(
        "(Ours, not the paper's.) The exact negative part predicts the change of the parameters"
        " better than the paper's linear one."
    ),
    source="derived here",
    bound=(
        "error of the linear form minus that of the exact one, single pairs, above 0 with its"
        " interval, 5 or more seeds; partly: mean"
    ),
    needs="rows of ecif/ablation with at least 5 seeds",
)
def exact(ablation: pd.DataFrame) -> Verdict:
    pairs = _single(ablation)
    if pairs.empty:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    gain = paired(pairs, "parameter_error", "paper", "exact", label="variant")
    return Verdict(
        "holds" if gain.low > 0 else "partly" if gain.value > 0 else "fails", _told(gain)
    )


def _single(ablation: pd.DataFrame) -> pd.DataFrame:
    """Single pairs at the first regulariser by the whole Hessian; none with too few seeds."""
    pairs = ablation[(ablation["kind"] == "pair") & (ablation["curvature"] == HESSIAN)]
    pairs = pairs[pairs["delta_ratio"] == ablation["delta_ratio"].iloc[0]]
    return pairs if pairs["seed"].nunique() >= SEEDS else pairs.iloc[:0]


@claim(
    id="ecif.projection",
    claim="A low-rank projection (LoGra) of the gradients keeps what the influence is for.",
    source="section on computation",
    bound=(
        "rank correlation of all pairs' scores with those of the whole Hessian at least 0.9 at a"
        " quarter of the dimensions or fewer, and above that of as many random dimensions with its"
        " interval over at least 5 seeds; partly: at a half"
    ),
    paper=UNKNOWN,
    needs="rows of ecif/ablation with a sweep of ranks and at least 5 seeds",
)
def projection(ablation: pd.DataFrame) -> Verdict:
    found = ablation[
        (ablation["kind"] == "scores")
        & (ablation["delta_ratio"] == ablation["delta_ratio"].iloc[0])
    ]
    whole = found.loc[found["curvature"] == HESSIAN, "dimension"].max()
    swept = found.assign(basis=found["curvature"].str.rsplit(n=1).str[0])
    swept = swept[swept["basis"].isin(LOGRA.values())]
    if swept.empty or swept["seed"].nunique() < SEEDS:
        return Verdict("not tested here", f"no projection was tried on {SEEDS} seeds")
    leading, random = LOGRA["leading"], LOGRA["random"]
    means = swept.groupby(["dimension", "basis"])["score_correlation"].mean().unstack("basis")
    above = {
        dimension: paired(rows, "score_correlation", leading, random, label="basis").low > 0
        for dimension, rows in swept.groupby("dimension")
    }
    good = [size for size in means.index if means.loc[size, leading] >= 0.9 and above[size]]
    share = min(good) / whole if good else np.inf
    measured = (
        ", ".join(
            f"{both[leading]:.2f} (random {both[random]:.2f}) at {dimension}"
            for dimension, both in means.iterrows()
        )
        + f" of {whole} dimensions"
    )
    return Verdict("holds" if share <= 0.25 else "partly" if share <= 0.5 else "fails", measured)


@claim(
    id="ecif.retrain",
    claim="Editing pairs out by ECIF gives the accuracy that retraining gives.",
    source="table of ECIF against retraining",
    bound=(
        "mean accuracy within 1 point of retraining in every cell of data set and kind, 5 and 10 %"
        " removed, and nearer to it than the unedited model's by more than the interval (mean over"
        f" the cells of a run; at least {SEEDS} seeds); partly: nearer, and in most cells"
    ),
    paper="within 0.5 points (random removal, four data sets)",
    needs=f"rows of ecif/removal with at least {SEEDS} seeds of every data set",
)
def retrain(removal: pd.DataFrame) -> Verdict:
    edits = removal[(removal["kind"] != "none") & (removal["share"] <= 0.1)]
    if edits.groupby("dataset")["seed"].nunique().min() < SEEDS:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    keys = ["dataset", "kind", "share"]
    away = distances(edits, _unedited(removal))
    gaps = away.groupby(keys, sort=False)["edited"].mean()
    null = away.groupby(keys, sort=False)["unedited"].mean()
    inside = int((gaps.abs() <= 0.01).sum())
    nearer = (away["unedited"].abs() - away["edited"].abs()).groupby(
        [away["dataset"], away["seed"]]
    )
    gain = mean(nearer.mean())
    worst = gaps.abs().idxmax()
    measured = (
        f"{inside} of {len(gaps)} cells within 1 point ({int((null.abs() <= 0.01).sum())} without"
        f" an edit); the widest {100 * gaps[worst]:+.1f} ({worst[0]}, {worst[1]}, {worst[2]:.0%});"
        f" nearer than the unedited model by {_points(gain)}"
    )
    if gain.low <= 0:
        return Verdict("fails", measured)
    return Verdict(
        "holds" if inside == len(gaps) else "partly" if 2 * inside > len(gaps) else "fails",
        measured,
    )


def _unedited(removal: pd.DataFrame) -> pd.DataFrame:
    return removal[removal["kind"] == "none"]


@claim(
    id="ecif.groups",
    claim=(
        "ECIF predicts what removing groups does to the parameters better than the positive part"
        " alone."
    ),
    source="table of ECIF against retraining (editing)",
    bound=(
        "error smaller than that of the positive part, and than 1, which predicts nothing, with"
        f" their intervals over at least {SEEDS} seeds in every cell of data set and kind of"
        " removal at 10 %; partly: for random groups on every data set"
    ),
    paper=UNKNOWN,
    needs=f"rows of ecif/removal at a share of 10 % with at least {SEEDS} seeds",
)
def groups(removal: pd.DataFrame) -> Verdict:
    cells = removal[np.isclose(removal["share"], 0.1) & removal["parameter_error"].notna()]
    if cells.empty or cells.groupby("dataset")["seed"].nunique().min() < SEEDS:
        return Verdict("not tested here", f"no removal of 10 % on {SEEDS} seeds")
    lost, random = [], []
    by_cell = cells.groupby(["dataset", "kind"], sort=False)
    for (dataset, kind), rows in by_cell:
        gain = paired(rows, "parameter_error", POSITIVE_ONLY, ECIF)
        own = rows[rows["method"] == ECIF].groupby("seed")["parameter_error"].mean()
        won = gain.low > 0 and mean(own).high < 1
        if not won:
            lost.append(f"{dataset} {kind} {_told(gain, 2)}")
        if kind == "random":
            random.append(won)
    measured = f"better in {by_cell.ngroups - len(lost)} of {by_cell.ngroups} cells" + (
        f"; not in {', '.join(lost)}" if lost else ""
    )
    return Verdict(
        "holds" if not lost else "partly" if random and all(random) else "fails", measured
    )


@claim(
    id="ecif.harmful",
    claim=(
        "A model trained without the tenth of the pairs that ECIF ranks most harmful is better than"
        " the full one."
    ),
    source="table of harmful removal; figure 1a",
    bound=(
        "gain of accuracy over no removal above 0 with its interval at every share of exchanged"
        " captions; partly: at one"
    ),
    paper=f"gains of {100 * _GAINS.min():.1f} to {100 * _GAINS.max():.1f} points",
    needs=f"rows of ecif/misalignment with at least {SEEDS} seeds",
)
def harmful(misalignment: pd.DataFrame) -> Verdict:
    gains = _gains(misalignment, ECIF, NO_REMOVAL)
    if not gains:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    measured = "; ".join(f"{cell}: {_points(gain)}" for cell, gain in gains.items())
    return Verdict(_count(sum(gain.low > 0 for gain in gains.values()), len(gains)), measured)


@claim(
    id="ecif.peers",
    claim=(
        "Removing what IF-EKFAC, TRAK or TracIn rank most harmful gives a worse model than removing"
        " what ECIF ranks so."
    ),
    source="table of harmful removal",
    bound=(
        "accuracy after ECIF's removal above that after each of the three with its interval at"
        " every share; partly: in some cells"
    ),
    paper=f"{100 * _LEADS.min().min():.1f} to {100 * _LEADS.max().max():.1f} points",
    needs=f"rows of ecif/misalignment with at least {SEEDS} seeds",
)
def peers(misalignment: pd.DataFrame) -> Verdict:
    gains = {}
    for peer in PEERS:
        gains |= {
            f"{peer}, {cell}": gain for cell, gain in _gains(misalignment, ECIF, peer).items()
        }
    if not gains:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    won = [name for name, gain in gains.items() if gain.low > 0]
    lost = sum(gain.high < 0 for gain in gains.values())
    means = [gain.value for gain in gains.values()]
    measured = (
        f"ECIF clearly better in {len(won)} of {len(gains)} cells, clearly worse in {lost}; means"
        f" from {100 * min(means):+.1f} to {100 * max(means):+.1f} points"
    )
    return Verdict(_count(len(won), len(gains)), measured)


def _gains(misalignment: pd.DataFrame, first: str, second: str) -> dict[str, Mean]:
    """Accuracy of one removal over another, paired by seed, by cell; only cells with enough
    seeds.
    """
    shown = misalignment[misalignment["test_accuracy"].notna()]
    return {
        f"{dataset} {share:.0%}": paired(rows, "test_accuracy", first, second)
        for (dataset, share), rows in shown.groupby(["dataset", "shuffled_share"], sort=False)
        if rows["seed"].nunique() >= SEEDS
    }


@claim(
    id="ecif.curve_harmful",
    claim=(
        "On clean data, too, removing the most harmful tenth raises the accuracy above that of"
        " removing as many at random."
    ),
    source="figure 1a",
    bound=(
        "accuracy at 10 % harmful minus 10 % random above 0 with its interval on every data set;"
        " partly: on one"
    ),
    paper=f"about {100 * _GAIN:.0f} point over no removal",
    needs=f"rows of ecif/removal with {SEEDS} seeds of a data set at a share of 10 %",
)
def curve_harmful(removal: pd.DataFrame) -> Verdict:
    gains = _kinds(removal, "harmful", "random")
    if not gains:
        return Verdict("not tested here", f"no data set with {SEEDS} seeds at 10 %")
    measured = "; ".join(f"{name} {_points(gain)}" for name, gain in gains.items())
    return Verdict(_count(sum(gain.low > 0 for gain in gains.values()), len(gains)), measured)


@claim(
    id="ecif.curve_valuable",
    claim=(
        "Removing the most valuable tenth lowers the accuracy below that of removing as many at"
        " random."
    ),
    source="figure 1b",
    bound=(
        "accuracy at 10 % valuable minus 10 % random below 0 with its interval on every data set;"
        " partly: on one"
    ),
    paper="84.7 to 84.1 % (valuable)",
    needs=f"rows of ecif/removal with {SEEDS} seeds of a data set at a share of 10 %",
)
def curve_valuable(removal: pd.DataFrame) -> Verdict:
    gains = _kinds(removal, "valuable", "random")
    if not gains:
        return Verdict("not tested here", f"no data set with {SEEDS} seeds at 10 %")
    measured = "; ".join(f"{name} {_points(gain)}" for name, gain in gains.items())
    return Verdict(_count(sum(gain.high < 0 for gain in gains.values()), len(gains)), measured)


def _kinds(removal: pd.DataFrame, first: str, second: str) -> dict[str, Mean]:
    """Accuracy after retraining without a tenth of one kind over another, by data set; only those
    with enough seeds.
    """
    rows = removal[(removal["method"] == RETRAIN) & np.isclose(removal["share"], 0.1)]
    return {
        name: paired(own, "test_accuracy", first, second, label="kind")
        for name, own in rows.groupby("dataset", sort=False)
        if own["seed"].nunique() >= SEEDS
    }


@claim(
    id="ecif.misalignment",
    claim=(
        "With 10 to 30 % of the captions shuffled, the pairs with the most negative scores are"
        " shuffled ones."
    ),
    source="figure 2",
    bound=(
        "mean precision of the ten most negative at least 0.8 at every share of the emoji; partly:"
        " at one share"
    ),
    paper=f"{_HITS:.1f} (8 of 10)",
    needs=f"rows of ecif/misalignment with at least {SEEDS} seeds",
)
def misalignment(misalignment: pd.DataFrame) -> Verdict:
    rows = misalignment[(misalignment["method"] == ECIF) & (misalignment["dataset"] == "emoji")]
    if rows.empty or rows["seed"].nunique() < SEEDS:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds of the emoji")
    found = {share: mean(part["ten_precision"]) for share, part in rows.groupby("shuffled_share")}
    areas = rows.groupby("shuffled_share")["detection_auc"].mean()
    measured = ", ".join(
        f"{one.value:.2f} at a base rate of {share:.0%} (AUROC {areas[share]:.2f})"
        for share, one in found.items()
    )
    return Verdict(_count(sum(one.value >= _HITS for one in found.values()), len(found)), measured)


@claim(
    id="ecif.clip_score",
    claim=(
        "ECIF finds misaligned pairs better than what needs no influence function: the CLIP-score"
        " and the pair's own loss."
    ),
    source="appendix on the CLIP-score (marginal improvement)",
    bound=(
        "AUROC minus that of the better of the two above 0 with its interval in every cell; partly:"
        " in one"
    ),
    paper="marginal improvement over the CLIP-score",
    needs=f"rows of ecif/misalignment with at least {SEEDS} seeds",
)
def clip_score(misalignment: pd.DataFrame) -> Verdict:
    found = misalignment[misalignment["detection_auc"].notna()]
    gains = {}
    for (dataset, share), rows in found.groupby(["dataset", "shuffled_share"], sort=False):
        if rows["seed"].nunique() >= SEEDS:
            simple = (CLIP_SCORE, PAIR_LOSS)
            best = max(
                simple, key=lambda name: rows.loc[rows["method"] == name, "detection_auc"].mean()
            )
            gains[f"{dataset} {share:.0%} ({best})"] = paired(rows, "detection_auc", ECIF, best)
    if not gains:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    measured = "; ".join(f"{cell} {_told(gain, 2)}" for cell, gain in gains.items())
    return Verdict(_count(sum(gain.low > 0 for gain in gains.values()), len(gains)), measured)


@claim(
    id="ecif.trace",
    claim=(
        "Relative influence traces a misprediction to training pairs that have to do with it, where"
        " plain influence does not."
    ),
    source="table 3 (a gallery); section on misprediction trace-back",
    bound=(
        "share of the five highest that are of the picture's own sub-category or of the one it was"
        " taken for: relative influence above random and above influence, with intervals over"
        f" at least {SEEDS} seeds; partly: above random"
    ),
    paper="a gallery",
    needs=f"rows of ecif/trace with at least {SEEDS} seeds",
)
def trace(trace: pd.DataFrame) -> Verdict:
    found = trace.assign(related=trace["same_share"] + trace["got_share"])
    if found["seed"].nunique() < SEEDS:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    over = {
        name: paired(found, "related", RELATIVE_INFLUENCE, name, label="ranking")
        for name in (RANDOM, INFLUENCE)
    }
    means = found.groupby("ranking")["related"].mean()
    measured = ", ".join(
        f"{name} {means[name]:.0%}" for name in (RELATIVE_INFLUENCE, INFLUENCE, COSINE, RANDOM)
    )
    measured += "; over " + ", over ".join(f"{name} {_points(one)}" for name, one in over.items())
    return Verdict(
        (
            "holds"
            if min(one.low for one in over.values()) > 0
            else "partly"
            if over[RANDOM].low > 0
            else "fails"
        ),
        measured,
    )


@claim(
    id="ecif.clip_retrain",
    claim=(
        "Editing a CLIP fine-tuned with LoRA by ECIF gives the accuracy that retraining"
        " gives, in less time."
    ),
    source="table of ECIF against retraining",
    bound=(
        "mean accuracy within 1 point of retraining in every cell of kind and share, and nearer"
        " to it than the unedited model's by more than the interval (mean over the cells of a"
        " seed); and retraining takes longer, with its interval over cells and seeds; partly:"
        " one of the two"
    ),
    paper=f"within 0.5 points, {_SPEED:g}x (random removal, four data sets)",
    needs=(
        f"rows of ecif/clip of a trained CLIP with at least {SEEDS} seeds; of the paper's own: a"
        " folder of its weights and a GPU"
    ),
)
def clip_retrain(clip: pd.DataFrame) -> Verdict:
    rows = clip[clip["part"] == "removal"]
    if told := _not_told(rows):
        return told
    away = distances(rows, fine_tuned(clip))
    gaps = away.groupby(["kind", "share"], sort=False)["edited"].mean()
    inside = int((gaps.abs() <= 0.01).sum())
    kind, share = gaps.abs().idxmax()
    nearer = (away["unedited"].abs() - away["edited"].abs()).groupby(away["seed"])
    gain = mean(nearer.mean())
    retrained, edit = (
        rows[rows["method"] == method].sort_values(["seed", "kind", "share"])["work_seconds"]
        for method in (RETRAIN, ECIF)
    )
    over = ratio(retrained.to_numpy(), edit.to_numpy())
    measured = (
        f"{_what(clip)}: {inside} of {len(gaps)} cells within 1 point, the widest"
        f" {100 * gaps[kind, share]:+.1f} ({kind}, {share:.0%}); nearer than the unedited model by"
        f" {_points(gain)}; retraining takes {over.value:.2f}x [{over.low:.2f}, {over.high:.2f}]"
    )
    close = inside == len(gaps) and gain.low > 0
    return Verdict(_count(close + (over.low > 1), 2), measured)


@claim(
    id="ecif.clip_harmful",
    claim=(
        "A CLIP fine-tuned with LoRA is better without the tenth that ECIF ranks most harmful, and"
        " worse without what IF-EKFAC, TRAK or TracIn rank so."
    ),
    source="table of harmful removal",
    bound=(
        "gain of accuracy over no removal above 0 with its interval for ECIF and below 0 for the"
        " three, on clean and on exchanged captions; partly: ECIF's above 0 on one"
    ),
    paper=(
        f"ECIF gains {100 * _GAINS.min():.1f} to {100 * _GAINS.max():.1f} points, the three lose"
        f" {-100 * _LOSSES.max().max():.1f} to {-100 * _LOSSES.min().min():.1f}"
    ),
    needs=(
        f"rows of ecif/clip of a trained CLIP with at least {SEEDS} seeds; of the paper's own: a"
        " folder of its weights and a GPU"
    ),
)
def clip_harmful(clip: pd.DataFrame) -> Verdict:
    rows = clip[clip["part"] == "harmful"]
    if told := _not_told(rows):
        return told
    own, others = {}, []
    for share, cell in rows.groupby("shuffled_share"):
        own[share] = paired(cell, "test_accuracy", ECIF, NO_REMOVAL)
        others += [paired(cell, "test_accuracy", method, NO_REMOVAL) for method in PEERS]
    worse, means = sum(gain.high < 0 for gain in others), [gain.value for gain in others]
    measured = (
        f"{_what(clip)}: "
        + ", ".join(f"ECIF {_points(gain)} at {share:.0%} exchanged" for share, gain in own.items())
        + f"; the three clearly worse in {worse} of {len(others)} cells, means from"
        f" {100 * min(means):+.1f} to {100 * max(means):+.1f}"
    )
    better = sum(gain.low > 0 for gain in own.values())
    return Verdict(
        "holds" if better == len(own) and worse == len(others) else "partly" if better else "fails",
        measured,
    )


def _what(clip: pd.DataFrame) -> str:
    first = clip.iloc[0]
    return f"{first['model']} ({first['weights']}) on {first['dataset']}"


def _not_told(rows: pd.DataFrame) -> Verdict | None:
    """The verdict on rows that say nothing of accuracy."""
    if (rows["weights"] == "random").any():
        return Verdict("not tested here", "random weights: time and memory only")
    if rows["seed"].nunique() < SEEDS:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    return None


@claim(
    id="ecif.passes",
    claim=(
        "All pairs are scored without a gradient of any pair: one solve and a few forward-mode"
        " passes."
    ),
    source="derived here (the paper's efficiency is the claim)",
    bound=(
        "at most 3 forward-mode passes, one gradient, and no pass of per-pair gradients beside the"
        " solve"
    ),
    paper=UNKNOWN,
    needs="rows of ecif/cost",
)
def passes(cost: pd.DataFrame) -> Verdict:
    own = costs(cost)
    own = own[(own["task"] == "score") & (own["method"] == ECIF)].iloc[0]
    measured = (
        f"{own['gradients']} gradient, {own['forward_mode']} forward-mode pass,"
        f" {own['per_sample_gradients']} of per-pair gradients; {own['curvature_products']}"
        " products in the solve"
    )
    few = own["gradients"] <= 1 and own["forward_mode"] <= 3
    return Verdict(
        "holds" if few and own["per_sample_gradients"] == 0 else "partly" if few else "fails",
        measured,
    )


@claim(
    id="ecif.speed_retrain",
    claim="An edit by ECIF is faster than retraining.",
    source="table of ECIF against retraining (run times)",
    bound=(
        f"retraining from theta_0 takes at least {_SPEED:g} times as long, with its interval;"
        " partly: longer"
    ),
    paper=f"over {_SPEED:g}x",
    needs="rows of ecif/cost",
)
def speed_retrain(cost: pd.DataFrame) -> Verdict:
    found = costs(cost).set_index(["task", "method"])
    cold = found.loc[("edit", RETRAIN)]
    warm, helped = (
        found.loc[("edit", name), "time_ratio"] for name in (RETRAIN_WARM, RETRAIN_WITH_HESSIAN)
    )
    measured = (
        f"{cold['time_ratio']:.2f}x [{cold['low_ratio']:.2f}, {cold['high_ratio']:.2f}]; from the"
        f" full model {warm:.2f}x, with its Hessian at hand {helped:.2f}x"
    )
    return Verdict(
        "holds" if cold["low_ratio"] >= _SPEED else "partly" if cold["low_ratio"] > 1 else "fails",
        measured,
    )


@claim(
    id="ecif.speed_peers",
    claim="Scoring all pairs by ECIF is faster than by TRAK and TracIn.",
    source="abstract (computational efficiency)",
    bound=(
        "TRAK and TracIn take longer, with intervals, TracIn also where it is had by forward mode"
        " as ECIF is; partly: one of them does"
    ),
    paper=UNKNOWN,
    needs="rows of ecif/cost",
)
def speed_peers(cost: pd.DataFrame) -> Verdict:
    found = costs(cost)
    rows = found[
        (found["task"] == "score")
        & found["method"].isin([TRAK, TRACIN_BY_GRADIENTS, TRACIN_FORWARD])
    ]
    measured = "; ".join(
        f"{row['method']} {row['time_ratio']:.2f}x [{row['low_ratio']:.2f},"
        f" {row['high_ratio']:.2f}]"
        for _, row in rows.iterrows()
    )
    return Verdict(_count(int((rows["low_ratio"] > 1).sum()), len(rows)), measured)
