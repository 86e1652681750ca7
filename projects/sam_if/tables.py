"""SAM-IF's tables: rows in, `Table` out."""

import pandas as pd

from projects.sam_if.labels import (
    EDIT_BY_GIF,
    EDIT_BY_HIF,
    RETRAIN,
    RETRAIN_BATCHES,
    RETRAIN_WARM,
    SAM_HIF,
    SAM_HIF_FLOAT32,
)
from shared.statistics import Ratio, mean_interval, ratio
from shared.tables import Column, Table

UNKNOWN = (
    "We had no access to the paper's numbers; data, models and hyper-parameters here are ours."
)
SEEDS = (
    "Intervals: Student's, 95 %, over the seeds (which draw the images, the wrong labels and what"
    " is removed)."
)
NO_EDIT_ROW = "No edit: the weights as they are, whose error is 1 by its definition."
TERMS = (
    '"No term in r" leaves out c Ht P grad l_k (the last term of equation 9, which the paper is'
    ' told to drop), "no term in J" leaves out c Ht P H.'
)


def shown_interval(values: pd.Series, digits: int = 3) -> str:
    """ "0.912 ± 0.004"; "–" where there is nothing."""
    mean, low, _ = mean_interval(values)
    if mean != mean:
        return "–"
    return f"{mean:.{digits}f}" + (f" ± {mean - low:.{digits}f}" if low == low else "")


def _by(frame: pd.DataFrame, keys: list[str], columns: dict[str, int]) -> pd.DataFrame:
    lines = []
    for key, rows in frame.groupby(keys, sort=False):
        lines.append(
            dict(zip(keys, key, strict=True))
            | {one: shown_interval(rows[one], digits) for one, digits in columns.items()}
        )
    return pd.DataFrame(lines)


def _with_largest(frame: pd.DataFrame, keys: list[str], columns: dict[str, int]) -> pd.DataFrame:
    """`_by` with the largest error against the derivative."""
    largest = frame.groupby(keys, sort=False)["derivative_error"].max().to_numpy()
    return _by(frame, keys, columns).assign(derivative_error=largest)


def agreement(agreement: pd.DataFrame) -> Table:
    columns = {
        "parameter_error": 4,
        "pearson_correlation": 4,
        "spearman_correlation": 4,
        "lds_correlation": 4,
    }
    first = agreement.iloc[0]
    return Table(
        title="Scores against retraining, at SAM's fixed point",
        caption=(
            f"Softmax regression on principal components, {first['n']} images, labels a tenth"
            f" wrong, rho {first['rho_scale']:g}, l2 {first['l2_scale']:g},"
            f" {agreement['seed'].nunique()} seeds. Left out one at a time: error of the"
            " parameters' change, and correlation of the change of the mean test loss; LDS over"
            " halves of the data."
        ),
        frame=_with_largest(agreement, ["dataset", "method"], columns),
        columns={
            "dataset": "data",
            "method": "method",
            "parameter_error": "error of the parameters' change",
            "derivative_error": Column("error, derivative (largest)", _or_dash("{:.1e}")),
            "pearson_correlation": "Pearson",
            "spearman_correlation": "Spearman",
            "lds_correlation": "LDS",
        },
        notes=[
            UNKNOWN,
            SEEDS,
            TERMS,
            NO_EDIT_ROW,
            (
                "The truth is solved to its end and does not depend on a seed of the optimizer: its"
                " ceiling is 1."
            ),
            "Change of the curvature from w to the perturbed point, along the true changes: "
            + ", ".join(
                f"{name} {100 * value:.1f} %"
                for name, value in (
                    agreement.groupby("dataset", sort=False)["curvature_change_share"]
                    .mean()
                    .items()
                )
            )
            + ". It is all that SAM-IF has before IF.",
        ],
    )


