"""IDP's tables: rows in, `Table` out. Differences are paired by task."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from projects.idp.labels import (
    CHANCE,
    DISPLAY,
    FINE_TUNING,
    IDP,
    IDP_BATCH,
    IDP_PROPAGATED,
    METHODS,
    NEAREST_MEAN,
    RIDGE,
    RIDGE_BATCH,
    RIDGE_PROPAGATED,
)
from shared.statistics import Mean, Timing
from shared.tables import Column, Table

INTERVAL = (
    "± is half of a 95 % interval over tasks, 1.96 standard deviations / √tasks, as the field has"
    " it; it does not cover the choice of the source network, of which there is one."
)
PAIRS = (
    (IDP, FINE_TUNING),
    (IDP, RIDGE),
    (FINE_TUNING, RIDGE),
    (RIDGE, NEAREST_MEAN),
    (RIDGE_BATCH, RIDGE),
    (IDP_BATCH, RIDGE_BATCH),
    (IDP_PROPAGATED, RIDGE_PROPAGATED),
)


def mean(values: Iterable[float]) -> Mean:
    """Over tasks, with the field's interval: 1.96 sd / √n."""
    found = np.asarray(list(values), dtype=float)
    half = 1.96 * found.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.nan
    return Mean(float(found.mean()), float(found.mean() - half), float(found.mean() + half))


def shown(value: Mean, sign: bool = False) -> str:
    """'71.2 ± 1.3', in percent."""
    number = f"{100 * value.value:{'+' if sign else ''}.1f}"
    half = (value.high - value.low) / 2
    return number if np.isnan(half) else f"{number} ± {100 * half:.1f}"


def accuracies(frame: pd.DataFrame, method: str) -> pd.Series:
    """Of each task."""
    return frame[method] / frame["queries"]


def difference(frame: pd.DataFrame, first: str, second: str) -> Mean:
    """first - second, paired by task."""
    return mean((frame[first] - frame[second]) / frame["queries"])


def by_target(frame: pd.DataFrame, shots: int) -> dict[str, pd.DataFrame]:
    """The rows of each target, in the order of the rows."""
    return dict(iter(frame[frame["shots"] == shots].groupby("target", sort=False)))


def _accuracy_lines(main: pd.DataFrame, shots: int, inference: str) -> list[dict[str, object]]:
    targets = by_target(main, shots)
    return [
        {
            "shots": shots,
            "method": method.name,
            **{target: shown(mean(accuracies(rows, key))) for target, rows in targets.items()},
        }
        for key, method in METHODS.items()
        if method.inference == inference
    ]


def _shots(frame: pd.DataFrame) -> list[int]:
    return [int(shots) for shots in sorted(frame["shots"].unique())]


def _columns(frame: pd.DataFrame, *first: str) -> dict[str, Column | str]:
    return {
        name: DISPLAY.get(name, name.replace("_", " "))
        for name in frame.columns
        if name in first or name in DISPLAY
    }


def main(main: pd.DataFrame, ceiling: pd.DataFrame) -> Table:
    lines: list[dict[str, object]] = []
    for shots in _shots(main):
        chance = dict.fromkeys(by_target(main, shots), f"{100 * CHANCE:.1f}")
        lines.append({"shots": shots, "method": "chance", **chance})
        lines += _accuracy_lines(main, shots, "inductive")
        top = {
            target: shown(mean(accuracies(rows, "ceiling")))
            for target, rows in by_target(ceiling, shots).items()
        }
        lines.append({"shots": shots, "method": "in-domain ceiling", **top})
    frame = pd.DataFrame(lines)
    return Table(
        title="Accuracy on eight targets, inductive",
        caption=(
            "Percent of right answers in 5-way tasks; every method has the same tasks, and each"
            " query is classified on its own. Targets go from the source's own kind to no common"
            " structure."
        ),
        frame=frame,
        columns=_columns(frame, "shots", "method"),
        notes=[
            f"{_tasks(main)} tasks of each target and number of shots, {_queries(main)} queries"
            f" each. {INTERVAL}",
            "The ceiling is a network of the same kind that was trained on the target's own labels"
            " (two folds; never on the image that it classifies).",
            "Tiles of one photograph are correlated, and a photograph is a class.",
        ],
    )


