"""meta-IF's claims, each bound to a check over measured rows."""

import numpy as np
import pandas as pd

from projects.meta_if import labels
from projects.meta_if.tables import apart, seconds
from shared.claims import Verdict, claim
from shared.statistics import Mean, mean_interval, ratio
from shared.tables import paper_numbers

UNKNOWN = "paper value not available"
SEEDS = 5  # fewer decide nothing
NEAR = 0.02  # of accuracy
_TASKS = paper_numbers("meta_if", "tasks").set_index(["dataset", "method"])
_INSTANCES = paper_numbers("meta_if", "instances").set_index(["dataset", "level", "method"])


def _pair(dataset: str, method: str, column: str = "paper_accuracy") -> float:
    return float(_TASKS.loc[(dataset, method), column])


def _paper_share(dataset: str) -> float:
    """The paper's seconds of task-IF over those of retraining."""
    seconds = [_pair(dataset, method, "paper_seconds") for method in ("task-IF", "Retrain")]
    return seconds[0] / seconds[1]


def _too_few(rows: pd.DataFrame, cells: list[str] | None = None) -> Verdict | None:
    """What is said where a cell has fewer seeds than an interval needs."""
    least = rows["seed"].nunique() if cells is None else rows.groupby(cells)["seed"].nunique().min()
    if least >= SEEDS:
        return None
    return Verdict("not tested here", f"{least} seeds; {SEEDS} are needed")


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
    if not found:
        return Verdict("not tested here", "task-IF, or what it is compared with, has no rows")
    if few := _too_few(loo):
        return few
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
        "on each dataset the accuracies at most 0.02 apart, and nearer than those of no edit (95 %"
        " interval of the paired difference above 0, at least 5 seeds); partly: over all datasets"
    ),
    paper=(
        f"{_pair('Omniglot', 'task-IF')} and {_pair('Omniglot', 'Retrain')} on Omniglot,"
        f" {_pair('MINI-ImageNet', 'task-IF')} and {_pair('MINI-ImageNet', 'Retrain')} on"
        " MINI-ImageNet"
    ),
    needs="rows of meta_if/tasks with 5 seeds",
)
def edit(tasks: pd.DataFrame) -> Verdict:
    return _close(tasks[tasks["kind"] == "method"], ["source"], labels.TASK_IF)


def _close(rows: pd.DataFrame, cells: list[str], own: str) -> Verdict:
    """Whether a method's edits are near retraining, and nearer than the model as it was."""
    if few := _too_few(rows, cells):
        return few
    wide = rows.assign(apart=apart(rows)).pivot_table(
        index=[*cells, "seed"], columns="method", values="apart", sort=False
    )
    gains = wide[labels.NO_EDIT] - wide[own]
    near, better, parts = [], [], []
    for cell, part in wide.groupby(level=cells, sort=False):
        gain = mean_interval(gains[part.index])
        near.append(part[own].mean() <= NEAR)
        better.append(gain.low > 0)
        parts.append(
            f"{part[own].mean():.3f} ({part[labels.NO_EDIT].mean():.3f}) on"
            f" {' '.join(cell) if isinstance(cell, tuple) else cell}"
        )
    whole = mean_interval(gains)
    measured = (
        f"{wide[own].mean():.3f} apart, without an edit {wide[labels.NO_EDIT].mean():.3f}, gain"
        f" {whole.value:+.3f} ({whole.low:+.3f} to {whole.high:+.3f}): {', '.join(parts)}"
    )
    if all(near) and all(better):
        return Verdict("holds", measured)
    return Verdict("partly" if wide[own].mean() <= NEAR and whole.low > 0 else "fails", measured)


@claim(
    id="meta_if.removal_helps",
    claim="Removing the tasks that task-IF finds harmful makes the model better.",
    source="section on harmful data",
    bound=(
        "on each dataset the accuracy retrained without them above that with all tasks, and above"
        " that without as many random ones (95 % intervals of the paired differences above 0, at"
        " least 5 seeds); partly: over all datasets"
    ),
    paper=UNKNOWN,
    needs="rows of meta_if/tasks with 5 seeds",
)
def removal_helps(tasks: pd.DataFrame) -> Verdict:
    if few := _too_few(tasks, ["source"]):
        return few
    wide = tasks.pivot_table(
        index=["source", "seed"], columns="method", values="retrain_accuracy", sort=False
    )
    gains = pd.DataFrame(
        {other: wide[labels.TASK_IF] - wide[other] for other in (labels.ALL_TASKS, labels.RANDOM)}
    )
    sure = [
        mean_interval(part[other]).low > 0
        for _, part in gains.groupby(level="source", sort=False)
        for other in gains
    ]
    whole = {other: mean_interval(gains[other]) for other in gains}
    clean = (wide[labels.WITHOUT_SPOILED] - wide[labels.ALL_TASKS]).groupby("source", sort=False)
    parts = ", ".join(
        f"{part[labels.ALL_TASKS].mean():+.3f} on {name} ({clean.mean()[name]:+.3f} without the"
        " spoiled ones)"
        for name, part in gains.groupby(level="source", sort=False)
    )
    over = ", ".join(
        f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}) over"
        f" {other if other == labels.ALL_TASKS else 'random ones'}"
        for other, gain in whole.items()
    )
    return Verdict(
        "holds"
        if all(sure)
        else "partly"
        if all(gain.low > 0 for gain in whole.values())
        else "fails",
        f"{over}: {parts}",
    )