def trajectory(trajectory: pd.DataFrame) -> Table:
    columns = {
        "parameter_error": 3,
        "parameter_cosine": 3,
        "pearson_correlation": 3,
        "spearman_correlation": 3,
        "lds_correlation": 3,
    }
    first = trajectory.iloc[0]
    return Table(
        title="Scores against retraining, a network that is at no fixed point",
        caption=(
            f"A tanh network after a few epochs of SAM with batches and momentum, {first['n']}"
            f" images, labels a tenth wrong, rho {first['rho_scale']:g},"
            f" {trajectory['seed'].nunique()} seeds. The truth is the same run without the sample."
        ),
        frame=_by(trajectory, ["dataset", "method"], columns),
        columns={
            "dataset": "data",
            "method": "method",
            "parameter_error": "error of the parameters' change",
            "parameter_cosine": "its cosine",
            "pearson_correlation": "Pearson",
            "spearman_correlation": "Spearman",
            "lds_correlation": "LDS",
        },
        notes=[
            UNKNOWN,
            SEEDS,
            (
                f"|F| at the end of the run is {trajectory['residual_norm'].min():.2g} to"
                f" {trajectory['residual_norm'].max():.2g}, far from the fixed point that SAM-HIF,"
                " SAM-IF and IF assume; they take damped Gauss-Newton matrices here."
            ),
            (
                NO_EDIT_ROW
                + " The run with another seed: how well the true effects of one run predict those"
                " of a run with another start and other batches."
            ),
        ],
    )


def editing(editing: pd.DataFrame, speed: pd.DataFrame) -> Table:
    frame = to_retraining(editing)
    frame["accuracy_gap"] = frame["accuracy_difference"].abs()
    frame["percent"], frame["same"] = 100 * frame["test_accuracy"], 100 * frame["same_class_share"]
    cells = frame.groupby(["dataset", "model", "removed_share", "method"], sort=False)
    shown = cells[["predicted_loss_difference", "true_loss_difference"]].mean().reset_index()
    for column, digits in (
        ("percent", 2),
        ("accuracy_gap", 2),
        ("same", 2),
        ("parameter_error", 3),
    ):
        shown[column] = [shown_interval(rows[column], digits) for _, rows in cells]
    gains = times_over(speed, RETRAIN_BATCHES, [EDIT_BY_HIF, EDIT_BY_GIF])
    said = ", ".join(
        f"{name} {one.value:.2g}x ({one.low:.2g} to {one.high:.2g})" for name, one in gains.items()
    )
    ends = times_over(speed, RETRAIN_WARM, [EDIT_BY_HIF])[EDIT_BY_HIF]
    return Table(
        title="Taking samples out of a model against retraining",
        caption=(
            "The paper's table 1 and figure 1 in structure. Random samples are taken out by one"
            " solve (or, SAM-GIF and TracIn, by the gradients of a run), and the model is held"
            f" against the one retrained without them; means of {editing['seed'].nunique()} seeds."
        ),
        frame=shown,
        columns={
            "dataset": "data",
            "model": "model",
            "removed_share": Column("removed", "{:.0%}"),
            "method": "method",
            "percent": "test accuracy, %",
            "accuracy_gap": "from Retrain's, points",
            "same": "same class as Retrain, %",
            "parameter_error": "error of the parameters' change",
            "predicted_loss_difference": Column(
                "predicted change of the loss", _or_dash("{:+.2e}")
            ),
            "true_loss_difference": Column("true change", _or_dash("{:+.2e}")),
        },
        notes=[
            UNKNOWN,
            (
                "Time of Retrain (a run with batches, softmax regression, experiment `speed`) over"
                f" that of the edit: {said}; over that of the edit by SAM-HIF when training goes on"
                f" from the solution with its Jacobian factored before: {ends.value:.2g}x"
                f" ({ends.low:.2g} to {ends.high:.2g})."
            ),
            (
                "No edit: the model as it is, which an edit must be nearer to Retrain than. TRAK"
                " predicts the loss and changes no weights. From Retrain's: the mean of the"
                " absolute differences."
            ),
            SEEDS,
        ],
    )


def to_retraining(editing: pd.DataFrame) -> pd.DataFrame:
    """The rows with `accuracy_difference` in points to the model retrained without the same
    samples; NaN where nothing was removed.
    """
    keys = ["dataset", "model", "seed", "removed_share"]
    retrained = editing[editing["method"] == RETRAIN].set_index(keys)["test_accuracy"]
    frame = editing.join(retrained.rename("retrained"), on=keys)
    return frame.assign(
        accuracy_difference=100 * (frame["test_accuracy"] - frame["retrained"])
    ).drop(columns="retrained")


def _or_dash(form: str):
    return lambda value: form.format(value) if value == value else "–"