def _tasks(frame: pd.DataFrame) -> int:
    return int(frame["task"].max()) + 1


def _queries(frame: pd.DataFrame) -> int:
    return int(frame["queries"].iloc[0])


def transductive(main: pd.DataFrame) -> Table:
    frame = pd.DataFrame(
        [line for shots in _shots(main) for line in _accuracy_lines(main, shots, "transductive")]
    )
    return Table(
        title="Accuracy on eight targets, transductive",
        caption=(
            f"The same tasks where the {_queries(main)} queries of a task, as many of each class,"
            " are classified together: an easier problem, which is not to be compared with the"
            " inductive table."
        ),
        frame=frame,
        columns=_columns(frame, "shots", "method"),
        notes=[INTERVAL],
    )


def differences(main: pd.DataFrame) -> Table:
    lines = []
    for shots in _shots(main):
        targets = by_target(main, shots)
        for first, second in PAIRS:
            cells = {
                target: shown(difference(rows, first, second), sign=True)
                for target, rows in targets.items()
            }
            name = f"{METHODS[first].name} - {METHODS[second].name}"
            lines.append({"shots": shots, "difference": name, **cells})
    frame = pd.DataFrame(lines)
    return Table(
        title="Paired differences",
        caption="Points of accuracy, first less second, on the same tasks, whatever their sign.",
        frame=frame,
        columns=_columns(frame, "shots", "difference"),
        notes=[
            INTERVAL,
            "Batch statistics less none is transductive less inductive: what seeing the queries"
            " together is worth without any adaptation.",
        ],
    )


def style_means(proxies: pd.DataFrame, codebook: str | None = None) -> pd.DataFrame:
    """Of each domain and codebook, means over draws; or of the first codebook."""
    frame = proxies.assign(codebook_name=proxies["codebook"] + ", " + proxies["rows"].astype(str))
    if codebook is None:
        frame = frame[frame["codebook_name"] == frame["codebook_name"].iloc[0]]
    return frame.groupby(["codebook_name", "domain"], sort=False).mean(numeric_only=True)


def proxies(proxies: pd.DataFrame) -> Table:
    frame = style_means(proxies).reset_index()
    frame["domain"] = [DISPLAY.get(name, name) for name in frame["domain"]]
    frame["between"] = [
        "yes" if a and b else "no"
        for a, b in zip(
            frame["moments_proxy_source_ratio"] < frame["moments_target_source_ratio"],
            frame["moments_proxy_target_ratio"] < frame["moments_target_source_ratio"],
            strict=True,
        )
    ]
    return Table(
        title="Content and style of proxies",
        caption=(
            "T: a domain's cells; P: their proxies; S: the source's cells. Content: error |P - T|²,"
            " relative to |T|² and to the spread of T about its mean, and mean cosine. Style:"
            " distance of the channels' means and deviations."
        ),
        frame=frame,
        columns={
            "domain": "domain",
            "error_ratio": Column("error", "{:.3f}"),
            "centred_ratio": Column("of the spread", "{:.3f}"),
            "cosine_ratio": Column("cosine", "{:.3f}"),
            "moments_target_source_ratio": Column("style T-S", "{:.2f}"),
            "moments_proxy_source_ratio": Column("P-S", "{:.2f}"),
            "moments_proxy_target_ratio": Column("P-T", "{:.2f}"),
            "between": "P between T and S",
            "gram_target_source_ratio": Column("Gram T-S", "{:.2f}"),
            "gram_proxy_source_ratio": Column("Gram P-S", "{:.2f}"),
        },
        notes=[
            f"Means over {int(proxies['draw'].max()) + 1} draws of other images and"
            f" {proxies['network'].nunique()} source network(s); the default codebook.",
            "The source's images are those that the codebook is made of.",
        ],
    )


