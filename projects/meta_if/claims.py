"""meta-IF's claims, each bound to a check over measured rows."""

import numpy as np
import pandas as pd

from projects.meta_if import labels
from projects.meta_if.tables import seconds
from shared.claims import Verdict, claim
from shared.statistics import Mean, mean_interval, ratio
from shared.tables import paper_numbers

UNKNOWN = "paper value not available"
_TASKS = paper_numbers("meta_if", "tasks").set_index(["dataset", "method"])
_INSTANCES = paper_numbers("meta_if", "instances").set_index(["dataset", "level", "method"])


def _pair(dataset: str, method: str, column: str = "paper_accuracy") -> float:
    return float(_TASKS.loc[(dataset, method), column])


def _paper_share(dataset: str) -> float:
    """The paper's seconds of task-IF over those of retraining."""
    seconds = [_pair(dataset, method, "paper_seconds") for method in ("task-IF", "Retrain")]
    return seconds[0] / seconds[1]


def _gain(loo: pd.DataFrame, other: str, column: str = "loss_correlation") -> Mean | None:
    """The difference of task-IF and another method, paired by seed."""
    wide = loo.pivot_table(index="seed", columns="method", values=column)
    if labels.TASK_IF not in wide or other not in wide:
        return None
    return mean_interval((wide[labels.TASK_IF] - wide[other]).dropna().tolist())


def _above(loo: pd.DataFrame, others: tuple[str, ...]) -> Verdict:
    """`holds` when task-IF's correlation is above each other's with an interval above 0, `partly`
    when on average, over 5 seeds or more.
    """
    found = {other: _gain(loo, other) for other in others}
    found = {other: gain for other, gain in found.items() if gain is not None}
    if loo["seed"].nunique() < 5 or not found:
        return Verdict(
            "not tested here",
            f"{loo['seed'].nunique()} seeds; 5 are needed, of task-IF and what it is compared with",
        )
    own = mean_interval(loo.loc[loo["method"] == labels.TASK_IF, "loss_correlation"].tolist())
    parts = [
        f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) over {other}"
        for other, gain in found.items()
    ]
    measured = f"correlation {own.value:.3f}; {', '.join(parts)}"
    sure, mean = (
        all(gain.low > 0 for gain in found.values()),
        all(gain.value > 0 for gain in found.values()),
    )
    return Verdict("holds" if sure else "partly" if mean else "fails", measured)


@claim(
    id="meta_if.derivative",
    claim="task-IF is the derivative of the bilevel solution in a task's weight.",
    source="section 5 (total Hessian)",
    bound=(
        "relative error below 1e-4 against central differences of the re-solved problem, with the"
        " exact total Hessian"
    ),
    paper=UNKNOWN,
    needs="rows of meta_if/depth",
)
def derivative(depth: pd.DataFrame) -> Verdict:
    solved = depth[depth["solver"] == labels.DENSE].set_index("method")["relative_error"]
    others = ", ".join(
        f"{name} {solved[name]:.2g}" for name in solved.index if name != labels.TASK_IF
    )
    error = solved[labels.TASK_IF]
    return Verdict(
        "holds" if error < 1e-4 else "partly" if error < 0.01 else "fails", f"{error:.1e}; {others}"
    )


@claim(
    id="meta_if.direct",
    claim="Total derivatives are needed: task-IF agrees with retraining better than direct-IF.",
    source="main table; section 4",
    bound=(
        "paired difference of the correlations with leaving a task out above 0, 95 % interval over"
        " at least 5 seeds; partly: on average"
    ),
    paper=(
        f"by accuracy: task-IF {_pair('Omniglot', 'task-IF')}, direct-IF"
        f" {_pair('Omniglot', 'direct-IF')} (Omniglot)"
    ),
    needs="rows of meta_if/loo with 5 seeds",
)
def direct(loo: pd.DataFrame) -> Verdict:
    return _above(loo, (labels.DIRECT_IF,))


