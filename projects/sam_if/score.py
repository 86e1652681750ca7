"""`score` and `train`: the reader's own model and data to a file of scores; and a small model to
try it on.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from projects.sam_if.command import Scoring, Training, Work
from projects.sam_if.estimators import Estimator
from projects.sam_if.fixed_point import SAMProblem, fit, partition
from projects.sam_if.trajectory import gif_checkpoints
from shared.commands.folder import check_out
from shared.commands.inputs import (
    MOST_LABEL,
    Array,
    load_weights,
    user_arrays,
    user_code,
    user_model,
    user_weights,
)
from shared.commands.key import model_digest
from shared.commands.options import device_of
from shared.commands.pieces import Pieces
from shared.errors import UserError
from shared.files import atomic_save
from shared.finite import check_finite
from shared.influence import scoring
from shared.influence.baselines import metric_gradient
from shared.influence.objective import Objective, class_losses
from shared.influence.params import Parameters
from shared.influence.products import chunks
from shared.influence.solvers import require_positive
from shared.vision import images as vision

ARRAYS = {
    "x": Array("fiub", ("samples", "values", ...)),
    "y": Array("iu", ("samples",), least=0, most=MOST_LABEL),
    "id": Array("USiu", ("samples",), required=False),
}
KEYED = 64  # samples whose outputs tell models with the same weights apart


# ---- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """x [n, ...], labels [n], and an id each where the data name them."""

    x: Tensor
    y: Tensor
    ids: list[str] | None
    classes: list[str] | None = None


def read_samples(path: Path, dtype: torch.dtype, classes: list[str] | None = None) -> Samples:
    """A .npz file with x, y and perhaps id, or a folder with a folder of images for each class
    (values 0 to 1).

    Args:
        classes: the names that a folder's classes have in the training data, in order; None takes
            the folder's own.

    Raises:
        UserError: not such a file or folder, sizes that differ, labels that are no integers from 0,
            values that are not finite, or an id that stands twice.
    """
    samples = _folder(path, dtype, classes) if path.is_dir() else _npz(path, dtype)
    if samples.ids is not None:
        scoring.check_ids(samples.ids, len(samples.x))
    return samples


def _npz(path: Path, dtype: torch.dtype) -> Samples:
    arrays = user_arrays(path, ARRAYS)
    ids = [str(name) for name in arrays["id"].tolist()] if "id" in arrays else None
    return Samples(
        torch.from_numpy(arrays["x"]).to(dtype),
        torch.from_numpy(arrays["y"].astype(np.int64)),
        ids,
    )


def _folder(path: Path, dtype: torch.dtype, classes: list[str] | None) -> Samples:
    images = vision.folder(path, classes)
    ids, names = list(images.ids or ()), list(images.classes)
    return Samples(images.images(dtype), images.labels, ids, names)


def architecture(name: str, features: int, classes: int) -> nn.Sequential:
    """`softmax`, or `mlp-32-16`: tanh layers of these widths; inputs are flattened."""
    kind, *widths = name.split("-")
    if (kind, bool(widths)) not in (("softmax", False), ("mlp", True)) or not all(
        width.isdigit() and int(width) for width in widths
    ):
        raise UserError(
            f"--architecture {name}: use softmax, or mlp-32 or mlp-64-32 for tanh layers of these"
            " widths"
        )
    sizes = [features, *map(int, widths)]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def read_model(text: str, shape: str | None, data: Samples) -> nn.Module:
    """A module of the user's (`shared.commands.inputs.user_model`), or a .safetensors file with
    `--architecture`; in eval mode.

    Raises UserError for either that is none, and for weights that do not fit or are not finite.
    """
    if not text.endswith(".safetensors"):
        model = user_model(text)
        check_finite(model, f"--model {text}")
        return model.eval()
    if shape is None:
        raise UserError(
            f"--model {text} holds weights alone; say with --architecture what they are of"
        )
    weights, _ = user_weights(Path(text))
    model = architecture(shape, data.x[0].numel(), _outputs(weights, int(data.y.max()) + 1))
    model.double()  # holds weights of any precision exactly
    load_weights(model, weights, text)
    return model.eval()


def _outputs(weights: dict[str, Tensor], otherwise: int) -> int:
    """Classes of the weights: as many as the last layer's bias has numbers."""
    numbers = [
        int(name.split(".")[0])
        for name in weights
        if name.endswith(".bias") and name.split(".")[0].isdigit()
    ]
    return len(weights[f"{max(numbers)}.bias"]) if numbers else otherwise


