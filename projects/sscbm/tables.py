"""SSCBM's tables: rows in, `Table` out."""

from collections.abc import Sequence

import pandas as pd

from projects.sscbm.labels import METHODS, SETS
from shared.statistics import Mean, mean_interval
from shared.tables import Column, Table, paper_numbers

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


def seeds_of(rows: pd.DataFrame | Sequence[float]) -> int:
    return int(rows["seed"].nunique()) if isinstance(rows, pd.DataFrame) else len(rows)