@claim(
    id="meta_if.gamma",
    claim=(
        "A multiple of the identity, Gamma, does in place of the third derivatives of the total"
        " Hessian."
    ),
    source="theorem 5.1",
    bound=(
        "relative error of the predicted change at most 0.1 against differences of the re-solved"
        " problem; partly: at most 0.3"
    ),
    paper=UNKNOWN,
    needs="rows of meta_if/depth",
)
def gamma(depth: pd.DataFrame) -> Verdict:
    solved = depth[depth["solver"] == labels.DENSE].set_index("method")
    error = solved.loc[labels.GAMMA, "relative_error"]
    measured = (
        f"{error:.2f}, cosine {solved.loc[labels.GAMMA, 'cosine']:.3f}; exact"
        f" {solved.loc[labels.TASK_IF, 'relative_error']:.1e}"
    )
    return Verdict("holds" if error <= 0.1 else "partly" if error <= 0.3 else "fails", measured)


@claim(
    id="meta_if.exact",
    claim=(
        "The exact total Hessian agrees with retraining better than Gamma does (ours, not the"
        " paper's)."
    ),
    source="this repository",
    bound=(
        "paired difference of the correlations with leaving a task out above 0, 95 % interval over"
        " at least 5 seeds; partly: on average"
    ),
    needs="rows of meta_if/loo with 5 seeds",
)
def exact(loo: pd.DataFrame) -> Verdict:
    return _above(loo, (labels.GAMMA,))


@claim(
    id="meta_if.baselines",
    claim="task-IF agrees with retraining better than EK-FAC, TRAK and TracIn.",
    source="main table",
    bound=(
        "paired difference of the correlations with leaving a task out above 0 for each, 95 %"
        " interval over at least 5 seeds; partly: on average"
    ),
    paper=(
        f"by accuracy on Omniglot: task-IF {_pair('Omniglot', 'task-IF')}, TracIn"
        f" {_pair('Omniglot', 'TracIn')}, EK-FAC {_pair('Omniglot', 'EK-FAC')}, TRAK"
        f" {_pair('Omniglot', 'TRAK')}"
    ),
    needs="rows of meta_if/loo with 5 seeds",
)
def baselines(loo: pd.DataFrame) -> Verdict:
    return _above(loo, (labels.EKFAC, labels.TRAK, labels.TRACIN))


@claim(
    id="meta_if.edit",
    claim="Editing by task-IF is nearly as accurate as retraining without the tasks.",
    source="main table, task level",
    bound=(
        "on each dataset at most 0.02 below retraining without the same tasks; partly: on average"
    ),
    paper=(
        f"{_pair('Omniglot', 'task-IF')} and {_pair('Omniglot', 'Retrain')} on Omniglot,"
        f" {_pair('MINI-ImageNet', 'task-IF')} and {_pair('MINI-ImageNet', 'Retrain')} on"
        " MINI-ImageNet"
    ),
    needs="rows of meta_if/tasks",
)
def edit(tasks: pd.DataFrame) -> Verdict:
    rows = tasks[(tasks["kind"] == "method") & (tasks["method"] == labels.TASK_IF)]
    return _close(rows["source"], rows["edit_accuracy"], rows["retrain_accuracy"])


def _close(names: pd.Series, edited: pd.Series, retrained: pd.Series) -> Verdict:
    short = (retrained - edited).to_numpy()
    parts = ", ".join(
        f"{a:.3f} and {b:.3f} on {name}"
        for name, a, b in zip(names, edited, retrained, strict=True)
    )
    return Verdict(
        "holds" if short.max() <= 0.02 else "partly" if short.mean() <= 0.02 else "fails",
        f"edited and retrained: {parts}",
    )


@claim(
    id="meta_if.removal_helps",
    claim="Removing the tasks that task-IF finds harmful makes the model better.",
    source="section on harmful data",
    bound=(
        "accuracy retrained without them above that with all tasks on each dataset; partly: on"
        " average"
    ),
    paper=UNKNOWN,
    needs="rows of meta_if/tasks",
)
def removal_helps(tasks: pd.DataFrame) -> Verdict:
    wide = tasks.pivot_table(
        index="source", columns="method", values="retrain_accuracy", aggfunc="first", sort=False
    )
    gains = wide[labels.TASK_IF] - wide[labels.ALL_TASKS]
    clean = wide[labels.WITHOUT_SPOILED] - wide[labels.ALL_TASKS]
    parts = ", ".join(
        f"{gains[name]:+.3f} on {name} ({clean[name]:+.3f} without the spoiled ones)"
        for name in gains.index
    )
    return Verdict("holds" if gains.min() > 0 else "partly" if gains.mean() > 0 else "fails", parts)