@claim(
    id="meta_if.faster",
    claim="Ranking and editing takes a quarter of the time of retraining from the start, or less.",
    source="main table, run time",
    bound=(
        "processor seconds to rank and to edit over those to train from the start at most 0.25 on"
        " each dataset, in the median over seeds; partly: below 1"
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
    keys = ["source", "seed"]
    scratch = tasks[tasks["kind"] == "scratch"].set_index(keys)["retrain_seconds"]
    rows = tasks[tasks["method"] == labels.TASK_IF].set_index(keys)
    shares = (
        ((rows["rank_seconds"] + rows["edit_seconds"]) / scratch)
        .groupby("source", sort=False)
        .median()
    )
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
        "on each dataset and level the accuracies at most 0.02 apart, and nearer than those of no"
        " edit (95 % interval of the paired difference above 0, at least 5 seeds); partly: over all"
        " datasets and levels"
    ),
    paper=(
        f"{_INSTANCES.loc[('Omniglot', 'train', 'instance-IF'), 'paper_accuracy']} and"
        f" {_INSTANCES.loc[('Omniglot', 'train', 'Retrain'), 'paper_accuracy']} (training),"
        f" {_INSTANCES.loc[('Omniglot', 'val', 'instance-IF'), 'paper_accuracy']} and"
        f" {_INSTANCES.loc[('Omniglot', 'val', 'Retrain'), 'paper_accuracy']} (validation) on"
        " Omniglot"
    ),
    needs="rows of meta_if/instances with 5 seeds",
)
def instances(instances: pd.DataFrame) -> Verdict:
    return _close(instances, ["source", "level"], labels.INSTANCE_IF)


@claim(
    id="meta_if.instance_loo",
    claim="Both instance-IFs predict what leaving one sample out does.",
    source="section 5 (instance level)",
    bound=(
        "on each dataset and level the mean correlation with retraining above 0.9, lower end of the"
        " 95 % interval above 0.8, and above that of a random order, at least 5 seeds; partly: over"
        " all datasets and seeds, at both levels"
    ),
    paper=UNKNOWN,
    needs="rows of meta_if/instances with 5 seeds",
)
def instance_loo(instances: pd.DataFrame) -> Verdict:
    cells = ["source", "level"]
    if few := _too_few(instances, cells):
        return few
    wide = instances.pivot_table(
        index=[*cells, "seed"], columns="method", values="loo_correlation", sort=False
    )
    own, random = wide[labels.INSTANCE_IF], wide[labels.RANDOM]

    def good(part: pd.Series) -> bool:
        mean, gain = mean_interval(part), mean_interval(part - random[part.index])
        return mean.value > 0.9 and mean.low > 0.8 and gain.low > 0

    by_cell = dict(iter(own.groupby(level=cells, sort=False)))
    by_level = dict(iter(own.groupby(level="level", sort=False)))
    measured = ", ".join(
        f"{level} {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}), at random"
        f" {random[part.index].mean():.3f}, by gradient dot"
        f" {wide.loc[part.index, labels.GRADIENT_DOT].mean():.3f}"
        for level, part in by_level.items()
        for mean in [mean_interval(part)]
    )
    parts = ", ".join(f"{part.mean():.3f} on {' '.join(cell)}" for cell, part in by_cell.items())
    return Verdict(
        "holds"
        if all(good(part) for part in by_cell.values())
        else "partly"
        if all(good(part) for part in by_level.values())
        else "fails",
        f"{measured}: {parts}",
    )


@claim(
    id="meta_if.harmful",
    claim="The influence score finds harmful tasks better than chance.",
    source="figure on harmful tasks (MNIST)",
    bound=(
        "with permuted labels, at each share of spoiled tasks, mean AUROC of task-IF at least 0.7"
        " and lower end of its 95 % interval above 0.5, at least 5 seeds; partly: means above 0.5"
    ),
    paper="read only approximately, and not consistent: see the table",
    needs="rows of meta_if/harmful with 5 seeds",
)
def harmful(harmful: pd.DataFrame) -> Verdict:
    if few := _too_few(harmful, ["setting", "spoiled_share"]):
        return few
    own, random = (_areas(harmful, name) for name in (labels.TASK_IF, labels.RANDOM))
    means, parts = [], []
    for (_, share), areas in own.loc[[labels.PERMUTED]].groupby(level=CELL, sort=False):
        mean = mean_interval(areas)
        means.append(mean)
        parts.append(
            f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}) at {share:.0%}, random"
            f" {random[areas.index].mean():.3f}"
        )
    return Verdict(
        "holds"
        if all(mean.value >= 0.7 and mean.low > 0.5 for mean in means)
        else "partly"
        if all(mean.value > 0.5 for mean in means)
        else "fails",
        ", ".join(parts),
    )


