"""SSCBM's tables: rows in, `Table` out."""

import pandas as pd

from projects.sscbm.labels import CEM, CEM_FULL, LABELLED_ONLY, METHODS, NO_PSEUDO, SETS, SSCBM
from shared.statistics import Mean, Ratio, mean_interval, ratio
from shared.tables import Column, Table, human_bytes, human_seconds, paper_numbers

MAIN_RATIO = 0.1  # of the main table
INTERVAL = (
    "± is half of a 95 % interval (Student's t) over seeds, which draw the training images, those"
    " that are annotated, the weights and the batches. The test images are always the same."
)


def spread(value: Mean, digits: int = 1) -> str:
    """'22.1 ± 0.8': a share as a percentage, and half the width of its interval."""
    shown = f"{100 * value.value:.{digits}f}"
    half = 50 * (value.high - value.low)
    return shown if half != half else f"{shown} ± {half:.{digits}f}"


def paired(
    frame: pd.DataFrame, column: str, first: str, second: str, label: str = "method"
) -> Mean:
    """The mean over seeds of first - second in a column."""
    values = frame.pivot(index="seed", columns=label, values=column)
    return mean_interval((values[first] - values[second]).dropna())


def main(main: pd.DataFrame) -> Table:
    lines = []
    for (dataset, method), rows in main.groupby(["dataset", "method"], sort=False):
        lines.append(
            {
                "dataset": SETS[str(dataset)],
                "method": method,
                "concepts": spread(mean_interval(rows["concept_accuracy"])),
                "auc": spread(mean_interval(rows["concept_auc"])),
                "task": spread(mean_interval(rows["task_accuracy"])),
                "steps": int(rows["steps"].iloc[0]),
                "seeds": len(rows),
                "order": (list(SETS).index(str(dataset)), METHODS.index(str(method))),
            }
        )
    frame = pd.DataFrame(sorted(lines, key=lambda line: line.pop("order")))  # type: ignore[arg-type, return-value]
    first = main.drop_duplicates(["dataset", "seed"])
    return Table(
        title="All methods with a tenth of the images annotated",
        caption=(
            "Accuracy of concepts (cut at 0.5), mean area under their ROC curves, and accuracy of"
            " classes, in %. " + real_ratios(first)
        ),
        frame=frame,
        columns={
            "dataset": "data set",
            "method": "method",
            "concepts": "concepts",
            "auc": "AUC",
            "task": "classes",
            "steps": Column("steps", "{:,}"),
            "seeds": "seeds",
        },
        paper=paper_numbers("sscbm", "main"),
        notes=[
            agreements(first),
            "Majority: of each concept and of the classes, what most annotated images have. KNN"
            " only: the pseudo labels of the test images themselves.",
            "Class-propagated: where all images of a class have the same concepts, each class's"
            " concepts are copied from an annotated image. That makes all annotations, so the row"
            " is that of CEM with all annotations; for concepts of single images there is none.",
            INTERVAL,
        ],
    )


def features(features: pd.DataFrame) -> Table:
    lines = [
        {
            "dataset": SETS[str(dataset)],
            "features": kind,
            "dimensions": int(rows["dimensions"].iloc[0]),
            "labelled": int(rows["labelled"].iloc[0]),
            "classes": spread(mean_interval(rows["class_accuracy"])),
        }
        for (dataset, kind), rows in features.groupby(["dataset", "features"], sort=False)
    ]
    return Table(
        title="Frozen features",
        caption=(
            "Accuracy of the class, in %, by three neighbours among a tenth of the pool: what the"
            " space knows in which pseudo labels are made."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "dataset": "data set",
            "features": "features",
            "dimensions": Column("numbers", "{:,}"),
            "labelled": "labelled",
            "classes": "classes",
        },
        notes=[INTERVAL],
    )


def with_main(swept: pd.DataFrame, main: pd.DataFrame) -> pd.DataFrame:
    """Rows of the sweep, and those of the main table for the same sets; training with all
    annotations is also training on annotated images alone at a share of 1.
    """
    own = main[main["dataset"].isin(swept["dataset"])].copy()
    kept = own[own["method"].isin([*swept["method"].unique(), CEM_FULL])].copy()
    full = kept["method"] == CEM_FULL
    kept["ratio_share"] = MAIN_RATIO
    kept.loc[full, ["ratio_share", "labelled_share"]] = 1.0
    kept.loc[full, "method"] = LABELLED_ONLY
    both = pd.concat([swept.reset_index(drop=True), kept.reset_index(drop=True)])
    return both.sort_values(["dataset", "ratio_share"], kind="stable").reset_index(drop=True)