@claim(
    id="meta_if.faster",
    claim="Ranking and editing takes a quarter of the time of retraining from the start, or less.",
    source="main table, run time",
    bound=(
        "processor seconds to rank and to edit over those to train from the start at most 0.25 on"
        " each dataset; partly: below 1"
    ),
    paper=(
        f"{_paper_share('Omniglot'):.2f}"
        " on Omniglot,"
        f" {_paper_share('MINI-ImageNet'):.2f}"
        " on MINI-ImageNet"
    ),
    needs="rows of meta_if/tasks",
)
def faster(tasks: pd.DataFrame) -> Verdict:
    scratch = tasks[tasks["kind"] == "scratch"].set_index("source")["retrain_seconds"]
    rows = tasks[(tasks["kind"] == "method") & (tasks["method"] == labels.TASK_IF)].set_index(
        "source"
    )
    shares = (rows["rank_seconds"] + rows["edit_seconds"]) / scratch
    parts = ", ".join(f"{share:.2f} on {name}" for name, share in shares.items())
    return Verdict(
        "holds" if shares.max() <= 0.25 else "partly" if shares.max() < 1 else "fails", parts
    )


@claim(
    id="meta_if.faster_warm",
    claim=(
        "Predicting the removal of one task is faster than retraining from the solution (ours,"
        " harder than the paper's)."
    ),
    source="this repository",
    bound=(
        "editing one task out over retraining without it, the faster way with the Hessian at hand,"
        " interleaved: interval below 1; partly: scores of all tasks below retraining without each"
    ),
    needs="rows of meta_if/cost",
)
def faster_warm(cost: pd.DataFrame) -> Verdict:
    times = seconds(cost)
    n = int(cost.loc[cost["kind"] == "counts", "tasks"].iloc[0])
    ways = {name: times[name] for name in times.columns if name.startswith(labels.RETRAIN_PREFIX)}
    best = min(ways, key=lambda name: ways[name].median())
    one = ratio(times[labels.EDIT_ONE].tolist(), ways[best].tolist())
    every = ratio(times[labels.SCORE_ALL].tolist(), (n * ways[best]).tolist())
    measured = (
        f"one edit {one.value:.2f}x ({one.low:.2f} to {one.high:.2f}) of '{best}'; all {n} scores"
        f" {every.value:.3f}x of {n} of these"
    )
    return Verdict("holds" if one.high < 1 else "partly" if every.high < 1 else "fails", measured)


@claim(
    id="meta_if.solves",
    claim="An iteration costs two inner solves a task, and scoring all tasks afterwards none.",
    source="this repository (exact total Hessian)",
    bound="inner solves = 2 x tasks x products of the outer solve, and none for the scores",
    needs="rows of meta_if/cost",
)
def solves(cost: pd.DataFrame) -> Verdict:
    row = cost[cost["kind"] == "counts"].iloc[0]
    right = (
        row["inner_solves"] == 2 * row["tasks"] * row["products"]
        and row["inner_solves_scoring"] == 0
    )
    measured = (
        f"{int(row['inner_solves'])} solves for {int(row['products'])} products and"
        f" {int(row['tasks'])} tasks, "
    )
    return Verdict(
        "holds" if right else "fails",
        measured + f"{int(row['inner_solves_scoring'])} for the scores",
    )


@claim(
    id="meta_if.instances",
    claim=(
        "Editing by instance-IF is nearly as accurate as retraining without the samples, training"
        " and validation alike."
    ),
    source="main table, instance level",
    bound=(
        "on each dataset and level at most 0.02 below retraining without the same samples (mean"
        " over seeds); partly: on average"
    ),
    paper=(
        f"{_INSTANCES.loc[('Omniglot', 'train', 'instance-IF'), 'paper_accuracy']} and"
        f" {_INSTANCES.loc[('Omniglot', 'train', 'Retrain'), 'paper_accuracy']} (training),"
        f" {_INSTANCES.loc[('Omniglot', 'val', 'instance-IF'), 'paper_accuracy']} and"
        f" {_INSTANCES.loc[('Omniglot', 'val', 'Retrain'), 'paper_accuracy']} (validation) on"
        " Omniglot"
    ),
    needs="rows of meta_if/instances",
)
def instances(instances: pd.DataFrame) -> Verdict:
    means = (
        instances.groupby(["source", "level"], sort=False)[["edit_accuracy", "retrain_accuracy"]]
        .mean()
        .reset_index()
    )
    return _close(
        means["source"] + " " + means["level"], means["edit_accuracy"], means["retrain_accuracy"]
    )