def codebooks(proxies: pd.DataFrame) -> Table:
    frame = style_means(proxies, "all").reset_index()
    wide = frame.pivot_table(
        index="codebook_name", columns="domain", values="error_ratio", sort=False
    ).reset_index()
    width = frame.groupby("codebook_name", sort=False)["dimension_ratio"].mean()
    wide.insert(1, "dimension_ratio", width.loc[wide["codebook_name"]].to_numpy())
    columns: dict[str, Column | str] = {
        "codebook_name": "codebook, rows",
        "dimension_ratio": Column("df / d", "{:.2f}"),
    }
    for name in wide.columns[2:]:
        columns[name] = Column(DISPLAY.get(name, name), "{:.3f}")
    return Table(
        title="What the codebook leaves of a target",
        caption=(
            "Relative error of proxies, by codebook. df / d is the share of the width's directions"
            " that it keeps: at 1 a proxy is its target and says nothing."
        ),
        frame=wide,
        columns=columns,
    )


def ablation_lines(ablation: pd.DataFrame) -> pd.DataFrame:
    """Of each setting and target: the mean accuracy, and differences to no step and to fine-tuning
    without proxies, paired by task.
    """
    keys = ["target", "shots", "task"]
    lines = []
    for (target, shots), rows in ablation.groupby(["target", "shots"], sort=False):
        by = {
            name: part.set_index(keys)["right"]
            for name, part in rows.groupby(["what", "value"], sort=False)
        }
        queries = float(rows["queries"].iloc[0])
        for (what, value), right in by.items():
            part = rows[(rows["what"] == what) & (rows["value"] == value)]
            lines.append(
                {
                    "target": target,
                    "shots": shots,
                    "what": what,
                    "value": value,
                    "dimension_ratio": float(part["dimension_ratio"].mean()),
                    "accuracy": mean(right / queries),
                    "over_ridge": mean((right - by["steps", "0"]) / queries),
                    "over_fine_tuning": mean((right - by["losses", "T"]) / queries),
                }
            )
    return pd.DataFrame(lines)


def ablation(ablation: pd.DataFrame) -> Table:
    lines = ablation_lines(ablation)
    frame = lines[["what", "value"]].drop_duplicates().reset_index(drop=True)
    columns: dict[str, Column | str] = {"what": "what", "value": "setting"}
    for (target, shots), part in lines.groupby(["target", "shots"], sort=False):
        name = f"{DISPLAY.get(str(target), str(target))}, {shots}-shot"
        indexed = part.set_index(["what", "value"])
        places = list(zip(frame["what"], frame["value"], strict=True))
        for key, heading in (("accuracy", name), ("over_fine_tuning", f"{name}: less T alone")):
            column = f"{key}_{target}_{shots}"
            frame[column] = [
                shown(indexed.loc[place, key], sign=key != "accuracy") for place in places
            ]
            columns[column] = heading
    return Table(
        title="Ablation",
        caption=(
            "Each line changes one setting of the default. T, P: cross-entropy of the pseudo"
            " queries and of their proxies; KL: between the two."
        ),
        frame=frame,
        columns=columns,
        notes=[f"{_tasks(ablation)} tasks, the same for all lines. {INTERVAL}"],
    )


def selection(selection: pd.DataFrame) -> Table:
    lines = []
    for (method, steps, rate, scope, rows), part in selection.groupby(
        ["method", "steps", "rate_ratio", "scope", "rows"], sort=False
    ):
        line = {"method": METHODS[str(method)].name, "steps": int(steps)}
        line |= {"rate": f"{rate:g}", "scope": scope}
        line["rows"] = str(rows) if method == IDP else ""
        for shift, own in part.groupby("shift", sort=False):
            line[str(shift)] = shown(difference(own, "right", "ridge"), sign=True)
        line["all"] = shown(difference(part, "right", "ridge"), sign=True)
        lines.append(line)
    frame = pd.DataFrame(lines)
    return Table(
        title="Settings tried on validation classes of the source",
        caption=(
            "Points over the ridge head without adaptation, on drawings of classes that are neither"
            " trained on nor a target, as drawn and under shifts that are no target."
        ),
        frame=frame,
        columns={
            "method": "method",
            "steps": "steps",
            "rate": "rate",
            "scope": "layers",
            "rows": "codebook rows",
            **{str(shift): str(shift) for shift in selection["shift"].unique()},
            "all": "all",
        },
        notes=[f"{_tasks(selection)} tasks of each shift. {INTERVAL}"],
    )