# ---- score ---------------------------------------------------------------------------------------


def score(options: argparse.Namespace) -> int:
    """Write the scores; `projects.sam_if.command` has the options. Returns the exit status."""
    recipe, work = Scoring.from_options(options), Work.from_options(options)
    console = Console(stderr=True, highlight=False)
    scoring.check_scores_out(options.out)
    device, dtype = device_of(work.device), getattr(torch, recipe.dtype)
    data = read_samples(options.data, dtype)
    query = read_samples(options.query, dtype, data.classes)
    scoring.check_queries((data.x, data.y), (query.x, query.y))
    model = read_model(options.model, options.architecture, data).to(device, dtype)
    parameters = Parameters.of(model)
    x, y, x_query, y_query = (part.to(device) for part in (data.x, data.y, query.x, query.y))
    check_outputs(options.model, parameters, x[:1], y, y_query)
    objective = Objective.of_outputs(
        lambda w, part: parameters.call(w, part[0]),
        lambda z, part: class_losses(z, part[1]),
        (x, y),
        recipe.l2,
        chunk=work.data_chunk,
    )
    w = parameters.flat()
    objective.sample_losses(w)  # refuses losses that are not finite
    batches = (
        None
        if recipe.batch_size is None
        else partition(objective.n, recipe.batch_size, recipe.batch_seed)
    )
    problem = SAMProblem(objective, recipe.rho, batches)

    def metric(at: Tensor) -> Tensor:
        total = [
            cross_entropy(parameters.call(at, part), labels, reduction="sum")
            for part, labels in chunks((x_query, y_query), work.data_chunk)
        ]
        return torch.stack(total).sum() / len(y_query)

    if recipe.estimator == "gif_checkpoints":
        points, rates = read_checkpoints(options.checkpoints, parameters, model)
        scores = gif_checkpoints(problem, points, rates, metric).cpu().numpy()
    else:
        with user_code(f"--model {options.model}"):
            known = model_digest(model, x[:KEYED])
        inputs = {
            "recipe": recipe,
            "model": known,
            "data": [data.x, data.y],
            "queries": [query.x, query.y],
        }
        with Pieces(options.out, inputs) as pieces:
            scores = by_solving(recipe, work, problem, w, metric, pieces, console)
    columns: dict[str, list] = {} if data.ids is None else {"id": data.ids}
    columns["label"] = data.y.tolist()
    scoring.write_scores(options.out, scores, columns)
    order = np.argsort(scores, kind="stable")
    names = data.ids or [str(row) for row in range(len(scores))]
    print(
        f"{options.out}: {len(scores)} scores of the mean loss on {len(y_query)} queries; rank 1 is"
        " the most harmful"
    )
    for title, chosen in (("most harmful", order[:5]), ("most helpful", order[::-1][:5])):
        print(f"{title}: " + ", ".join(f"{names[row]} ({scores[row]:+.2e})" for row in chosen))
    return 0


