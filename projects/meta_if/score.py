"""The commands' work: meta-training on a file of tasks, and scores of its tasks or samples for
another file of tasks.
"""

import argparse
import importlib
import json
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from projects.meta_if import estimators
from projects.meta_if.problems import Anil, Imaml, MetaProblem, Tasks
from projects.meta_if.total import Implicit, at
from projects.meta_if.training import fit as meta_fit
from shared.commands.pieces import Pieces
from shared.commands.progress import Progress
from shared.errors import UserError
from shared.files import atomic_write
from shared.influence import scoring
from shared.influence.solvers import cg, require_positive
from shared.vision.backbones import backbone, initialised

NAMES = ("x_train", "y_train", "x_val", "y_val")
EXACT_SPECTRUM = 500  # up to here the smallest eigenvalue is computed before the solve


# ---- what the user gives -------------------------------------------------------------------------


def read_tasks(file: Path) -> tuple[Tasks, list[str] | None]:
    """Tasks of a .npz with x_train [n, s, ...], y_train [n, s], x_val [n, t, ...], y_val [n, t],
    and ids [n] if it has any.
    """
    try:
        with np.load(file, allow_pickle=False) as saved:
            missing = [name for name in NAMES if name not in saved]
            if missing:
                raise UserError(f"{file} has no array {missing[0]}; it needs {', '.join(NAMES)}")
            found = {name: saved[name] for name in NAMES}
            ids = [str(one) for one in saved["ids"]] if "ids" in saved else None
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        raise UserError(
            f"{file} is not an .npz of plain arrays; write it with numpy.savez, without objects"
        ) from None
    for part in ("train", "val"):
        x, y = found[f"x_{part}"], found[f"y_{part}"]
        if (
            y.dtype.kind not in "iu"
            or y.ndim != 2
            or x.shape[:2] != y.shape
            or x.dtype.kind not in "fiu"
        ):
            raise UserError(
                f"{file}: x_{part} must be numbers [tasks, samples, ...] and y_{part} integers"
                f" [tasks, samples], not {x.dtype} {x.shape} and {y.dtype} {y.shape}"
            )
        if y.size and y.min() < 0:
            raise UserError(f"{file}: y_{part} holds a negative class; classes count from 0")
    if (
        found["x_train"].shape[0] != found["x_val"].shape[0]
        or found["x_train"].shape[2:] != found["x_val"].shape[2:]
    ):
        raise UserError(
            f"{file}: x_train {found['x_train'].shape} and x_val {found['x_val'].shape} must hold"
            " as many tasks of equal samples"
        )
    if found["x_train"].shape[0] == 0:
        raise UserError(f"{file} holds no tasks")
    for name in ("x_train", "x_val"):
        bad = np.argwhere(~np.isfinite(found[name]))
        if len(bad):
            raise UserError(
                f"{file}: {name} of task {bad[0][0]}, sample {bad[0][1]} is not finite, so its loss"
                " would be NaN"
            )
    x_train, y_train, x_val, y_val = (
        torch.from_numpy(np.ascontiguousarray(found[name])) for name in NAMES
    )
    return Tasks(x_train.double(), y_train.long(), x_val.double(), y_val.long()), ids


def make_model(text: str, example_shape: tuple[int, ...], logits: bool = False) -> nn.Module:
    """`module:function` (a function that returns a module), or a body by name, as
    `shared.vision.backbones` has them; a network with `logits`.
    """
    if ":" not in text:
        return backbone(text, example_shape, logits=logits)
    module, _, name = text.partition(":")
    sys.path.insert(0, "")  # the user's own modules lie where the command is given
    try:
        made = getattr(importlib.import_module(module), name)()
    except ModuleNotFoundError as error:
        raise UserError(f"--model {text}: {error}") from None
    except AttributeError:
        raise UserError(f"--model {text}: module {module} has no function {name}") from None
    finally:
        sys.path.remove("")
    if not isinstance(made, nn.Module):
        raise UserError(
            f"--model {text} returned a {type(made).__name__}; it must return a torch module"
        )
    return made


