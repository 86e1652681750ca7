"""The paper's own setting: a CLIP fine-tuned with LoRA on pictures captioned by their class, and
its two tables of accuracy.

Part "removal" is ECIF's edit against retraining without pairs removed at random, the most valuable
or the most harmful first. Part "harmful" is retraining without the tenth that each method ranks
most harmful, on clean captions and with a share of them exchanged. Fine-tuning is some epochs long
and ends at no minimum; how large the gradient is there, and what conjugate gradients leave of the
residual, is in the rows.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from projects.ecif import Clip, Contrastive, Pairs, labels
from projects.ecif.baselines import scores_by_passes
from projects.ecif.finetune import (
    Base,
    base_model,
    class_accuracy,
    damped_ggn,
    fine_tune,
    with_lora,
)
from projects.ecif.pictures import Pictures, Source, load
from shared import experiment
from shared.commands.options import device_of
from shared.influence.baselines import Solve
from shared.influence.evaluate import auroc, cosine, most_harmful, relative_error
from shared.influence.noise import shuffle_captions
from shared.meters import cuda_peak_bytes
from shared.seeding import generator, step_seed
from shared.vision.images import LabelledImages

T = TypeVar("T")


class Config(experiment.Config):
    """A CLIP, the pictures that it is fine-tuned on, and what is removed."""

    model: str
    """A shape's name, a folder, or an id in the hub's cache."""
    pretrain_steps: NonNegativeInt
    """Steps of training a shape's random weights before fine-tuning."""
    dataset: Source
    """The pictures."""
    folder: str | None
    """Where the sets of torchvision lie."""
    prompt: str = Field(pattern=r"\{\}")
    """The caption, with {} for the class."""
    train: PositiveInt | None
    """Training pairs; null: all there are."""
    validation: PositiveInt
    """Clean pairs whose loss scores are about."""
    test: PositiveInt | None
    """Pictures that the accuracy is of; null: all there are."""
    batch: PositiveInt
    """Pairs of a batch."""
    apart: bool
    """Whether pairs of one caption, false negatives of one another, come into different batches."""
    epochs: PositiveInt
    """Passes over the training pairs."""
    rate: PositiveFloat
    """AdamW's learning rate."""
    rank: PositiveInt
    """Rank of the LoRA adapters."""
    delta: PositiveFloat
    """Weight of the regulariser beside the sum of the batches' losses, as in the paper."""
    shares: list[float] = Field(min_length=1)
    """Shares of the training pairs that are edited out."""
    removed: float = Field(gt=0, lt=1)
    """Share of the pairs that is removed: those that a method ranks most harmful."""
    shuffled: list[float] = Field(min_length=1)
    """Shares of the captions that are exchanged, each a training of its own; 0: clean."""
    damping: PositiveFloat
    """Damping, as a share of the Gauss-Newton matrix's largest eigenvalue."""
    iterations: PositiveInt
    """Steps of conjugate gradients of a solve."""
    curvature_batches: PositiveInt | None
    """Batches that the Gauss-Newton matrix is of; null: all."""
    dimension: PositiveInt
    """Dimensions of TRAK's projection."""
    dimensions_at_once: PositiveInt
    """Of these, how many go through the model in one forward-mode pass."""
    seeds: PositiveInt
    """Runs: each draws pictures, adapters, batches and what is removed."""
    chunk: PositiveInt | None
    """Batches handled at once; null: all."""
    device: str = "cpu"
    """Where tensors live: cpu, or cuda."""


class Retrained(NamedTuple):
    """A retraining: parameters w [p], how long it took, and what it is judged by."""

    w: Tensor
    seconds: float
    judged: dict[str, float]