def removal(removal: pd.DataFrame) -> Table:
    curves = removal[removal["kind"] == "curve"].copy()
    curves["percent"] = 100 * curves["test_accuracy"]
    lines = []
    for (dataset, method), rows in curves.groupby(["dataset", "method"], sort=False):
        cells = {
            f"removed {100 * share:.0f} %": shown_interval(one["percent"], 2)
            for share, one in rows.groupby("removed_share")
        }
        lines.append({"dataset": dataset, "method": method, **cells})
    frame = pd.DataFrame(lines)
    shares = [f"removed {100 * share:.0f} %" for share in sorted(curves["removed_share"].unique())]
    frame = frame[["dataset", "method", *shares]].fillna("–")
    return Table(
        title="Test accuracy after the most harmful samples are removed",
        caption=(
            f"The paper's figure 2 in structure. {100 * curves['flipped_share'].iloc[0]:.0f} % of"
            " the labels are wrong; softmax regression, retrained with SAM after each removal."
            f" Accuracy in %, mean of {curves['seed'].nunique()} seeds."
        ),
        frame=frame,
        columns={"dataset": "data", "method": "method", **{one: one for one in shares}},
        notes=[
            UNKNOWN,
            SEEDS,
            (
                "Harm: the predicted fall of the loss on clean validation images. Self-influence"
                " and the sample's own loss need none."
            ),
        ],
    )


def detection(removal: pd.DataFrame) -> Table:
    found = removal[removal["kind"] == "detection"]
    return Table(
        title="Finding wrong labels",
        caption=(
            f"{100 * found['flipped_share'].iloc[0]:.0f} % of the labels are wrong; area under the"
            " ROC curve, and the share of wrong ones among as many of the most harmful as there"
            " are wrong ones."
        ),
        frame=_by(found, ["dataset", "method"], {"detection_auc": 4, "detection_precision": 3}),
        columns={
            "dataset": "data",
            "method": "method",
            "detection_auc": "AUROC",
            "detection_precision": "precision",
        },
        notes=[
            UNKNOWN,
            SEEDS,
            "Loss: the sample's own loss in the trained model, which costs one forward pass.",
        ],
    )


def radius(radius: pd.DataFrame) -> Table:
    columns = {"parameter_error": 4, "perturbation_ratio": 2}
    frame = _with_largest(radius, ["rho_scale", "method"], columns)
    return Table(
        title="Errors against the radius",
        caption=(
            "Softmax regression at SAM's fixed point. Error of the parameters' change against"
            " retraining without a sample, and the largest one against the finite difference of the"
            " solution found anew."
        ),
        frame=frame,
        columns={
            "rho_scale": Column("rho", "{:g}"),
            "method": "method",
            "perturbation_ratio": "rho / |g|",
            "parameter_error": "error, sample left out",
            "derivative_error": Column("error, derivative (largest)", "{:.1e}"),
        },
        notes=[UNKNOWN, SEEDS, TERMS],
    )


def times_over(
    speed: pd.DataFrame, slow: str, fast: list[str], queries: int = 1
) -> dict[str, Ratio]:
    """The time of `slow` over that of each of `fast` for so many queries, round by round."""
    timed = speed[(speed["kind"] == "time") & (speed["queries"] == queries)]
    seconds = {
        name: rows.sort_values("repeat")["work_seconds"].to_numpy(float)
        for name, rows in timed.groupby("method")
    }
    return {name: ratio(seconds[slow], seconds[name]) for name in fast}


def queries(speed: pd.DataFrame) -> Table:
    solved = list(dict.fromkeys(speed.loc[speed["queries"] > 1, "method"]))
    lines = []
    for (count, name), rows in speed[speed["method"].isin(solved)].groupby(
        ["queries", "method"], sort=False
    ):
        over = times_over(speed, str(name), [SAM_HIF_FLOAT32], int(count))[SAM_HIF_FLOAT32]
        cost = rows[rows["kind"] == "cost"].iloc[0]
        lines.append(
            {
                "queries": count,
                "method": name,
                "seconds": rows["work_seconds"].median(),
                "over": f"{over.value:.2f}x ({over.low:.2f} to {over.high:.2f})",
                "score_error": cost["score_error"],
                "products": cost["curvature_products"],
            }
        )
    return Table(
        title="Scoring for several queries",
        caption=(
            "The methods that solve, in float32: each query has scores of its own. Process time on"
            " one thread, methods in turns."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "queries": "queries",
            "method": "method",
            "seconds": "time",
            "over": "over SAM-HIF's",
            "score_error": Column("relative error of the scores, worst query", "{:.1e}"),
            "products": Column("curvature products", _or_dash("{:.0f}")),
        },
        notes=[
            UNKNOWN,
            (
                "SAM-HIF solves for all queries in one space of directions, IF by conjugate"
                " gradients of all at once; dattri's conjugate gradients stop after the number of"
                " iterations that is named."
            ),
        ],
    )


