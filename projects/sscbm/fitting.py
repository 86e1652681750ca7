"""`train`: a model from the user's images, going on where it was stopped, and a report of what it
was trained on and how good it is on images that it has not seen.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from projects.sscbm.annotations import Annotations, Reading, read_annotations, read_images, split
from projects.sscbm.bundle import Bundle, Settings, save
from projects.sscbm.command import Training
from projects.sscbm.data import frozen
from projects.sscbm.metrics import Predictions, predict, scores
from projects.sscbm.model import Method, start_from
from projects.sscbm.pseudo import pseudo_labels
from projects.sscbm.training import (
    Data,
    Losses,
    Objective,
    Unlabelled,
    hide,
    imbalance_of,
    rate_of,
    standardise,
)
from shared.commands.checkpoint import load_checkpoint, save_checkpoint
from shared.commands.folder import begin, begun, locked
from shared.commands.key import digest
from shared.commands.log import Log, read_lines
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import Stopped, stop_signals
from shared.errors import UserError
from shared.files import atomic_json, remove, sha256
from shared.vision.images import LabelledImages
from shared.vision.training import batches, train_epoch

METHODS: dict[str, tuple[Method, Unlabelled]] = {
    "sscbm": ("sscbm", "align"),
    "cem-ssl": ("cem", "direct"),
    "cbm-ssl": ("cbm", "direct"),
    "cem": ("cem", "nothing"),
}
EARLY = ("run.json", "checkpoint.safetensors")


class Parts(NamedTuple):
    """The user's images, those to train on and those held out."""

    train: LabelledImages
    held: LabelledImages
    annotations: Annotations
    reading: Reading


def train_command(options: argparse.Namespace) -> int:
    """Train on --images and write --out. Returns the exit status."""
    recipe = Training.from_options(options)
    console = Console(stderr=True, highlight=False)
    device = device_of(options.device)
    parts = read_parts(options.images, options.annotations, recipe)
    settings = settings_of(parts.annotations, recipe)
    model = settings.build(recipe.seed)
    if options.weights is not None:
        start_from(model.encoder.backbone, options.weights)
    report = describe(parts, recipe)
    for line in told(report):
        console.print(line, markup=False, soft_wrap=True)
    with locked(options.out, "log.jsonl", EARLY):
        about = {
            "images": digest({"train": parts.train.pixels, "held": parts.held.pixels}),
            "annotations": sha256(options.annotations),
            "weights": None if options.weights is None else sha256(options.weights),
            **recipe.record(),
        }
        log = options.out / "log.jsonl"
        begin(options.out / "run.json", about, begun(log))
        if finished(log, recipe.epochs) and (options.out / "model.json").exists():
            console.print(f"{options.out} is trained already", markup=False, soft_wrap=True)
            return 0
        fit(model.to(device), parts, recipe, options.out, console)
        held = predict(model, parts.held.pixels)
        report["held_out"] = measured(held, parts)
        save(Bundle(model, settings), options.out)
        atomic_json(options.out / "report.json", report)
        remove(options.out / "checkpoint.safetensors")
    for line in told_scores(report["held_out"]):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def read_parts(folder: Path, file: Path, recipe: Training) -> Parts:
    """Read, check and split. Raises UserError for whatever is wrong with the user's data."""
    annotations = read_annotations(file)
    images, reading = read_images(folder, annotations, recipe.mode, recipe.edge)
    rows, held = split(images, recipe.validation, recipe.seed)
    parts = Parts(images.pick(rows), images.pick(held), annotations, reading)
    assert parts.train.concepts is not None
    known = (~parts.train.concepts.isnan()).any(0).tolist()
    for name, annotated in zip(annotations.names, known, strict=True):
        if not annotated:
            raise UserError(
                f"'{name}' is annotated for held-out images alone; annotate more, or take another"
                " --seed"
            )
    return parts


def settings_of(annotations: Annotations, recipe: Training) -> Settings:
    return Settings(
        METHODS[recipe.method][0],
        recipe.backbone,
        recipe.edge,
        recipe.mode,
        recipe.size,
        recipe.encoder_output,
        recipe.heatmap_sim,
        annotations.classes,
        annotations.names,
        annotations.groups,
    )


def fit(model: Any, parts: Parts, recipe: Training, out: Path, console: Console) -> None:
    """Train in place, with a checkpoint after each epoch; go on from the last one."""
    data = training_data(parts.train, recipe)
    device = next(model.parameters()).device
    data = Data(*(column.to(device) for column in data.columns))
    standardise(model, data.images)
    losses = Losses(
        METHODS[recipe.method][1],
        recipe.lambda_1,
        recipe.lambda_2,
        0.0 if recipe.method == "cbm-ssl" else recipe.randint,
        recipe.imbalance,
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.rate)
    # With the running means of batch norms, which are no parameters.
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    checkpoint = out / "checkpoint.safetensors"
    done = (load_checkpoint(checkpoint, state, optimiser) or {"epochs": 0})["epochs"]
    a_epoch = len(batches(len(data.labels), recipe.batch, recipe.seed, 1))
    weights = imbalance_of(data.concepts) if recipe.imbalance else None
    objective = Objective(model, losses, recipe.seed, done * a_epoch, weights)
    with (
        Log(out / "log.jsonl", keep=lambda line: line["epoch"] <= done) as log,
        stop_signals() as stop,
        Progress(console, done, recipe.epochs) as progress,
    ):
        while done < recipe.epochs:
            if stop:
                raise Stopped(f"stopped after epoch {done}", stop[0])
            for group in optimiser.param_groups:
                group["lr"] = rate_of(recipe.rate, done + 1, recipe.epochs)
            loss = train_epoch(
                model, data.columns, objective,
                batch=recipe.batch, seed=recipe.seed, epoch=done + 1, steps=optimiser,
            )  # fmt: skip
            done += 1
            log.write({"epoch": done, "loss": loss})
            save_checkpoint(checkpoint, state, optimiser, {"epochs": done})
            progress.step(done, 0, loss)
    model.eval()