def by_solving(
    recipe: Scoring,
    work: Work,
    problem: SAMProblem,
    w: Tensor,
    metric: Callable[[Tensor], Tensor],
    pieces: Pieces,
    console: Console,
) -> np.ndarray:
    """IF, SAM-IF or SAM-HIF of all samples, [n]: refuse what predicts nothing, solve once, score in
    chunks. The solution and the chunks outlive a kill.
    """
    at = problem.at(w, recipe.curvature)
    gradient = at.plain_gradient if recipe.estimator == "if" else at.residual
    norm = scoring.check_converged(gradient, work.gradient_tolerance)
    console.print(
        f"the gradient's norm is {norm:.2e}; rho/|g| is {max(part.c for part in at.pieces):.3g}",
        markup=False,
    )
    estimator = Estimator(
        at,
        recipe.estimator,
        recipe.damping,
        recipe.solver,
        recipe.tolerance,
        recipe.drop_eq9_term,
    )
    if recipe.estimator != "if":
        at.check_turning()
    if recipe.curvature == "hessian":
        require_positive(at.plain if recipe.estimator == "if" else at.frozen, w, recipe.damping)

    def solve() -> Tensor:
        s, info = estimator.solve(metric_gradient(metric, w), transposed=True)
        console.print(
            f"solved by {info.solver} in {info.iterations} iterations, relative residual"
            f" {info.relative_residual:.1e}",
            markup=False,
        )
        return s

    if pieces.has("solution"):
        console.print("the system was solved before; going on from there", markup=False)
    carriers = estimator.carriers(torch.from_numpy(pieces.array("solution", solve)).to(w))
    return scoring.score_in_chunks(
        lambda rows: estimator.score_samples(carriers, rows),
        problem.objective.n,
        work.chunk,
        pieces,
        console,
    )


def check_outputs(
    text: str, parameters: Parameters, sample: Tensor, y: Tensor, y_query: Tensor
) -> None:
    """UserError unless the model of `--model` gives a logit per class for a sample [1, ...]."""
    shape = tuple(sample.shape[1:])
    with torch.no_grad(), user_code(f"--model {text}, called with a sample of shape {shape}"):
        logits = parameters.call(parameters.flat(), sample)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UserError("the model must return logits of shape [samples, classes]")
    for labels, what in ((y, "a training label"), (y_query, "a query's label")):
        if int(labels.max()) >= logits.shape[1]:
            raise UserError(
                f"{what} is {int(labels.max())}, and the model has {logits.shape[1]} classes,"
                " from 0"
            )


def read_checkpoints(
    pairs: list[str], parameters: Parameters, model: nn.Module
) -> tuple[list[Tensor], list[float]]:
    """`FILE.safetensors:RATE` each, the last one the trained model."""
    points, rates = [], []
    for text in pairs:
        file, colon, rate = text.rpartition(":")
        try:
            rates.append(float(rate))
        except ValueError:
            colon = ""
        if not colon or not 0 <= rates[-1] < float("inf"):
            raise UserError(
                f"--checkpoints {text}: give FILE.safetensors:RATE, the learning rate times the"
                " steps it stands for"
            )
        load_weights(model, user_weights(Path(file))[0], file)
        points.append(parameters.flat())
    if not points:
        raise UserError("--estimator gif_checkpoints needs --checkpoints FILE.safetensors:RATE ...")
    return points, rates


# ---- train ---------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    """Train a small model to SAM's fixed point and write its weights. Returns the exit status."""
    recipe = Training.from_options(options)
    check_out(options.out, ".safetensors", what="weights")
    data = read_samples(options.data, torch.float64)
    torch.manual_seed(recipe.seed)
    model = (
        architecture(recipe.architecture, data.x[0].numel(), int(data.y.max()) + 1).double().eval()
    )
    parameters = Parameters.of(model)
    objective = Objective(
        lambda w, part: class_losses(parameters.call(w, part[0]), part[1]),
        (data.x, data.y),
        recipe.l2,
    )
    root = fit(SAMProblem(objective, recipe.rho), parameters.flat(), tol=recipe.gradient_tolerance)
    parameters.load(root.w)
    atomic_save(model.state_dict(), options.out)
    right = float((parameters.call(root.w, data.x).argmax(1) == data.y).double().mean())
    print(
        f"{options.out}: trained with SAM to |F| = {root.residual:.1e}; {100 * right:.1f} % of the"
        " training labels are right"
    )
    return 0
