"""meta-IF's tables: rows in, `Table` out."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from projects.meta_if import labels
from shared.statistics import mean_interval, ratio
from shared.tables import Column, Table, paper_numbers

ACCURACY = "{:.3f}"
SECONDS = "{:.2f}"
STAND_IN = (
    "Omniglot, MINI-ImageNet and FC100 are in no package; Quick, Draw! sketches, CIFAR-10 and"
    " Fashion-MNIST stand in for them, so the paper's accuracies are those of other data and other"
    " networks."
)


def interval(values: Sequence[float], form: str = "{:.2f}") -> str:
    """'0.91 (0.85 to 0.97)'."""
    mean = mean_interval(values)
    if np.isnan(mean.low):
        return form.format(mean.value)
    return f"{form.format(mean.value)} ({form.format(mean.low)} to {form.format(mean.high)})"


CLOSENESS = {
    "edit_accuracy": Column("accuracy, edited", ACCURACY),
    "retrain_accuracy": Column("accuracy, retrained", ACCURACY),
    "apart": Column("apart", ACCURACY),
    "same_answers_share": Column("same answers", ACCURACY),
    "edit_relative_error": Column("error of the edit", ACCURACY),
}
CLOSENESS_NOTE = (
    "'Apart' is the mean distance of the two accuracies, 'same answers' the share of the test"
    " samples that both models put into the same class, 'error' the edit's distance from the"
    f" retrained meta-parameters over that of the trained ones. '{labels.NO_EDIT}' leaves the model"
    " as it is: what an edit must beat."
)


def apart(rows: pd.DataFrame) -> pd.Series:
    """The distance of the accuracies after an edit and after retraining; NaN without an edit."""
    return (rows["edit_accuracy"] - rows["retrain_accuracy"]).abs()


def tasks(tasks: pd.DataFrame) -> Table:
    seconds_of = {
        name: Column(f"to {name.removesuffix('_seconds')}, s", SECONDS)
        for name in ("rank_seconds", "edit_seconds", "retrain_seconds")
    }
    columns = {
        "data": "data",
        "stands_for": "in place of",
        "method": "method",
        "seed": "seeds",
        "detection_auc": Column("spoiled tasks found (AUROC)", ACCURACY),
        **CLOSENESS,
        **seconds_of,
    }
    frame = tasks.rename(columns={"source": "data"}).assign(apart=apart(tasks))
    frame = (
        frame.groupby(["data", "stands_for", "method"], sort=False)
        .agg(
            {
                name: "nunique" if name == "seed" else "median" if name in seconds_of else "mean"
                for name in columns
                if name in frame and frame[name].dtype.kind in "fi"
            }
        )
        .reset_index()
        .reindex(columns=list(columns))
    )
    share = (
        100 * tasks["removed_tasks"].iloc[0] / tasks.attrs["config"]["tasks"]
        if "config" in tasks.attrs
        else 40
    )
    return Table(
        title="Removing harmful tasks",
        caption=(
            f"{share:.0f} % of the tasks have spoiled labels; as many that a method finds most"
            " harmful for the test loss are removed, by adding the predicted change to the"
            " meta-parameters (edited), and by retraining. Means over"
            " the seeds; medians of seconds."
        ),
        frame=frame,
        columns=columns,
        paper=paper_numbers("meta_if", "tasks"),
        notes=[
            STAND_IN,
            CLOSENESS_NOTE
            + f" It is compared with the retraining without the tasks that {labels.TASK_IF} finds.",
            (
                "'Retrain' trains from the start without the tasks that task-IF finds; 'retrained'"
                " elsewhere starts from the full solution. Seconds are of the processor; ranking"
                " includes solving the inner problems anew."
            ),
            (
                "TRAK, TracIn and the loss give an order and no change of the parameters. All"
                " baselines get total gradients."
            ),
            (
                "In the note the TRAK and TracIn cells of MINI-ImageNet are almost the same and are"
                " left out as suspect."
            ),
        ],
    )


def instances(instances: pd.DataFrame) -> Table:
    lines = []
    means = [*CLOSENESS, "score_seconds", "edit_seconds", "retrain_seconds"]
    for (source, stands_for, level, method), rows in instances.assign(
        apart=apart(instances)
    ).groupby(["source", "stands_for", "level", "method"], sort=False):
        predicts = not rows["loo_correlation"].isna().all()
        lines.append(
            {
                "data": source,
                "stands_for": stands_for,
                "level": level,
                "method": method,
                "correlation": interval(rows["loo_correlation"]) if predicts else None,
                "cosine": (
                    interval(rows["loo_cosine"], "{:.3f}") if method == labels.INSTANCE_IF else None
                ),
                **{name: rows[name].mean() for name in means},
            }
        )
    return Table(
        title="Removing samples",
        caption=(
            "Single training and validation samples left out (correlation of the meta-test loss's"
            " change, cosine of the meta-parameters' change), and the tenth of all samples with the"
            f" lowest scores removed at once. Means over {instances['seed'].nunique()} seeds."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "data": "data",
            "stands_for": "in place of",
            "level": "samples",
            "method": "method",
            "correlation": "correlation",
            "cosine": "cosine",
            **CLOSENESS,
            "score_seconds": Column("to score all, s", SECONDS),
            "edit_seconds": Column("to edit, s", SECONDS),
            "retrain_seconds": Column("to retrain, s", SECONDS),
        },
        paper=paper_numbers("meta_if", "instances"),
        notes=[
            STAND_IN,
            CLOSENESS_NOTE,
            "Intervals: 95 %, Student's, over seeds (so they may pass 1).",
        ],
    )


def loo(loo: pd.DataFrame) -> Table:
    lines = []
    for method, rows in loo.groupby("method", sort=False):
        of_change = {} if rows["cosine"].isna().all() else {
            "cosine": interval(rows["cosine"], "{:.3f}"),
            "error": interval(rows["relative_error"]),
            "eigenvalue": float(rows["smallest_eigenvalue_scale"].min()),
        }  # fmt: skip
        lines.append(
            {
                "method": method,
                "correlation": interval(rows["loss_correlation"]),
                "rank": interval(rows["loss_rank_correlation"]),
                "cosine": None,
                "error": None,
                "eigenvalue": np.nan,
                **of_change,
            }
        )
    return Table(
        title="Agreement with retraining without a task",
        caption=(
            f"{loo['left_out_tasks'].iloc[0]} tasks left out one at a time, {loo['seed'].nunique()}"
            " seeds: change of the test loss (correlations) and of the meta-parameters (cosine,"
            " relative error)."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "method": "method",
            "correlation": "correlation",
            "rank": "rank correlation",
            "cosine": "cosine",
            "error": "relative error",
            "eigenvalue": Column("smallest eigenvalue", "{:.4f}"),
        },
        notes=[
            (
                "Intervals: 95 %, Student's, over seeds (so they may pass 1). "
                "Retraining is deterministic, so nothing but the estimate limits the agreement."
            ),
            (
                f"Meta-test accuracy {loo['start_accuracy'].mean():.3f} at the random body,"
                f" {loo['accuracy'].mean():.3f} after meta-training."
            ),
        ],
    )


def harmful(harmful: pd.DataFrame) -> Table:
    rows = harmful[harmful["kind"] == "summary"]
    lines = []
    for (setting, share, method), cell in rows.groupby(
        ["setting", "spoiled_share", "method"], sort=False
    ):
        curve = mean_curve(harmful, setting, share, method)
        lines.append(
            {
                "setting": setting,
                "spoiled_share": share,
                "method": method,
                "detection_auc": interval(cell["detection_auc"], ACCURACY),
                "found_at_40": float(np.interp(0.4, curve.index, curve)),
                "before_accuracy": cell.loc[cell["seed"] == 0, "before_accuracy"].mean(),
                "accuracy": cell["accuracy"].mean(),
            }
        )
    return Table(
        title="Finding harmful tasks",
        caption=(
            "Tasks whose labels were permuted within the task, which nothing can learn; and such"
            " tasks whose images show the permuted labels by patterns, so that they are easy to"
            f" learn and of no use to others. {rows['seed'].nunique()} seeds. Accuracy: with all"
            " tasks, and in the first seed retrained without the spoiled tasks found in the first"
            " quarter."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "setting": "how",
            "spoiled_share": Column("spoiled", "{:.0%}"),
            "method": "method",
            "detection_auc": "AUROC",
            "found_at_40": Column("found after 40 % inspected", "{:.0%}"),
            "before_accuracy": Column("accuracy before", ACCURACY),
            "accuracy": Column("accuracy after", ACCURACY),
        },
        notes=[
            "With permuted labels alone the loss is perfect by construction: what cannot be learned"
            " keeps a high loss.",
            "Intervals: 95 %, Student's, over seeds (so they may pass 1).",
            "The paper's figure could be read only approximately: at 80 % spoiled about all found"
            " after 40 % inspected (which is impossible: 40 % of the tasks hold at most half of"
            " 80 %), so none of it stands here.",
        ],
    )


def mean_curve(harmful: pd.DataFrame, setting: str, share: float, method: str) -> pd.Series:
    """Share of the spoiled tasks found, by share inspected, mean over seeds."""
    rows = harmful[
        (harmful["kind"] == "curve")
        & (harmful["setting"] == setting)
        & (harmful["spoiled_share"] == share)
        & (harmful["method"] == method)
    ]
    return rows.groupby("inspected_share")["found_share"].mean()


def conditioning(depth: pd.DataFrame) -> Table:
    rows = depth[depth["kind"] == "conditioning"]
    wanted = depth.attrs.get("config", {}).get("wanted_error", 0.1)
    frame = rows.assign(
        condition=rows["largest_eigenvalue_scale"] / rows["smallest_eigenvalue_scale"]
    ).sort_values(["method", "smallest_eigenvalue_scale"], ascending=[True, False])
    return Table(
        title="Depth of the series against the smallest eigenvalue",
        caption=(
            "Each line a meta-training. Error: of the series against what its matrix gives when"
            f" solved; needed: the depth at which that is {wanted:g}."
        ),
        frame=frame,
        columns={
            "method": "matrix",
            "l2_scale": Column("l2", "{:g}"),
            "seed": "seed",
            "smallest_eigenvalue_scale": Column("smallest eigenvalue", "{:.4f}"),
            "largest_eigenvalue_scale": Column("largest", "{:.3f}"),
            "condition": Column("condition", "{:.0f}"),
            "depth": "depth",
            "solved_relative_error": Column("error", "{:.2g}"),
            "depth_needed": "needed",
        },
        notes=[
            "The error falls with (1 - smallest / scale) to the power of the depth, where the scale"
            " is at least the largest eigenvalue: the depth that is needed is in proportion to the"
            " condition number."
        ],
    )


def depth(depth: pd.DataFrame) -> Table:
    return Table(
        title="Curvatures, series and depth",
        caption=(
            "Predicted change of the meta-parameters when a task's weight falls: against central"
            " differences of the re-solved problem (infinitesimal), and against leaving the task"
            " out."
        ),
        frame=depth[depth["kind"] == "error"],
        columns={
            "method": "matrix",
            "solver": "solver",
            "depth": "depth",
            "relative_error": Column("error, infinitesimal", "{:.2g}"),
            "cosine": Column("cosine, infinitesimal", ACCURACY),
            "loo_relative_error": Column("error, left out", "{:.2f}"),
            "loo_cosine": Column("cosine, left out", ACCURACY),
            "residual_ratio": Column("residual", "{:.1e}"),
            "products": "products",
            "solve_seconds": Column("s", "{:.2f}"),
        },
        notes=[
            "Seconds are of the processor, once, for all tasks of the check.",
            f"'{labels.NO_EDIT}' predicts that nothing changes: what a prediction must beat.",
        ],
    )


def cost(cost: pd.DataFrame) -> Table:
    times = seconds(cost)
    counts = cost[cost["kind"] == "counts"].iloc[0]
    base = times[labels.SCORE_ALL]
    n = int(counts["tasks"])
    lines = []
    for name in times.columns:
        found = ratio(times[name].tolist(), base.tolist())
        spread = f"{found.low:.2f} to {found.high:.2f}"
        lines.append(
            {
                "variant": name,
                "work_seconds": times[name].median(),
                "over": found.value,
                "spread": spread,
            }
        )
        if name.startswith(labels.RETRAIN_PREFIX):
            lines.append(
                {
                    "variant": name.replace("one", f"each of {n} tasks"),
                    "over": n * found.value,
                    "spread": None,
                }
            )
    return Table(
        title="Time against retraining",
        caption=(
            f"{n} tasks, {int(counts['meta_parameters'])} meta-parameters; in turns, processor"
            f" seconds. One solve took {int(counts['products'])} products of"
            f" {int(counts['inner_solves'] / counts['products'] / n)} inner solves a task."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "variant": "what",
            "work_seconds": Column("s", SECONDS),
            "over": Column("over scoring all tasks", "{:.2f}x"),
            "spread": "interval",
        },
        notes=[
            "Rows of all tasks multiply the time of one; retraining starts from the full solution."
        ],
    )


def seconds(cost: pd.DataFrame) -> pd.DataFrame:
    """Seconds by repeat and variant."""
    timed = cost[cost["kind"] == "time"]
    return timed.pivot_table(index="repeat", columns="variant", values="work_seconds", sort=False)