def read_settings(file: Path) -> dict[str, Any]:
    """What `fit` left in a .safetensors file of how it trained; empty for another's."""
    with _opened(file) as saved:
        return dict(json.loads((saved.metadata() or {}).get("meta_if", "{}")))


def load_weights(model: nn.Module, file: Path) -> None:
    """Read a .safetensors file into the model."""
    with _opened(file) as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118  (not a dict)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the model: {' '.join(str(error).split())}") from None


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file; make one with: python -m projects.meta_if fit"
        ) from None
    except (SafetensorError, OSError):
        raise UserError(f"{file} is not a .safetensors file") from None


def make_problem(model: nn.Module, tasks: Tasks, settings: dict[str, Any]) -> MetaProblem:
    """The bilevel problem of the settings `inner`, `ways`, `penalty`, `l2`, `chunk`."""
    ways = settings["ways"]
    highest = int(max(tasks.y_train.max(), tasks.y_val.max())) + 1
    if highest > ways:
        raise UserError(
            f"a task has a class {highest - 1}, but there are {ways} classes from 0; see --ways"
        )
    example = tasks.x_train[0]
    if settings["inner"] == "anil":
        inner = Anil.of(model, example, ways, settings["penalty"], torch.float64)
    else:
        inner = Imaml.of(model, settings["penalty"], torch.float64)
        with torch.no_grad():
            found = inner.model.call(inner.model.flat(), example)
        if found.shape != (len(example), ways):
            raise UserError(
                f"the network must give {ways} logits a sample, not outputs of shape"
                f" {tuple(found.shape[1:])}"
            )
    return MetaProblem(inner, tasks, l2=settings["l2"], chunk=settings["chunk"], inner_tol=1e-9)


# ---- commands ------------------------------------------------------------------------------------


def fit(options: argparse.Namespace) -> int:
    """Meta-train and write the weights, with the settings they were trained with."""
    if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: name a .safetensors file in a folder that exists")
    tasks, _ = read_tasks(options.data)
    model = initialised(
        make_model(options.model, tuple(tasks.x_train.shape[2:]), options.inner == "imaml"),
        options.seed,
    )
    settings = {
        "inner": options.inner,
        "ways": options.ways or int(max(tasks.y_train.max(), tasks.y_val.max())) + 1,
        "penalty": options.penalty,
        "l2": options.l2,
        "chunk": options.chunk,
    }
    problem = make_problem(model, tasks, settings)
    console = Console(stderr=True)
    with Progress(console, 0, options.steps) as progress:

        def shown(steps: Any) -> Any:
            for step in steps:
                yield step
                progress.step(step + 1, 0, None)

        found = meta_fit(
            problem,
            problem.inner.parameters.flat(),
            steps=options.steps,
            rate=options.rate,
            tol=options.tol,
            checkpoints=0,
            progress=shown,
        )
    trained = model.double()
    problem.inner.parameters.load(found.lam)
    kept = {name: value.contiguous() for name, value in trained.state_dict().items()}
    settings.pop("chunk")
    atomic_write(options.out, save(kept, {"meta_if": json.dumps(settings)}))
    console.print(
        f"trained to a total gradient of norm {found.gradient_norm:.1e}: {options.out}",
        markup=False,
    )
    return 0