@dataclass(frozen=True, eq=False)
class Case:
    """A fine-tuned CLIP and what it is judged by. `corrupted` [n] says whose caption was exchanged;
    scores do not see it.
    """

    config: Config
    problem: Contrastive
    start: Tensor
    points: list[Tensor]
    validation: Contrastive
    tested: Callable[[Tensor], float]
    corrupted: Tensor
    repeated_share: float
    seed: int
    retrained: dict[frozenset[int], "Retrained"] = field(default_factory=dict)

    @property
    def w(self) -> Tensor:
        return self.points[-1]

    def retrain(self, removed: list[int]) -> "Retrained":
        """Fine-tuned without some pairs: the same partition, theta_0, order of batches and number
        of epochs. Once for each set: both parts retrain without the most harmful pairs.
        """
        known = self.retrained.get(frozenset(removed))
        if known is None:
            points, seconds = timed(
                self.config,
                lambda: train(self.problem.without(removed), self.start, self.config, self.seed),
            )
            known = Retrained(points[-1], seconds, self.judged(points[-1]))
            self.retrained[frozenset(removed)] = known
        return known

    def curvature(self) -> Solve:
        wanted = self.config
        return damped_ggn(
            self.problem,
            self.w,
            damping=wanted.damping,
            iterations=wanted.iterations,
            batches=wanted.curvature_batches,
        )

    def judged(self, at: Tensor) -> dict[str, float]:
        with torch.no_grad():
            return {
                "test_accuracy": self.tested(at),
                "validation_loss": float(self.validation.mean_loss(at)),
            }


def train(problem: Contrastive, start: Tensor, config: Config, seed: int) -> list[Tensor]:
    return fine_tune(problem, start, epochs=config.epochs, rate=config.rate, seed=seed)


def build(config: Config, base: Base, pictures: Pictures, seed: int, shuffled_share: float) -> Case:
    """Captions, of a share of the training pictures exchanged; adapters; fine-tuning."""
    device = device_of(config.device)
    towers = Clip(with_lora(base, config.rank, seed).to(device), select=("*lora_*",))
    start = towers.parameters.flat()
    ids, mask = base.tokens([config.prompt.format(name) for name in pictures.classes])

    def problem(part: LabelledImages, classes_of: Tensor, delta: float) -> Contrastive:
        inputs = [one.to(device) for one in (ids[classes_of], mask[classes_of], part.pixels)]
        apart = classes_of.tolist() if config.apart else None
        pairs = Pairs.of(inputs, config.batch, seed, apart)
        return Contrastive(towers, pairs, delta, start, config.chunk)

    own_labels = pictures.train.labels
    corrupted = torch.zeros(len(own_labels), dtype=torch.bool)
    if shuffled_share:
        source, corrupted = shuffle_captions(own_labels.tolist(), shuffled_share, seed)
        own_labels = own_labels[source]
    training = problem(pictures.train, own_labels, config.delta)
    classes = (ids.to(device), mask.to(device))
    return Case(
        config,
        training,
        start,
        train(training, start, config, seed),
        problem(pictures.validation, pictures.validation.labels, 0.0),
        lambda at: class_accuracy(towers, at, classes, pictures.test, max(config.batch, 128)),
        corrupted,
        training.pairs.repeated_share([pictures.classes[label] for label in own_labels.tolist()]),
        seed,
    )