def heads(heads: pd.DataFrame) -> Table:
    lines = []
    for shots in _shots(heads):
        targets = by_target(heads, shots)
        names = {
            "ridge": "ridge head",
            "graph": "graph head",
            "graph_batch": "graph head, batch statistics (transductive)",
        }
        for key, name in names.items():
            cells = {t: shown(mean(accuracies(rows, key))) for t, rows in targets.items()}
            lines.append({"shots": shots, "head": name, **cells})
        gap = {t: shown(difference(rows, "graph", "ridge"), True) for t, rows in targets.items()}
        lines.append({"shots": shots, "head": "graph - ridge, paired", **gap})
    frame = pd.DataFrame(lines)
    return Table(
        title="The graph head",
        caption="Without adaptation, on the first tasks of the main table; inductive unless said.",
        frame=frame,
        columns=_columns(frame, "shots", "head"),
        notes=[INTERVAL],
    )


def natural(natural: pd.DataFrame) -> Table:
    names = (NEAREST_MEAN, RIDGE, FINE_TUNING, IDP)
    lines = []
    for shots in _shots(natural):
        targets = by_target(natural, shots)
        for key in names:
            cells = {
                target: shown(mean(accuracies(some, key)))
                for target, rows in targets.items()
                if len(some := rows.dropna(subset=[key]))
            }
            if cells:
                lines.append({"shots": shots, "method": METHODS[key].name, **cells})
        for first, second in ((IDP, FINE_TUNING), (IDP, RIDGE)):
            cells = {
                target: shown(difference(some, first, second), sign=True)
                for target, rows in targets.items()
                if len(some := rows.dropna(subset=[first]))
            }
            if cells:
                name = f"{METHODS[first].name} - {METHODS[second].name}"
                lines.append({"shots": shots, "method": name, **cells})
    frame = pd.DataFrame(lines).fillna("")
    return Table(
        title="EfficientNet-Lite0, trained on ImageNet, as the source",
        caption=(
            "Inductive. Its codebook is made of CIFAR-10's classes, which stand for the images that"
            " it was trained on; where a cell is empty, tasks were not adapted."
        ),
        frame=frame,
        columns=_columns(frame, "shots", "method"),
        notes=[INTERVAL, "Adapted tasks are few, and the differences are of these alone."],
    )


def cost(cost: pd.DataFrame) -> Table:
    lines = []
    for (target, shots), rows in cost.groupby(["target", "shots"], sort=False):
        by = {
            way: part.sort_values("repeat")["core_seconds"]
            for way, part in rows.groupby("way", sort=False)
        }
        for way, seconds in by.items():
            tasks = 1 if way == "one task, all steps" else int(rows["tasks"].iloc[0])
            lines.append(
                {
                    "target": DISPLAY.get(str(target), target),
                    "shots": shots,
                    "way": way,
                    "tasks": tasks,
                    "task_seconds": Timing(tuple(seconds)).median / tasks,
                    "trained": int(rows["trained"].iloc[0]),
                    "share": rows["trained"].iloc[0] / rows["parameters"].iloc[0],
                    "same_share": float(rows["same_share"].iloc[0]),
                }
            )
    frame = pd.DataFrame(lines)
    return Table(
        title="What adapting a task costs",
        caption="Seconds of one core for a task, IDP unless said; medians of interleaved rounds.",
        frame=frame,
        columns={
            "target": "target",
            "shots": "shots",
            "way": "how",
            "tasks": "tasks",
            "task_seconds": Column("core-seconds a task", "{:.3f}"),
            "trained": Column("parameters trained", "{:,}"),
            "share": Column("of all", "{:.1%}"),
            "same_share": Column("same answers at once as alone", "{:.1%}"),
        },
    )
