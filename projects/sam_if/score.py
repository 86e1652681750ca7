"""`score` and `train`: the reader's own model and data to a file of scores; and a small model to
try it on.
"""

import argparse
import importlib
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from projects.sam_if.estimators import Estimator
from projects.sam_if.fixed_point import SAMProblem, fit, partition
from projects.sam_if.trajectory import gif_checkpoints
from shared.commands.options import device_of
from shared.commands.pieces import Pieces
from shared.errors import UserError
from shared.files import atomic_write
from shared.influence import scoring
from shared.influence.baselines import metric_gradient
from shared.influence.objective import Objective, class_losses
from shared.influence.params import Parameters
from shared.influence.products import chunks
from shared.influence.solvers import require_positive
from shared.vision import images as vision

DTYPES = {"float64": torch.float64, "float32": torch.float32}


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
            or values that are not finite.
    """
    if path.is_dir():
        found = _folder(path, dtype, classes)
    else:
        found = _npz(path, dtype)
    if len(found.x) != len(found.y) or not len(found.x):
        raise UserError(
            f"{path}: there are {len(found.x)} samples in x and {len(found.y)} labels in y; there"
            " must be as many, and some"
        )
    if not found.x.isfinite().all():
        bad = int((~found.x.flatten(1).isfinite()).any(1).nonzero()[0])
        raise UserError(f"{path}: sample {bad} holds values that are not finite")
    if int(found.y.min()) < 0:
        raise UserError(f"{path}: labels are integers from 0, not {int(found.y.min())}")
    if found.ids is not None:
        scoring.check_ids(found.ids, len(found.x))
    return found


def _npz(path: Path, dtype: torch.dtype) -> Samples:
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give a .npz file with x and y, or a folder with a folder of"
            " images per class"
        ) from None
    except (ValueError, OSError, EOFError, TypeError, AttributeError):
        raise UserError(
            f"{path} is no .npz file of plain arrays; save it with numpy.savez(path, x=..., y=...)"
        ) from None
    absent = [name for name in ("x", "y") if name not in arrays]
    if absent:
        raise UserError(
            f"{path} holds no array '{absent[0]}'; it holds {', '.join(arrays) or 'nothing'}"
        )
    x, y = arrays["x"], arrays["y"]
    if x.dtype.kind not in "fiub" or x.ndim < 2:
        raise UserError(
            f"{path}: x must be numbers of shape [samples, ...], not {x.dtype} of shape {x.shape}"
        )
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise UserError(
            f"{path}: y must be integers of shape [samples], not {y.dtype} of shape {y.shape}"
        )
    ids = [str(one) for one in arrays["id"].tolist()] if "id" in arrays else None
    return Samples(torch.from_numpy(x).to(dtype), torch.from_numpy(y.astype(np.int64)), ids)


def _folder(path: Path, dtype: torch.dtype, classes: list[str] | None) -> Samples:
    found = vision.folder(path, classes)
    return Samples(found.images(dtype), found.labels, list(found.ids or ()), list(found.classes))


def architecture(name: str, features: int, classes: int) -> nn.Sequential:
    """`softmax`, or `mlp-32-16`: tanh layers of these widths; inputs are flattened."""
    kind, *widths = name.split("-")
    if (kind, bool(widths)) not in (("softmax", False), ("mlp", True)) or not all(
        one.isdigit() and int(one) for one in widths
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
    """`module:function`, a function that returns the trained model; or a .safetensors file with
    `--architecture`.
    """
    if text.endswith(".safetensors"):
        if shape is None:
            raise UserError(
                f"--model {text} holds weights alone; say with --architecture what they are of"
            )
        weights = read_weights(Path(text))
        model = architecture(shape, data.x[0].numel(), _outputs(weights, int(data.y.max()) + 1))
        model = (
            model.double() if any(one.dtype == torch.float64 for one in weights.values()) else model
        )
        load_weights(model, weights, text)
        return model.eval()
    module, colon, name = text.partition(":")
    if not colon:
        raise UserError(
            f"--model {text}: give module:function, or a .safetensors file with --architecture"
        )
    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), name)()
    except ModuleNotFoundError as error:
        raise UserError(f"--model {text}: there is no module '{error.name}' here") from None
    except AttributeError as error:
        raise UserError(f"--model {text}: {error}") from None
    finally:
        sys.path.remove("")
    if not isinstance(made, nn.Module):
        raise UserError(
            f"--model {text}: the function returns a {type(made).__name__}, not a torch.nn.Module"
        )
    return made.eval()


def _outputs(weights: dict[str, Tensor], otherwise: int) -> int:
    """Classes of the weights: as many as the last layer's bias has numbers."""
    numbers = [
        int(name.split(".")[0])
        for name in weights
        if name.endswith(".bias") and name.split(".")[0].isdigit()
    ]
    return len(weights[f"{max(numbers)}.bias"]) if numbers else otherwise


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError):
        raise UserError(f"{path} is damaged, or no .safetensors file") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Into the model; UserError in one line when names or shapes differ."""
    own = model.state_dict()
    for key in [*own, *weights]:
        if key not in own or key not in weights or own[key].shape != weights[key].shape:
            a, b = (tuple(one[key].shape) if key in one else "absent" for one in (own, weights))
            raise UserError(
                f"{name} does not fit the model: {key} is {a} in the model and {b} in the file"
            )
    model.load_state_dict(weights)


# ---- score ---------------------------------------------------------------------------------------


def score(options: argparse.Namespace) -> int:
    """Write the scores; see `__main__` for the options. Returns the exit status."""
    console = Console(stderr=True, highlight=False)
    scoring.check_scores_out(options.out)
    device, dtype = device_of(options.device), DTYPES[options.dtype]
    data = read_samples(options.data, dtype)
    query = read_samples(options.query, dtype, data.classes)
    scoring.check_queries((data.x, data.y), (query.x, query.y))
    model = read_model(options.model, options.architecture, data).to(device)
    parameters = Parameters.of(model, dtype=dtype)
    x, y, x_query, y_query = (one.to(device) for one in (data.x, data.y, query.x, query.y))
    check_outputs(parameters, x[:1], y, y_query)
    objective = Objective.of_outputs(
        lambda w, part: parameters.call(w, part[0]),
        lambda z, part: class_losses(z, part[1]),
        (x, y),
        options.l2,
        chunk=options.data_chunk,
    )
    w = parameters.flat()
    objective.sample_losses(w)  # refuses losses that are not finite
    batches = (
        None
        if options.batch_size is None
        else partition(objective.n, options.batch_size, options.batch_seed)
    )
    problem = SAMProblem(objective, options.rho, batches)

    def metric(at: Tensor) -> Tensor:
        total = [
            cross_entropy(parameters.call(at, one), labels, reduction="sum")
            for one, labels in chunks((x_query, y_query), options.data_chunk)
        ]
        return torch.stack(total).sum() / len(y_query)

    columns: dict[str, list] = {} if data.ids is None else {"id": data.ids}
    columns["label"] = data.y.tolist()
    if options.estimator == "gif_checkpoints":
        points, rates = read_checkpoints(options.checkpoints, parameters, model)
        found = gif_checkpoints(problem, points, rates, metric).cpu().numpy()
    else:
        found = by_solving(
            options,
            problem,
            w,
            metric,
            {"x": data.x, "y": data.y, "query x": query.x, "query y": query.y},
            console,
        )
    scoring.write_scores(options.out, found, columns)
    order = np.argsort(found, kind="stable")
    names = data.ids or [str(one) for one in range(len(found))]
    print(
        f"{options.out}: {len(found)} scores of the mean loss on {len(y_query)} queries; rank 1 is"
        " the most harmful"
    )
    for title, chosen in (("most harmful", order[:5]), ("most helpful", order[::-1][:5])):
        print(f"{title}: " + ", ".join(f"{names[one]} ({found[one]:+.2e})" for one in chosen))
    return 0


def by_solving(
    options: argparse.Namespace,
    problem: SAMProblem,
    w: Tensor,
    metric,
    inputs: dict[str, Tensor],
    console: Console,
) -> np.ndarray:
    """IF, SAM-IF or SAM-HIF: refuse what predicts nothing, solve once, score in chunks. The
    solution and the chunks outlive a kill.
    """
    at = problem.at(w, options.curvature)
    gradient = at.plain_gradient if options.estimator == "if" else at.residual
    norm = scoring.check_converged(gradient, options.gradient_tolerance)
    console.print(
        f"the gradient's norm is {norm:.2e}; rho/|g| is {max(one.c for one in at.pieces):.3g}",
        markup=False,
    )
    estimator = Estimator(
        at,
        options.estimator,
        options.damping,
        options.solver,
        options.tolerance,
        options.drop_eq9_term,
    )
    if options.estimator != "if":
        at.check_turning()
    if options.curvature == "hessian":
        require_positive(at.plain if options.estimator == "if" else at.frozen, w, options.damping)
    settings = {name: getattr(options, name) for name in SETTINGS} | {"w": w, **inputs}

    def solve() -> Tensor:
        s, info = estimator.solve(metric_gradient(metric, w), transposed=True)
        console.print(
            f"solved by {info.solver} in {info.iterations} iterations, relative residual"
            f" {info.relative_residual:.1e}",
            markup=False,
        )
        return s

    with Pieces(options.out, settings) as pieces:
        if pieces.has("solution"):
            console.print("the system was solved before; going on from there", markup=False)
        carriers = estimator.carriers(torch.from_numpy(pieces.array("solution", solve)).to(w))
        return scoring.score_in_chunks(
            lambda rows: estimator.score_samples(carriers, rows),
            problem.objective.n,
            options.chunk,
            pieces,
            console,
        )


SETTINGS = (
    "estimator", "rho", "l2", "curvature", "damping", "solver", "tolerance", "drop_eq9_term",
    "batch_size", "batch_seed", "dtype",
)  # fmt: skip


def check_outputs(parameters: Parameters, one: Tensor, y: Tensor, y_query: Tensor) -> None:
    """UserError unless the model gives a logit per class for a sample."""
    try:
        with torch.no_grad():
            logits = parameters.call(parameters.flat(), one)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"the model does not take a sample of shape {tuple(one.shape[1:])}:"
            f" {' '.join(str(error).split())[:120]}"
        ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UserError("the model must return logits of shape [samples, classes]")
    for labels, what in ((y, "a training label"), (y_query, "a query's label")):
        if int(labels.max()) >= logits.shape[1]:
            raise UserError(
                f"{what} is {int(labels.max())}, and the model has {logits.shape[1]} classes,"
                " from 0"
            )


def read_checkpoints(
    given: list[str], parameters: Parameters, model: nn.Module
) -> tuple[list[Tensor], list[float]]:
    """`FILE.safetensors:RATE` each, the last one the trained model."""
    points, rates = [], []
    for one in given or []:
        file, colon, rate = one.rpartition(":")
        try:
            rates.append(float(rate))
        except ValueError:
            colon = ""
        if not colon or not 0 <= rates[-1] < float("inf"):
            raise UserError(
                f"--checkpoints {one}: give FILE.safetensors:RATE, the learning rate times the"
                " steps it stands for"
            )
        load_weights(model, read_weights(Path(file)), file)
        points.append(parameters.flat())
    if not points:
        raise UserError("--estimator gif_checkpoints needs --checkpoints FILE.safetensors:RATE ...")
    return points, rates


# ---- train ---------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    """Train a small model to SAM's fixed point and write its weights."""
    if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
        raise UserError(f"{options.out}: name a .safetensors file in a folder that exists")
    data = read_samples(options.data, torch.float64)
    torch.manual_seed(options.seed)
    model = (
        architecture(options.architecture, data.x[0].numel(), int(data.y.max()) + 1).double().eval()
    )
    parameters = Parameters.of(model)
    objective = Objective(
        lambda w, part: class_losses(parameters.call(w, part[0]), part[1]),
        (data.x, data.y),
        options.l2,
    )
    root = fit(
        SAMProblem(objective, options.rho), parameters.flat(), tol=options.gradient_tolerance
    )
    parameters.load(root.w)
    atomic_write(options.out, safetensors.torch.save(model.state_dict()))
    right = float((parameters.call(root.w, data.x).argmax(1) == data.y).double().mean())
    print(
        f"{options.out}: trained with SAM to |F| = {root.residual:.1e}; {100 * right:.1f} % of the"
        " training labels are right"
    )
    return 0