def timed(config: Config, call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns and how long it took: process time on a CPU, wall time until a GPU is
    done.
    """
    clock = time.process_time if config.device == "cpu" else time.perf_counter

    def now() -> float:
        if config.device != "cpu":
            torch.cuda.synchronize()
        return clock()

    begin = now()
    found = call()
    return found, now() - begin


def run(config: Config, run: experiment.Run) -> None:
    device = device_of(config.device)
    base = base_model(config.model, config.pretrain_steps)
    cases = [
        (seed, share)
        for seed in range(config.seed, config.seed + config.seeds)
        for share in config.shuffled
    ]
    for seed, share in run.progress(cases, "seeds and shares of exchanged captions"):
        with ExitStack() as stack:
            peaks = stack.enter_context(cuda_peak_bytes(device)) if device.type == "cuda" else None
            pictures = load(
                config.dataset,
                config.folder,
                config.train,
                config.validation,
                config.test,
                base.size,
                seed,
            )
            case = build(config, base, pictures, seed, share)
            common = {
                "dataset": config.dataset,
                "model": config.model,
                "weights": base.weights,
                "seed": seed,
                "shuffled_share": share,
                "pairs": case.problem.pairs.n,
                "batches": case.problem.pairs.batches,
                "parameters": case.w.numel(),
                "classes": len(pictures.classes),
                "repeated_share": case.repeated_share,
            }
            ends = {labels.BEFORE_FINE_TUNING: case.start, labels.FINE_TUNED: case.w}
            for method, at in ends.items():
                norms = {
                    "gradient_norm": float(case.problem.objective().gradient(at).norm()),
                    "moved_norm": float((at - case.start).norm()),
                }
                run.row(part="fit", **common, method=method, **case.judged(at), **norms)
            solve, setup = timed(config, case.curvature)
            scores = harmful(case, solve, setup, run, common)
            if not share:
                removal(case, solve, setup, scores, run, common)
        if peaks is not None:
            run.row(part="memory", **common, method="peak", peak_bytes=peaks()["cuda_allocator"])


def harmful(
    case: Case, solve: Solve, setup: float, run: experiment.Run, common: dict[str, Any]
) -> Tensor:
    """Rows of part "harmful"; returns ECIF's scores. `setup` is how long the curvature took to
    make, which is ECIF's time, too.
    """
    config, found = case.config, None
    options = {
        "points": case.points,
        "seed": case.seed,
        "dimension": config.dimension,
        "at_once": config.dimensions_at_once,
    }
    calls = scores_by_passes(case.problem, case.w, case.validation, solve, **options)
    count, corrupted = round(config.removed * case.problem.pairs.n), case.corrupted.numpy()
    run.row(part="harmful", **common, method=labels.NO_REMOVAL, **case.judged(case.w))
    for method, call in run.progress(list(calls.items()), "methods"):
        scores, seconds = timed(config, call)
        if method == labels.ECIF:
            found, seconds = scores, seconds + setup
        harm = -scores.cpu().numpy()
        removed = most_harmful(harm)[:count].tolist()
        hits = (
            {
                "detection_auc": auroc(harm, corrupted),
                "removed_precision": float(corrupted[removed].mean()),
            }
            if corrupted.any()
            else {}
        )
        run.row(
            part="harmful",
            **common,
            method=method,
            **case.retrain(removed).judged,
            work_seconds=seconds,
            **hits,
        )
    assert found is not None
    return found.cpu()


def removal(
    case: Case,
    solve: Solve,
    setup: float,
    scores: Tensor,
    run: experiment.Run,
    common: dict[str, Any],
) -> None:
    """Rows of part "removal". An edit's time has that of making the curvature in it, as if it were
    the only edit.
    """
    config, n = case.config, case.problem.pairs.n
    shuffled = torch.randperm(n, generator=generator(step_seed(case.seed, "random")))
    orders = {
        "random": shuffled,
        "valuable": most_harmful(scores),
        "harmful": most_harmful(-scores),
    }
    cells = [
        (kind, order.tolist(), share) for kind, order in orders.items() for share in config.shares
    ]
    for kind, order, share in run.progress(cells, "removals"):
        removed = order[: math.ceil(share * n)]
        where = {"part": "removal", **common, "kind": kind, "share": share}
        retrained = case.retrain(removed)
        run.row(
            **where,
            method=labels.RETRAIN,
            **retrained.judged,
            work_seconds=retrained.seconds,
        )
        for method, (mode, parts) in labels.EDITS.items():

            def edit() -> tuple[Tensor, Any]:
                return solve(case.problem.removal_gradient(case.w, removed, mode, parts))  # noqa: B023

            (effect, info), seconds = timed(config, edit)
            truth = (retrained.w - case.w).cpu()
            errors = {
                "parameter_error": float(relative_error(effect.cpu(), truth)),
                "parameter_cosine": float(cosine(effect.cpu(), truth)),
                "residual_ratio": info.relative_residual,
                "products": info.products,
            }
            run.row(
                **where,
                method=method,
                **case.judged(case.w + effect),
                work_seconds=setup + seconds,
                **errors,
            )