@claim(
    id="meta_if.instance_loo",
    claim="Both instance-IFs predict what leaving one sample out does.",
    source="section 5 (instance level)",
    bound=(
        "mean correlation with retraining above 0.9 at both levels, lower ends of the 95 %"
        " intervals above 0.8, at least 5 seeds; partly: means above 0.8"
    ),
    paper=UNKNOWN,
    needs="rows of meta_if/instances with 5 seeds of a dataset",
)
def instance_loo(instances: pd.DataFrame) -> Verdict:
    counts = instances.groupby("source")["seed"].nunique()
    if counts.max() < 5:
        return Verdict("not tested here", f"{counts.max()} seeds; 5 are needed")
    source = counts.idxmax()
    found = {
        level: mean_interval(rows["loo_correlation"])
        for level, rows in instances[instances["source"] == source].groupby("level")
    }
    measured = (
        ", ".join(
            f"{level} {one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
            for level, one in found.items()
        )
        + f" on {source}"
    )
    good = all(one.value > 0.9 and one.low > 0.8 for one in found.values())
    return Verdict(
        (
            "holds"
            if good
            else "partly"
            if all(one.value > 0.8 for one in found.values())
            else "fails"
        ),
        measured,
    )


@claim(
    id="meta_if.harmful",
    claim="The influence score finds harmful tasks better than chance.",
    source="figure on harmful tasks (MNIST)",
    bound="AUROC of task-IF at least 0.7 at each share of spoiled tasks; partly: above 0.5 at each",
    paper="read only approximately, and not consistent: see the table",
    needs="rows of meta_if/harmful",
)
def harmful(harmful: pd.DataFrame) -> Verdict:
    areas = _areas(harmful, labels.TASK_IF)
    measured = ", ".join(f"{area:.3f} at {share:.0%}" for share, area in areas.items())
    return Verdict(
        "holds" if areas.min() >= 0.7 else "partly" if areas.min() > 0.5 else "fails", measured
    )


@claim(
    id="meta_if.beats_loss",
    claim=(
        "The influence score finds harmful tasks better than their own loss does (a baseline that"
        " the paper's reviewers asked for)."
    ),
    source="public reviews",
    bound=(
        "AUROC of task-IF above that of the validation loss at each share of spoiled tasks; partly:"
        " on average"
    ),
    needs="rows of meta_if/harmful",
)
def beats_loss(harmful: pd.DataFrame) -> Verdict:
    own, loss = _areas(harmful, labels.TASK_IF), _areas(harmful, labels.LOSS_VALUE)
    gains = own - loss
    measured = ", ".join(
        f"{own[share]:.3f} and {loss[share]:.3f} at {share:.0%}" for share in own.index
    )
    return Verdict(
        "holds" if gains.min() > 0 else "partly" if gains.mean() > 0 else "fails",
        f"task-IF and loss: {measured}",
    )


def _areas(harmful: pd.DataFrame, method: str) -> pd.Series:
    rows = harmful[(harmful["kind"] == "summary") & (harmful["method"] == method)]
    return rows.groupby("spoiled_share")["detection_auc"].mean()


@claim(
    id="meta_if.series",
    claim="A Neumann series of moderate depth solves for the influence.",
    source="section 5 (Neumann series)",
    bound=(
        "error at depth 50 or less within 0.1 of what its matrix gives when solved, for the exact"
        " matrix and for Gamma; partly: Gamma"
    ),
    paper="depth not available",
    needs="rows of meta_if/depth",
)
def series(depth: pd.DataFrame) -> Verdict:
    near, parts = {}, []
    for method in (labels.TASK_IF, labels.GAMMA):
        rows = depth[
            (depth["method"] == method)
            & (depth["solver"] == labels.NEUMANN)
            & (depth["depth"] <= 50)
        ]
        last = rows.loc[rows["depth"].idxmax()]
        solved = depth.loc[
            (depth["method"] == method) & (depth["solver"] == labels.DENSE), "relative_error"
        ].iloc[0]
        near[method] = bool(np.abs(last["relative_error"] - solved) <= 0.1)
        parts.append(
            f"{method} {last['relative_error']:.2f} at depth {int(last['depth'])}, {solved:.2g}"
            " solved"
        )
    return Verdict(
        "holds" if all(near.values()) else "partly" if near[labels.GAMMA] else "fails",
        "; ".join(parts),
    )
