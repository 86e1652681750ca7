"""The paper's own setting: a CLIP fine-tuned with LoRA on pictures captioned by their class, and
its two tables of accuracy.

Part "removal" is ECIF's edit against training again without pairs removed at random, the most
valuable or the most harmful first. Part "harmful" is training again without the tenth that each
method ranks most harmful, on clean captions and with a share of them exchanged. Fine-tuning is some
epochs long and ends at no minimum; how large the gradient is there, and what conjugate gradients
leave of the residual, is in the rows.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from projects.ecif import Clip, Contrastive, Pairs
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
EDITS = {
    "ECIF": ("exact", "both"),
    "ECIF, paper": ("paper", "both"),
    "positive only": ("exact", "positive"),
}


class Config(experiment.Config):
    """The model by a shape's name, a folder or a hub id; the pictures, in `folder` for sets of
    torchvision (None takes all of them).

    `delta` is the paper's, beside the sum of the batches' losses; `damping` a share of the largest
    eigenvalue; `chunk` in batches.
    """

    model: str = "vit-b-16"
    pretrain_steps: int = Field(default=0, ge=0)
    dataset: Source = "synthetic"
    folder: str | None = None
    prompt: str = Field(default="a photo of a {}", pattern=r"\{\}")
    train: PositiveInt | None = None
    validation: PositiveInt = 256
    test: PositiveInt | None = None
    batch: PositiveInt = 128
    epochs: PositiveInt = 3
    rate: PositiveFloat = 1e-4
    rank: PositiveInt = 8
    delta: PositiveFloat = 1.0
    shares: list[float] = Field(default=[0.05, 0.1], min_length=1)
    removed: float = Field(default=0.1, gt=0, lt=1)
    shuffled: list[float] = Field(default=[0.0, 0.15], min_length=1)
    damping: PositiveFloat = 0.01
    iterations: PositiveInt = 10
    curvature_batches: PositiveInt | None = None
    dimension: PositiveInt = 256
    seeds: PositiveInt = 3
    chunk: PositiveInt | None = None
    device: str = "cpu"


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

    @property
    def w(self) -> Tensor:
        return self.points[-1]

    def again(self, removed: list[int]) -> Tensor:
        """Trained without some pairs: the same partition, theta_0, order of batches and number of
        epochs.
        """
        return train(self.problem.without(removed), self.start, self.config, self.seed)[-1]

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

    def problem(part: LabelledImages, labels: Tensor, delta: float) -> Contrastive:
        inputs = [one.to(device) for one in (ids[labels], mask[labels], part.pixels)]
        return Contrastive(towers, Pairs.of(inputs, config.batch, seed), delta, start, config.chunk)

    labels = pictures.train.labels
    corrupted = torch.zeros(len(labels), dtype=torch.bool)
    if shuffled_share:
        source, corrupted = shuffle_captions(labels.tolist(), shuffled_share, seed)
        labels = labels[source]
    training = problem(pictures.train, labels, config.delta)
    classes = (ids.to(device), mask.to(device))
    return Case(
        config,
        training,
        start,
        train(training, start, config, seed),
        problem(pictures.validation, pictures.validation.labels, 0.0),
        lambda at: class_accuracy(towers, at, classes, pictures.test, config.batch),
        corrupted,
        training.pairs.repeated_share([pictures.classes[one] for one in labels.tolist()]),
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
            ends = {"before fine-tuning": case.start, "fine-tuned": case.w}
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
    options = {"points": case.points, "seed": case.seed, "dimension": config.dimension}
    calls = scores_by_passes(case.problem, case.w, case.validation, solve, **options)
    count, corrupted = round(config.removed * case.problem.pairs.n), case.corrupted.numpy()
    run.row(part="harmful", **common, method="no removal", **case.judged(case.w))
    for method, call in run.progress(list(calls.items()), "methods"):
        scores, seconds = timed(config, call)
        if method == "ECIF":
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
            **case.judged(case.again(removed)),
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
        again, seconds = timed(config, lambda: case.again(removed))  # noqa: B023
        run.row(**where, method="retrain", **case.judged(again), work_seconds=seconds)
        for method, (mode, parts) in EDITS.items():

            def edit() -> tuple[Tensor, Any]:
                return solve(case.problem.removal_gradient(case.w, removed, mode, parts))  # noqa: B023

            (effect, info), seconds = timed(config, edit)
            truth = (again - case.w).cpu()
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