def training_data(train: LabelledImages, recipe: Training) -> Data:
    """With pseudo labels where concepts are not annotated."""
    assert train.concepts is not None
    features = frozen(train.pixels, recipe.features).features
    k = recipe.neighbours or min(3, max(1, min(annotated_per_class(train), default=1)))
    pseudo = pseudo_labels(features, train.concepts, k)
    known = hide(train.labels, train.concepts, recipe.task_labels)
    return Data(train.pixels, known, train.concepts, pseudo)


def annotated_per_class(images: LabelledImages) -> list[int]:
    """Images with an annotated concept, of each class that has one."""
    assert images.concepts is not None
    annotated = ~images.concepts.isnan().all(1)
    counts = images.labels[annotated].bincount(minlength=len(images.classes)).tolist()
    return [count for count in counts if count]


def finished(log: Path, epochs: int) -> bool:
    """Whether a run has made all its epochs."""
    return sum(1 for _ in read_lines(log)) >= epochs


# ---- the report ----------------------------------------------------------------------------------


def describe(parts: Parts, recipe: Training) -> dict[str, Any]:
    """What the images are, as report.json has it."""
    train = parts.train
    assert train.concepts is not None
    annotated = ~train.concepts.isnan().all(1)
    by_class = {}
    for label, name in enumerate(train.classes):
        own = train.labels == label
        by_class[name] = {"images": int(own.sum()), "annotated": int((own & annotated).sum())}
    return {
        "train": len(train),
        "held_out_images": len(parts.held),
        "annotated": int(annotated.sum()),
        "annotated_share": float(annotated.double().mean()),
        "annotated_cells_share": float((~train.concepts.isnan()).double().mean()),
        "classes": by_class,
        "repeated_lines": parts.annotations.repeated,
        **asdict(parts.reading),
    }


def told(report: dict[str, Any]) -> list[str]:
    """The report's first part, as lines."""
    lines = [
        f"{report['train']} images to train on, {report['held_out_images']} held out;"
        f" {report['annotated']} ({report['annotated_share']:.1%}) are annotated"
    ]
    shares = (
        f"{name} {one['annotated']}/{one['images']}" for name, one in report["classes"].items()
    )
    lines.append(f"annotated by class: {', '.join(shares)}")
    bare = [name for name, one in report["classes"].items() if not one["annotated"]]
    if bare:
        lines.append(
            f"no annotated image of {', '.join(bare)}: their concepts come from other classes"
        )
    changed = []
    if report["resized"]:
        changed.append(f"{report['resized']} resized")
    if report["cropped"]:
        changed.append(f"{report['cropped']} not square, of which the middle was taken")
    if report["repeated_lines"]:
        changed.append(f"{report['repeated_lines']} lines of the CSV said something again")
    if len(report["modes"]) > 1:
        modes = ", ".join(f"{count} {mode}" for mode, count in report["modes"].items())
        changed.append(f"modes of the files: {modes}")
    return [*lines, *(["; ".join(changed)] if changed else [])]


def measured(found: Predictions, parts: Parts) -> dict[str, Any]:
    """On held-out images: concepts over what is annotated, classes over all, each beside what most
    training images have.
    """
    held, train = parts.held, parts.train
    assert held.concepts is not None
    assert train.concepts is not None
    guess = train.concepts.nanmean(0).expand(len(held), -1)
    commonest = torch.zeros(len(held), len(held.classes))
    commonest[:, train.labels.bincount().argmax()] = 1
    known = bool((~held.concepts.isnan()).any())
    ours, trivial = (
        scores(one, held.labels, held.concepts) for one in (found, Predictions(guess, commonest))
    )
    return {
        "concept_accuracy": ours.concepts if known else None,
        "concept_accuracy_majority": trivial.concepts if known else None,
        "class_accuracy": ours.task,
        "class_accuracy_majority": trivial.task,
        "by_concept": by_concept(found.probabilities, held) if known else {},
    }


def by_concept(probabilities: Tensor, held: LabelledImages) -> dict[str, float | None]:
    """Accuracy of each concept over the held-out images that have it annotated."""
    assert held.concepts is not None
    found: dict[str, float | None] = {}
    for column, name in enumerate(held.concept_names):
        known = ~held.concepts[:, column].isnan()
        right = (probabilities[:, column] > 0.5) == (held.concepts[:, column] > 0.5)
        found[name] = float(right[known].double().mean()) if bool(known.any()) else None
    return found


def told_scores(held: dict[str, Any]) -> list[str]:
    classes = (
        f"held out: classes {held['class_accuracy']:.1%}"
        f" (commonest class {held['class_accuracy_majority']:.1%})"
    )
    if held["concept_accuracy"] is None:
        return [f"{classes}; none of them has a concept annotated"]
    return [
        f"{classes}, concepts {held['concept_accuracy']:.1%}"
        f" (majority {held['concept_accuracy_majority']:.1%})"
    ]