def ratios(ratios: pd.DataFrame, main: pd.DataFrame) -> Table:
    lines = []
    for (dataset, share, method), rows in with_main(ratios, main).groupby(
        ["dataset", "ratio_share", "method"], sort=False
    ):
        lines.append(
            {
                "dataset": SETS[str(dataset)],
                "nominal": share,
                "labelled_share": float(rows["labelled_share"].mean()),
                "method": method,
                "concepts": spread(mean_interval(rows["concept_accuracy"])),
                "task": spread(mean_interval(rows["task_accuracy"])),
                "seeds": len(rows),
                "order": (str(dataset), share, METHODS.index(str(method))),
            }
        )
    frame = pd.DataFrame(sorted(lines, key=lambda line: line.pop("order")))  # type: ignore[arg-type, return-value]
    return Table(
        title="Other shares of annotated images",
        caption=(
            "Accuracy of concepts and classes, in %. The smallest share is one image a class. At"
            " 100 % there is nothing to make pseudo labels for."
        ),
        frame=frame,
        columns={
            "dataset": "data set",
            "nominal": Column("asked for", "{:.0%}"),
            "labelled_share": "annotated",
            "method": "method",
            "concepts": "concepts",
            "task": "classes",
            "seeds": "seeds",
        },
        paper=_of_figure_1(),
        notes=[INTERVAL],
    )


def _of_figure_1() -> pd.DataFrame:
    """Figure 1 of the paper in the columns of the table."""
    found = paper_numbers("sscbm", "curve")
    return pd.DataFrame(
        {
            "dataset": "CUB",
            "nominal": found["ratio_share"],
            "labelled_share": None,
            "method": "labelled images only",
            "concepts": (100 * found["concept_accuracy"]).map("{:.2f}".format),
            "task": (100 * found["task_accuracy"]).map("{:.2f}".format),
            "seeds": None,
            "source": found["source"],
        }
    )


def interventions(interventions: pd.DataFrame) -> Table:
    lines = []
    for (dataset, method, order, expert), rows in interventions.groupby(
        ["dataset", "method", "order", "expert"], sort=False
    ):
        line = {
            "dataset": SETS[str(dataset)],
            "method": method,
            "order": order,
            "expert": expert,
        }
        for name, share in (("none", 0.0), ("half", 0.5), ("whole", 1.0)):
            nearest = (rows["told_share"] - share).abs()
            at = rows[nearest == nearest.min()]
            at = at[at["told_share"] == at["told_share"].min()]
            line[name] = spread(mean_interval(at["task_accuracy"]))
        lines.append(line)
    return Table(
        title="Experts at test time",
        caption=(
            "Accuracy of classes, in %, after an expert has told no, half of the (or the next"
            " fewer), or all groups of concepts."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "dataset": "data set",
            "method": "method",
            "order": "order",
            "expert": "expert",
            "none": "none",
            "half": "half",
            "whole": "all",
        },
        paper=_of_the_intervention_figure(),
        notes=[
            "A wrong expert says the opposite of each concept. All told right is the ceiling of the"
            " class head.",
            INTERVAL,
        ],
    )


def _of_the_intervention_figure() -> pd.DataFrame:
    found = paper_numbers("sscbm", "interventions")
    at = found.pivot(index="dataset", columns="told_share", values="task_accuracy")
    sources = found.groupby("dataset")["source"].first()
    return pd.DataFrame(
        [
            {
                "dataset": dataset,
                "method": "SSCBM",
                "order": None,
                "expert": "right",
                **{
                    name: f"{100 * row[share]:.2f}"
                    for name, share in (("none", 0.0), ("half", 0.5), ("whole", 1.0))
                },
                "source": sources[dataset],
            }
            for dataset, row in at.iterrows()
        ]
    )


def saliency(saliency: pd.DataFrame) -> Table:
    lines = []
    for variant, rows in saliency.groupby("variant", sort=False):
        weight = rows["lambda_2_scale"].iloc[0]
        lines.append(
            {
                "variant": variant,
                "weight": None if pd.isna(weight) else float(weight),
                **{
                    name: spread(mean_interval(rows[column]))
                    for name, column in (
                        ("own", "pointing_accuracy"),
                        ("other", "other_share"),
                        ("empty", "empty_share"),
                        ("inside", "inside_share"),
                    )
                },
                **{
                    name: None if rows[column].isna().all() else spread(mean_interval(rows[column]))
                    for name, column in (
                        ("box", "box_accuracy"),
                        ("concepts", "concept_accuracy"),
                        ("task", "task_accuracy"),
                    )
                },
            }
        )
    return Table(
        title="Where heat maps point",
        caption=(
            "Scenes of two digits in two of four quadrants: for each digit that is there, where the"
            " peak of its map is, in %. A random place has 25 in the own quadrant."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "variant": "map",
            "weight": Column("lambda_2", "{:g}"),
            "own": "own quadrant",
            "other": "the other digit's",
            "empty": "an empty one",
            "inside": "mass in the own",
            "box": "box metric",
            "concepts": "concepts",
            "task": "classes",
        },
        notes=[
            "Box metric: the authors', a box of 90 of 224 pixels around the peak holds the middle"
            " of the digit's quadrant.",
            INTERVAL,
        ],
    )