@claim(
    id="meta_if.beats_loss",
    claim=(
        "The influence score finds harmful tasks better than their own loss does (a baseline that"
        " the paper's reviewers asked for)."
    ),
    source="public reviews",
    bound=(
        "paired difference of the AUROC of task-IF and of the validation loss above 0 (95 %"
        " interval, at least 5 seeds) at each share of spoiled tasks, with labels that cannot be"
        " learned (where the loss is perfect by construction) and with labels that the images show;"
        " partly: in one of the two"
    ),
    needs="rows of meta_if/harmful with 5 seeds and both settings",
)
def beats_loss(harmful: pd.DataFrame) -> Verdict:
    if few := _too_few(harmful, ["setting", "spoiled_share"]):
        return few
    own, loss = _areas(harmful, labels.TASK_IF), _areas(harmful, labels.LOSS_VALUE)
    better, parts = {}, []
    for setting, areas in own.groupby(level="setting", sort=False):
        by_share = list(areas.groupby(level="spoiled_share"))
        gains = [mean_interval(part - loss[part.index]) for _, part in by_share]
        better[setting] = all(gain.low > 0 for gain in gains)
        parts.append(
            f"{setting}: "
            + ", ".join(
                f"{part.mean():.3f} and {loss[part.index].mean():.3f}"
                f" ({gain.low:+.3f} to {gain.high:+.3f}) at {share:.0%}"
                for (share, part), gain in zip(by_share, gains, strict=True)
            )
        )
    if len(better) < 2:
        return Verdict("not tested here", f"only {', '.join(better)}; both settings are needed")
    return Verdict(
        "holds" if all(better.values()) else "partly" if any(better.values()) else "fails",
        f"task-IF and loss (interval of the difference), {'; '.join(parts)}",
    )


CELL = ["setting", "spoiled_share"]


def _areas(harmful: pd.DataFrame, method: str) -> pd.Series:
    """AUROC of a method by setting, share and seed."""
    rows = harmful[(harmful["kind"] == "summary") & (harmful["method"] == method)]
    return rows.set_index([*CELL, "seed"])["detection_auc"]


@claim(
    id="meta_if.series",
    claim="A Neumann series of moderate depth solves for the influence.",
    source="section 5 (Neumann series)",
    bound=(
        "error at depth 50 or less, against what its matrix gives when solved, at most 0.1: upper"
        " end of the 95 % interval over at least 5 seeds, for the exact matrix and for Gamma;"
        " partly: Gamma"
    ),
    paper="depth not available",
    needs="rows of meta_if/depth with 5 seeds of a regulariser",
)
def series(depth: pd.DataFrame) -> Verdict:
    rows = depth[depth["kind"] == "conditioning"]
    most = rows.groupby("l2_scale")["seed"].nunique().idxmax()
    if few := _too_few(rows[rows["l2_scale"] == most]):
        return few
    near, parts = {}, []
    for method in (labels.TASK_IF, labels.GAMMA):
        own = rows[rows["method"] == method]
        seeds = own[own["l2_scale"] == most]
        error = mean_interval(seeds["solved_relative_error"])
        near[method] = error.high <= 0.1
        parts.append(
            f"{method} {error.value:.2f} ({error.low:.2f} to {error.high:.2f}), smallest eigenvalue"
            f" {seeds['smallest_eigenvalue_scale'].min():.4f} to"
            f" {seeds['smallest_eigenvalue_scale'].max():.4f}, condition"
            f" {_condition(seeds).min():.0f} to {_condition(seeds).max():.0f}, depth needed"
            f" {_depths(seeds)}"
        )
    other = rows[(rows["method"] == labels.TASK_IF) & (rows["l2_scale"] != most)]
    for l2, part in other.groupby("l2_scale"):
        parts.append(
            f"with l2 {l2:g} smallest eigenvalue {part['smallest_eigenvalue_scale'].min():.4f},"
            f" depth needed {_depths(part)}"
        )
    return Verdict(
        "holds" if all(near.values()) else "partly" if near[labels.GAMMA] else "fails",
        "; ".join(parts),
    )


def _condition(rows: pd.DataFrame) -> pd.Series:
    return rows["largest_eigenvalue_scale"] / rows["smallest_eigenvalue_scale"]


def _depths(rows: pd.DataFrame) -> str:
    """'12 to 340', or 'more' where a series did not get there."""
    needed = rows["depth_needed"]
    least, most = needed.min(), needed.max()
    if needed.isna().any():
        return "more than was tried" if np.isnan(least) else f"{least:.0f} to more than was tried"
    return f"{least:.0f}" if least == most else f"{least:.0f} to {most:.0f}"