def speed(speed: pd.DataFrame) -> Table:
    speed = speed[speed["queries"] == 1]
    timed = speed[(speed["kind"] == "time") & (speed["task"] == "score")]
    costs = speed[speed["kind"] == "cost"].set_index("method")
    n = int(timed["n"].iloc[0])
    lines = []
    for name, rows in timed.groupby("method", sort=False):
        over = times_over(speed, str(name), [SAM_HIF])[SAM_HIF]
        lines.append(
            {
                "method": name,
                "seconds": rows["work_seconds"].median(),
                "over": f"{over.value:.2f}x ({over.low:.2f} to {over.high:.2f})",
                "score_error": costs.loc[name, "score_error"],
                "passes": _passes(costs.loc[name]),
            }
        )
    once = times_over(speed, RETRAIN_BATCHES, [SAM_HIF])[SAM_HIF]
    train = speed[(speed["kind"] == "time") & (speed["method"] == RETRAIN_BATCHES)][
        "work_seconds"
    ].median()
    lines.append(
        {
            "method": f"retraining, {n} times",
            "seconds": n * train,
            "over": f"{n * once.value:,.0f}x",
            "passes": "–",
        }
    )
    return Table(
        title=f"Scoring {n} samples for one query",
        caption=(
            f"Softmax regression of {int(timed['parameters'].iloc[0])} parameters, from trained"
            f" weights to {n} scores; process time on one thread, methods in turns."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "method": "method",
            "seconds": "time",
            "over": "over SAM-HIF's",
            "score_error": Column("relative error of the scores", _or_dash("{:.1e}")),
            "passes": "passes over the data",
        },
        notes=[
            UNKNOWN,
            (
                "Medians over rounds; an interval holds the true median with a probability of at"
                " least 95 %."
            ),
            (
                "Error: against the exact scores of the method's own kind (dense matrices in"
                " float64); dattri and captum work in float32."
            ),
            (
                "Passes: gradients / curvature products / forward-mode derivatives / per-sample"
                " gradients, of this package's own methods."
            ),
            (
                "SAM-GIF makes the training run twice. TracIn takes 5 saved checkpoints. One"
                " training is timed and multiplied by their number."
            ),
        ],
    )


def _passes(row: pd.Series) -> str:
    counts = [
        row[one]
        for one in ("gradients", "curvature_products", "forward_mode", "per_sample_gradients")
    ]
    return "–" if any(one != one for one in counts) else " / ".join(f"{int(one)}" for one in counts)


def resnet(resnet: pd.DataFrame) -> Table:
    first = resnet.iloc[0]
    scores, curves = resnet[resnet["kind"] == "scores"], resnet[resnet["kind"] == "curve"]
    lines = []
    for method, rows in curves.groupby("method", sort=False):
        own = scores[scores["method"] == method]
        line = {"method": method} | {
            one: shown_interval(own[one].astype(float))
            for one in ("lds_correlation", "detection_auc")
        }
        line["solve"] = (
            f"{own['products'].mean():.0f} / {own['solve_error'].max():.1e}"
            if own["products"].notna().any()
            else "–"
        )
        for share, one in rows.groupby("removed_share"):
            line[f"removed {100 * share:.0f} %"] = shown_interval(100 * one["test_accuracy"], 2)
        lines.append(line)
    frame = pd.DataFrame(lines).fillna("–")
    return Table(
        title="A ResNet-18 trained with SAM",
        caption=(
            f"{first['n']} images of {first['dataset']}, {100 * first['flipped_share']:.0f} % of"
            f" the labels wrong, {first['parameters']:,} parameters. Agreement with the same run on"
            " halves of the images (LDS), finding wrong labels (AUROC), and the test accuracy in %"
            " after the most harmful are taken out."
        ),
        frame=frame,
        columns={
            "method": "method",
            "lds_correlation": "LDS",
            "detection_auc": "AUROC",
            "solve": "products / residual",
            **{name: name for name in frame.columns if name.startswith("removed")},
        },
        notes=[
            UNKNOWN,
            (
                f"Gauss-Newton curvature, damped by {scores['damping_scale'].dropna().iloc[0]:.2g};"
                " products with the matrix over all queries. GroupNorm stands in for BatchNorm."
            ),
        ],
    )