def pseudo(ablation: pd.DataFrame) -> Table:
    rows = ablation[ablation["kind"] == "labels"]
    lines = [
        {
            "dataset": SETS[str(dataset)],
            "variant": variant,
            "k": int(k),
            "agreement": spread(mean_interval(one["agreement_share"])),
            "largest": None
            if one["largest_probability"].isna().all()
            else float(one["largest_probability"].max()),
        }
        for (dataset, variant, k), one in rows.groupby(["dataset", "variant", "k"], sort=False)
    ]
    return Table(
        title="How often pseudo labels are right",
        caption=(
            "Share of the hidden concepts whose pseudo label, cut at 0.5, is right, in %, by the"
            " space of the neighbours and K; and with faults of the authors' code."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "dataset": "data set",
            "variant": "neighbours",
            "k": "K",
            "agreement": "right",
            "largest": Column("largest", "{:.2f}"),
        },
        notes=[INTERVAL],
    )


def ablation(ablation: pd.DataFrame, main: pd.DataFrame) -> Table:
    lines = []
    for dataset, rows in ablation[ablation["kind"] == "training"].groupby("dataset", sort=False):
        own = main[(main["dataset"] == dataset) & main["method"].isin([SSCBM, NO_PSEUDO])]
        plain = own.rename(columns={"method": "variant"})
        every = pd.concat([plain, rows])
        for variant, one in every.groupby("variant", sort=False):
            gap = (
                None
                if variant == SSCBM
                else paired(every, "concept_accuracy", str(variant), SSCBM, "variant")
            )
            lines.append(
                {
                    "dataset": SETS[str(dataset)],
                    "variant": variant,
                    "concepts": spread(mean_interval(one["concept_accuracy"])),
                    "task": spread(mean_interval(one["task_accuracy"])),
                    "gap": None if gap is None else points(gap),
                }
            )
    return Table(
        title="Parts of SSCBM, and faults of the authors' code",
        caption="Accuracy of concepts and classes, in %; and concepts less SSCBM's, by seed.",
        frame=pd.DataFrame(lines),
        columns={
            "dataset": "data set",
            "variant": "variant",
            "concepts": "concepts",
            "task": "classes",
            "gap": "concepts less SSCBM's",
        },
        notes=[INTERVAL],
    )


def step_ratio(cost: pd.DataFrame) -> Ratio:
    """A training step of SSCBM over one of CEM, round by round."""
    steps = cost[cost["kind"] == "step"]
    by = {method: rows.sort_values("repeat") for method, rows in steps.groupby("method")}
    return ratio(by[SSCBM]["work_seconds"].to_numpy(), by[CEM]["work_seconds"].to_numpy())


def cost(cost: pd.DataFrame) -> Table:
    steps = cost[cost["kind"] == "step"]
    found, search = step_ratio(cost), cost[cost["kind"] == "neighbours"].iloc[0]
    lines = [
        {
            "what": f"training step, {method}",
            "work_seconds": float(rows["work_seconds"].median()),
            "time_ratio": found.value if method == SSCBM else None,
            "peak_bytes": None,
        }
        for method, rows in steps.groupby("method", sort=False)
    ]
    lines.append(
        {
            "what": f"pseudo labels of {search['queries']:,.0f} images, {search['labelled']:,.0f}"
            " annotated",
            "work_seconds": float(search["work_seconds"]),
            "time_ratio": None,
            "peak_bytes": float(search["peak_bytes"]),
        }
    )
    return Table(
        title="Time and memory",
        caption=(
            "Seconds of one core; a step of SSCBM over one of CEM is the median of rounds in turns"
            f" ({found.low:.2f} to {found.high:.2f})."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "what": "what",
            "work_seconds": Column("time", human_seconds),
            "time_ratio": Column("over CEM", "{:.2f}x"),
            "peak_bytes": Column("memory", human_bytes),
        },
        notes=[
            f"Steps: {steps['backbone'].iloc[0]}, end to end from images of noise. Memory: what"
            " torch allocates besides the features themselves"
            f" ({human_bytes(float(search['features_bytes']))}).",
        ],
    )


def real_ratios(rows: pd.DataFrame) -> str:
    """What share of the training images was annotated, by set."""
    shares = rows.groupby("dataset", sort=False)["labelled_share"].mean()
    told = ", ".join(f"{SETS[str(name)]} {share:.1%}" for name, share in shares.items())
    return f"Annotated after rounding up in every class: {told}."


def agreements(rows: pd.DataFrame) -> str:
    """How often pseudo labels are right, by set."""
    shares = rows.groupby("dataset", sort=False)["agreement_share"]
    told = ", ".join(f"{SETS[str(name)]} {spread(mean_interval(one))}" for name, one in shares)
    return f"Pseudo labels (cut at 0.5) that are right, %: {told}."


def points(value: Mean, digits: int = 1) -> str:
    """'+2.1 [+0.4, +3.8]' points of a share."""
    return (
        f"{100 * value.value:+.{digits}f} points"
        f" [{100 * value.low:+.{digits}f}, {100 * value.high:+.{digits}f}]"
    )