def score(options: argparse.Namespace) -> int:
    """Score tasks or samples for the query tasks and write the file."""
    scoring.check_scores_out(options.out)
    tasks, ids = read_tasks(options.data)
    queries, _ = read_tasks(options.query)
    if tasks.x_train.shape[2:] != queries.x_train.shape[2:]:
        raise UserError(
            f"a sample of the query tasks has the shape {tuple(queries.x_train.shape[2:])}, one of"
            f" the meta-training tasks {tuple(tasks.x_train.shape[2:])}; they must be of one kind"
        )
    n = tasks.x_train.shape[0]
    if ids is not None:
        scoring.check_ids(ids, n)
    left = read_settings(options.weights)
    given = {
        "inner": options.inner,
        "ways": options.ways,
        "penalty": options.penalty,
        "l2": options.l2,
    }
    settings = {
        **left,
        **{name: value for name, value in given.items() if value is not None},
        "chunk": options.chunk,
    }
    unknown = [name for name in given if name not in settings]
    if unknown:
        raise UserError(
            f"{options.weights} does not say what it was trained with; give --{' --'.join(unknown)}"
        )
    model = make_model(
        options.model, tuple(tasks.x_train.shape[2:]), settings["inner"] == "imaml"
    ).double()
    load_weights(model, options.weights)
    problem = make_problem(model, tasks, settings)
    tests = make_problem(model, queries, {**settings, "l2": 0.0})
    lam = problem.inner.parameters.flat()
    state = at(problem, lam)
    assert isinstance(state, Implicit)
    rows = state.check_tasks(options.only) if options.only else list(range(n))
    scoring.check_converged(state.gradient(), options.tol)
    if options.method not in estimators.METHODS:
        raise UserError(
            f"there is no method '{options.method}'; there are {', '.join(estimators.METHODS)}"
        )
    if options.level != "tasks" and options.method != "task-IF":
        raise UserError(
            f"samples are scored by task-IF's total Hessian alone, not by '{options.method}'"
        )

    console = Console(stderr=True)
    inputs = {
        **{f"tasks {name}": part for name, part in zip(NAMES, tasks, strict=True)},
        **{f"queries {name}": part for name, part in zip(NAMES, queries, strict=True)},
        "lam": lam,
        "settings": {name: value for name, value in settings.items() if name != "chunk"},
        "options": [options.level, options.method, options.damping, options.solve_tol, rows],
    }

    def of(piece: slice) -> Tensor:
        part = Implicit(_only(problem, rows[piece]), lam)
        if options.level == "tasks":
            return estimators.task_scores(part, s, options.method)
        return (estimators.train_scores if options.level == "train" else estimators.val_scores)(
            part, s
        ).flatten(1)

    with Pieces(options.out, inputs) as pieces:
        solution = pieces.array("solution", lambda: _solve(state, tests, options, console))
        s = torch.from_numpy(solution).to(lam)
        found = scoring.score_in_chunks(of, len(rows), options.rows or 64, pieces, console)
    columns: dict[str, list[object]] = {"task": rows} if found.ndim == 1 else {}
    if found.ndim == 2:
        per_task = found.shape[1]
        columns = {
            "task": list(np.repeat(rows, per_task)),
            "sample": list(np.tile(np.arange(per_task), len(rows))),
        }
    if ids is not None:
        columns["id"] = [ids[int(task)] for task in columns["task"]]
    scoring.write_scores(options.out, found.reshape(-1), columns)
    console.print(
        f"{found.size} scores: {options.out} (rank 1: without it the query loss falls most)",
        markup=False,
    )
    return 0


def _only(problem: MetaProblem, rows: list[int]) -> MetaProblem:
    """The problem of some tasks, each with the weight it has among all."""
    share = torch.full((len(rows),), len(rows) / problem.n, dtype=torch.float64)
    return replace(problem, tasks=problem.tasks.pick(rows), weights=share)


def _solve(
    state: Implicit, tests: MetaProblem, options: argparse.Namespace, console: Console
) -> Tensor:
    """s of `estimators.adjoint`."""
    metric = estimators.metric_gradient(tests, state.lam)
    done = 0

    def watched(operator, v: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if done % 20 == 0:
            console.print(f"solving: {done} products", markup=False)
        return operator(v)

    def solver(operator, b: Tensor):
        if b.numel() <= EXACT_SPECTRUM:
            require_positive(operator, b, options.damping)
        return cg(
            partial(watched, operator),
            b,
            damping=options.damping,
            tol=options.solve_tol,
            iterations=options.iterations,
        )

    s, info = estimators.adjoint(state, metric, options.method, solver)
    console.print(
        f"solved: {info.products} products, relative residual {info.relative_residual:.1e}",
        markup=False,
    )
    return s
