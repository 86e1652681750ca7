"""ECIF's tables: rows in, `Table` out."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from projects.ecif.labels import (
    BEFORE_FINE_TUNING,
    ECIF,
    ECIF_LINEAR,
    FINE_TUNED,
    NO_REMOVAL,
    POSITIVE_ONLY,
    RETRAIN,
)
from shared.statistics import Mean, mean_interval, ratio
from shared.tables import Column, Table, human_bytes, paper_numbers


def mean(values: Sequence[float]) -> Mean:
    """The mean of one value a seed, and its interval; of one seed, the value alone."""
    found = mean_interval(values)
    return Mean(found.value, found.value, found.value) if np.isnan(found.low) else found


def paired(
    frame: pd.DataFrame,
    column: str,
    first: str,
    second: str,
    by: Sequence[str] = ("seed",),
    label: str = "method",
) -> Mean:
    """The mean over seeds of first - second in a column; other rows of a seed (draws, pairs) are
    averaged first.
    """
    means = frame.groupby([*by, label])[column].mean().unstack(label)
    return mean((means[first] - means[second]).dropna())


def spread(value: Mean, percent: bool = True, digits: int = 1) -> str:
    """'22.1 ± 0.8': a mean and half the width of its interval, where it has one."""
    scale = 100 if percent else 1
    shown = f"{scale * value.value:.{digits}f}"
    return (
        shown
        if value.low == value.high
        else f"{shown} ± {scale * (value.high - value.low) / 2:.{digits}f}"
    )


def distances(edits: pd.DataFrame, unedited: pd.DataFrame) -> pd.DataFrame:
    """How far the accuracy of ECIF's edit is from that of retraining, and that of the model without
    an edit, which is what an edit must beat: a row for every removal of a seed, with the signed
    differences `edited` and `unedited`.
    """
    keys = [key for key in ("dataset", "seed", "kind", "share", "draw") if key in edits]
    indexed = edits.set_index(keys)
    retrained = indexed.loc[indexed["method"] == RETRAIN, "test_accuracy"]
    edited = indexed.loc[indexed["method"] == ECIF, "test_accuracy"] - retrained
    before = unedited.set_index(["dataset", "seed"])["test_accuracy"]
    found = pd.DataFrame({"edited": edited, "retrained": retrained}).reset_index()
    at = pd.MultiIndex.from_frame(found[["dataset", "seed"]])
    found["unedited"] = before.loc[at].to_numpy() - found["retrained"].to_numpy()
    return found


def fine_tuned(clip: pd.DataFrame) -> pd.DataFrame:
    """The rows of the CLIP as it was fine-tuned on all pairs, with clean captions."""
    fits = clip[(clip["part"] == "fit") & (clip["shuffled_share"] == 0)]
    return fits[fits["method"] == FINE_TUNED]


INTERVAL = (
    "± is half of a 95 % interval (Student's t) over seeds, which draw the split, the heads, the"
    " batches and what is removed at random."
)


def removal(removal: pd.DataFrame) -> Table:
    lines = []
    for (dataset, kind, share), rows in removal[removal["kind"] != "none"].groupby(
        ["dataset", "kind", "share"], sort=False
    ):
        if share > 0.1:
            continue
        full = removal[(removal["dataset"] == dataset) & (removal["kind"] == "none")]
        by = dict(iter(rows.groupby("method")))
        lines.append(
            {
                "dataset": dataset,
                "kind": kind,
                "removed_share": share,
                "full": spread(mean(full.groupby("seed")["test_accuracy"].mean())),
                "retrain": spread(mean(by[RETRAIN].groupby("seed")["test_accuracy"].mean())),
                "ecif": spread(mean(by[ECIF].groupby("seed")["test_accuracy"].mean())),
                "gap": spread(paired(rows, "test_accuracy", ECIF, RETRAIN)),
                "null": spread(mean(distances(rows, full).groupby("seed")["unedited"].mean())),
                **{
                    key: spread(
                        mean(by[method].groupby("seed")["parameter_error"].mean()),
                        percent=False,
                        digits=2,
                    )
                    for key, method in (
                        ("error", ECIF),
                        ("paper_error", ECIF_LINEAR),
                        ("positive_error", POSITIVE_ONLY),
                    )
                },
                "seeds": int(rows["seed"].nunique()),
            }
        )
    worst = removal["gradient_norm"].max()
    repeated = ", ".join(
        f"{name} {share:.0%}"
        for name, share in removal.groupby("dataset", sort=False)["repeated_share"].mean().items()
    )
    return Table(
        title="ECIF's edit against retraining",
        caption=(
            "Test accuracy in percent without pairs removed at random, the most valuable or the"
            " most harmful first, and the error of the predicted change of the parameters over the"
            " true one."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "dataset": "data",
            "kind": "removed",
            "removed_share": Column("share", "{:.0%}"),
            "full": "all pairs",
            "retrain": "retrained",
            "ecif": ECIF,
            "gap": "ECIF - retrained",
            "null": "all pairs - retrained",
            "error": "error, ECIF",
            "paper_error": "error, linear",
            "positive_error": "error, positive only",
            "seeds": "seeds",
        },
        paper=paper_numbers("ecif", "removal"),
        notes=[
            INTERVAL,
            (
                "All pairs - retrained: the model without an edit, which an edit must beat; its"
                " error of the parameters is 1."
            ),
            f"Every fit and retraining ended at a gradient of norm {worst:.1e} or less.",
            (
                f"Pairs whose caption another of their batch has, too: {repeated}. The loss takes"
                " those for negatives, as CLIP does."
            ),
            (
                "Emoji: the picture's own caption among a batch of 32 (chance 3 %). Others: the"
                " class among ten captions. Times: table cost."
            ),
        ],
    )


def _cell(frame: pd.DataFrame) -> pd.Series:
    return (
        frame["dataset"]
        + ", "
        + (100 * frame["shuffled_share"]).round().astype(int).astype(str)
        + " % exchanged"
    )


def harmful(misalignment: pd.DataFrame) -> Table:
    frame = misalignment.assign(cell=_cell(misalignment))
    shown = frame[frame["test_accuracy"].notna()]
    cells = list(dict.fromkeys(shown["cell"]))
    lines = []
    for method in dict.fromkeys(shown["method"]):
        line = {"method": method}
        for number, cell in enumerate(cells):
            rows = shown[shown["cell"] == cell]
            line[f"cell_{number}"] = spread(
                mean(rows.loc[rows["method"] == method, "test_accuracy"])
            )
            line[f"gain_{number}"] = (
                "–"
                if method == NO_REMOVAL
                else spread(paired(rows, "test_accuracy", method, NO_REMOVAL))
            )
        lines.append(line)
    columns: dict[str, Column | str] = {"method": "removed by"}
    for number, cell in enumerate(cells):
        columns |= {f"cell_{number}": cell, f"gain_{number}": "gain"}
    return Table(
        title="The most harmful tenth removed",
        caption=(
            "Captions of a share of the pairs are exchanged; the model is retrained without the"
            " tenth that a method ranks most harmful. Test accuracy in percent, and what it gains"
            " over no removal."
        ),
        frame=pd.DataFrame(lines),
        columns=columns,
        paper=paper_numbers("ecif", "harmful"),
        notes=[
            INTERVAL,
            (
                "Known exchanged: a tenth is removed of which all captions are known to be"
                " exchanged; the best that could be done."
            ),
        ],
    )


def clip_removal(clip: pd.DataFrame) -> Table:
    part = clip[clip["part"] == "removal"]
    full = clip[(clip["part"] == "fit") & (clip["shuffled_share"] == 0)]
    lines = []
    for (kind, share), rows in part.groupby(["kind", "share"], sort=False):
        means = {
            method: mean(own.groupby("seed")["test_accuracy"].mean())
            for method, own in rows.groupby("method")
        }
        seconds = {
            method: own.sort_values("seed")["work_seconds"]
            for method, own in rows.groupby("method")
        }
        over = ratio(seconds[RETRAIN].to_numpy(), seconds[ECIF].to_numpy())
        lines.append(
            {
                "kind": kind,
                "removed_share": share,
                "retrain": spread(means["retrain"]),
                **{
                    key: spread(means[method])
                    for key, method in (
                        ("ecif", ECIF),
                        ("linear", ECIF_LINEAR),
                        ("positive", POSITIVE_ONLY),
                    )
                },
                "gap": spread(paired(rows, "test_accuracy", ECIF, RETRAIN)),
                "null": spread(
                    mean(distances(rows, fine_tuned(clip)).groupby("seed")["unedited"].mean())
                ),
                "retrain_seconds": seconds[RETRAIN].median(),
                "ecif_seconds": seconds[ECIF].median(),
                "speed": f"{over.value:.2f}x",
                "error": rows.loc[rows["method"] == ECIF, "parameter_error"].mean(),
                "cosine": rows.loc[rows["method"] == ECIF, "parameter_cosine"].mean(),
            }
        )
    before, after = (full[full["method"] == name] for name in (BEFORE_FINE_TUNING, FINE_TUNED))
    edits = part[part["residual_ratio"].notna()]
    return Table(
        title="A CLIP with LoRA: ECIF's edit against retraining",
        caption=(
            f"{_clip(clip)}. Test accuracy in percent without pairs removed at random, the most"
            f" valuable or the most harmful first; {spread(mean(before['test_accuracy']))} before"
            f" fine-tuning, {spread(mean(after['test_accuracy']))} after."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "kind": "removed",
            "removed_share": Column("share", "{:.0%}"),
            "retrain": "retrained",
            "ecif": ECIF,
            "linear": "ECIF, linear",
            "positive": POSITIVE_ONLY,
            "gap": "ECIF - retrained",
            "null": "all pairs - retrained",
            "retrain_seconds": "time, retrained",
            "ecif_seconds": "time, ECIF",
            "speed": "retrained over ECIF",
            "error": Column("error of the change", "{:.2f}"),
            "cosine": Column("its cosine", "{:.2f}"),
        },
        paper=paper_numbers("ecif", "removal"),
        notes=[
            INTERVAL,
            (
                "Fine-tuning ends at no minimum: the gradient's norm is"
                f" {after['gradient_norm'].mean():.3g}, before it"
                f" {before['gradient_norm'].mean():.3g}. So ECIF takes the Gauss-Newton matrix,"
                " damped, by conjugate gradients that stop early: relative residual"
                f" {edits['residual_ratio'].median():.2g} (median), {edits['products'].max():.0f}"
                " products an edit."
            ),
            (
                "Pairs whose caption another of their batch has, too:"
                f" {full['repeated_share'].mean():.0%}."
            ),
            (
                "Times: medians over seeds; an edit's has that of finding the damping in it. Error"
                " and cosine: of the predicted change of the parameters."
            ),
        ],
    )


def clip_harmful(clip: pd.DataFrame) -> Table:
    part = clip[clip["part"] == "harmful"]
    exchanged = (part["shuffled_share"] > 0).any()
    lines = []
    for method in dict.fromkeys(part["method"]):
        line = {"method": method} | ({"auc": "–"} if exchanged else {})
        for number, (_, rows) in enumerate(part.groupby("shuffled_share")):
            own = rows[rows["method"] == method]
            line[f"cell_{number}"] = spread(mean(own["test_accuracy"]))
            line[f"gain_{number}"] = (
                "–"
                if method == NO_REMOVAL
                else spread(paired(rows, "test_accuracy", method, NO_REMOVAL))
            )
            if exchanged and len(found := own["detection_auc"].dropna()):
                line["auc"] = spread(mean(found), percent=False, digits=2)
        lines.append(
            {**line, "score_seconds": part.loc[part["method"] == method, "work_seconds"].median()}
        )
    columns: dict[str, Column | str] = {"method": "removed by"}
    for number, share in enumerate(sorted(part["shuffled_share"].unique())):
        columns |= {
            f"cell_{number}": f"{share:.0%} exchanged" if share else "clean captions",
            f"gain_{number}": "gain",
        }
    return Table(
        title="A CLIP with LoRA: the most harmful tenth removed",
        caption=(
            f"{_clip(clip)}. Retrained without the tenth that a method ranks most harmful:"
            " test accuracy in percent, and what it gains over no removal."
        ),
        frame=pd.DataFrame(lines),
        columns={
            **columns,
            **({"auc": "AUROC of exchanged captions"} if exchanged else {}),
            "score_seconds": "time to score",
        },
        paper=paper_numbers("ecif", "harmful"),
        notes=[
            INTERVAL,
            (
                "IF-EKFAC, TRAK and TracIn take the pair's own loss; TracIn's checkpoints are the"
                " ends of the epochs."
            ),
        ],
    )


def _clip(clip: pd.DataFrame) -> str:
    """What was fine-tuned on what; random weights tell time and memory and nothing else."""
    first = clip.iloc[0]
    random_weights = " weights: time and memory only" if first["weights"] == "random" else ""
    told = f"{first['model']} ({first['weights']}{random_weights})"
    peaks = clip.loc[clip["part"] == "memory", "peak_bytes"] if "peak_bytes" in clip else []
    memory = f", {human_bytes(peaks.max())} at the peak" if len(peaks) else ""
    return (
        f"{told} on {first['pairs']} pairs of {first['dataset']}, {first['classes']} classes,"
        f" {first['parameters']} parameters{memory}"
    )


def misalignment(misalignment: pd.DataFrame) -> Table:
    found = misalignment[misalignment["detection_auc"].notna()]
    lines = []
    for (dataset, share, method), rows in found.groupby(
        ["dataset", "shuffled_share", "method"], sort=False
    ):
        lines.append(
            {
                "dataset": dataset,
                "base_share": share,
                "method": method,
                "clean_pairs": int(rows["clean_pairs"].iloc[0]),
                "ten": spread(mean(rows["ten_precision"]), percent=False, digits=2),
                "auc": spread(mean(rows["detection_auc"]), percent=False, digits=3),
                "ap": spread(mean(rows["average_precision"]), percent=False, digits=3),
                "seeds": int(rows["seed"].nunique()),
            }
        )
    full = misalignment[misalignment["method"] == NO_REMOVAL]
    cosines = (
        full.assign(cell=_cell(full)).groupby("cell", sort=False)["clean_gradient_cosine"].mean()
    )
    agreement = "; ".join(f"{cell} {value:.2f}" for cell, value in cosines.items())
    return Table(
        title="Exchanged captions found",
        caption="How well the most harmful pairs are those whose caption was exchanged.",
        frame=pd.DataFrame(lines),
        columns={
            "dataset": "data",
            "base_share": Column("base rate", "{:.0%}"),
            "method": "ranked by",
            "clean_pairs": "clean pairs given",
            "ten": "precision at 10",
            "auc": "AUROC",
            "ap": "average precision",
            "seeds": "seeds",
        },
        paper=paper_numbers("ecif", "headline"),
        notes=[
            INTERVAL,
            (
                "A ranking by chance has the base rate for its precision and average precision, and"
                " an AUROC of 0.5."
            ),
            (
                "Cosine of two clean sets' gradients, which the scores are products with:"
                f" {agreement}."
            ),
        ],
    )


def ablation(ablation: pd.DataFrame) -> Table:
    errors = ablation[ablation["kind"] != "scores"]
    scores = (
        ablation[ablation["kind"] == "scores"]
        .groupby(["delta_ratio", "curvature"])["score_correlation"]
        .mean()
    )
    lines = []
    keys = ["delta_ratio", "curvature", "dimension", "variant", "kind", "removed_share"]
    for (delta, curvature, dimension, variant, kind, share), rows in errors.groupby(
        keys, sort=False
    ):
        ranked = np.nan
        if kind == "pair":
            agreements = [
                part["predicted_difference"].corr(part["true_difference"], "spearman")
                for _, part in rows.groupby("seed")
            ]
            ranked = float(np.mean(agreements))
        lines.append(
            {
                "delta_ratio": delta,
                "curvature": curvature,
                "dimension": dimension,
                "variant": variant,
                "removed": "one pair" if kind == "pair" else f"{share:.0%}",
                "error": spread(
                    mean(rows.groupby("seed")["parameter_error"].mean()), percent=False, digits=3
                ),
                "cosine": spread(
                    mean(rows.groupby("seed")["parameter_cosine"].mean()), percent=False, digits=3
                ),
                "rank_correlation": ranked,
                "score_correlation": (
                    scores[delta, curvature] if variant == "exact" and kind == "pair" else np.nan
                ),
            }
        )
    return Table(
        title="Parts, curvature and regulariser",
        caption=(
            "The predicted change of the parameters against retraining: relative error and cosine;"
            " rank correlation of predicted and true change of the validation loss over single"
            " pairs; and of all pairs' scores with those by the whole Hessian."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "delta_ratio": Column("delta", "{:g}"),
            "curvature": "curvature",
            "dimension": "dimension",
            "variant": "parts",
            "removed": "removed",
            "error": "relative error",
            "cosine": "cosine",
            "rank_correlation": Column("rank correlation with truth", "{:.2f}"),
            "score_correlation": Column("scores with the Hessian's", "{:.3f}"),
        },
        notes=[
            INTERVAL,
            (
                "Largest norm of a gradient at the end of a training:"
                f" {ablation['gradient_norm'].max():.1e}."
            ),
        ],
    )


def trace(trace: pd.DataFrame) -> Table:
    lines = [
        {
            "ranking": ranking,
            "same": spread(mean(rows.groupby("seed")["same_share"].mean())),
            "got": spread(mean(rows.groupby("seed")["got_share"].mean())),
            "queries": len(rows),
        }
        for ranking, rows in trace.groupby("ranking", sort=False)
    ]
    return Table(
        title="Mispredictions traced back",
        caption=(
            "Share of the five highest training pairs, in percent, that are of the wrongly"
            " captioned picture's own sub-category, and of the sub-category of the caption that it"
            " got."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "ranking": "ranked by",
            "same": "same sub-category",
            "got": "sub-category it got",
            "queries": "queries",
        },
        notes=[
            "± is half of a 95 % interval (Student's t) over seeds. There is no truth for a"
            " trace; cosine is of the pictures' embeddings."
        ],
    )


def costs(cost: pd.DataFrame) -> pd.DataFrame:
    """Per task and method: median seconds, the time over ECIF's with its interval, and the passes
    over the data.
    """
    timed, passes = cost[cost["kind"] == "time"], cost[cost["kind"] == "passes"]
    lines = []
    for (task, method), rows in timed.groupby(["task", "method"], sort=False):
        own = timed[(timed["task"] == task) & (timed["method"] == ECIF)]
        over = ratio(
            rows.sort_values("repeat")["work_seconds"].to_numpy(),
            own.sort_values("repeat")["work_seconds"].to_numpy(),
        )
        counted = passes[(passes["task"] == task) & (passes["method"] == method)].iloc[0]
        names = ("gradients", "curvature_products", "forward_mode", "per_sample_gradients")
        lines.append(
            {
                "task": task,
                "method": method,
                "work_seconds": rows["work_seconds"].median(),
                "time_ratio": over.value,
                "low_ratio": over.low,
                "high_ratio": over.high,
                "score_error": counted["score_error"],
                "rank_correlation": counted["rank_correlation"],
                **{name: int(counted[name]) for name in names},
            }
        )
    return pd.DataFrame(lines)


def cost(cost: pd.DataFrame) -> Table:
    found = costs(cost)
    found["interval"] = [
        f"{low:.2f} to {high:.2f}" for low, high in found[["low_ratio", "high_ratio"]].to_numpy()
    ]
    first = cost.iloc[0]
    return Table(
        title="Time and passes",
        caption=(
            f"Scoring all {first['pairs']} pairs of {first['dataset']} for a validation loss, and"
            f" one edit; {first['parameters']} parameters."
        ),
        frame=found,
        columns={
            "task": "task",
            "method": "method",
            "work_seconds": "time",
            "time_ratio": Column("over ECIF", "{:.2f}x"),
            "interval": "interval",
            "score_error": Column("relative error of the scores", "{:.1e}"),
            "rank_correlation": Column("ranks with the Hessian's", "{:.3f}"),
            "gradients": "gradients",
            "curvature_products": "curvature products",
            "forward_mode": "forward-mode passes",
            "per_sample_gradients": "passes with each pair's gradient",
        },
        notes=[
            (
                "Medians over rounds in which every variant ran once in turn; process time of one"
                " thread. The interval holds the true median with a probability of at least 95 %."
            ),
            (
                "Error: against the scores of the whole matrix, of the method's own kind. Ranks:"
                " Spearman's correlation with the scores by the whole Hessian."
            ),
            (
                "Retraining's gradients are not counted: it shares no code with the estimators."
                " TracIn's checkpoints are free here."
            ),
        ],
    )
