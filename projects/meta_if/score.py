"""The commands' work: meta-training on a file of tasks, and scores of its tasks or samples for
another file of tasks.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from projects.meta_if import estimators
from projects.meta_if.command import Problem, Scoring, Training, Work
from projects.meta_if.problems import Anil, Imaml, MetaProblem, Tasks
from projects.meta_if.total import Implicit, at
from projects.meta_if.training import fit as meta_fit
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
from shared.commands.pieces import Pieces
from shared.commands.progress import Progress
from shared.errors import UserError
from shared.files import atomic_save
from shared.finite import check_finite
from shared.influence import scoring
from shared.influence.params import refuse_unseen_modes
from shared.influence.solvers import cg, require_positive
from shared.vision.backbones import backbone, initialised

NAMES = ("x_train", "y_train", "x_val", "y_val")
ARRAYS = {
    "x_train": Array("fiu", ("tasks", "training samples", ...)),
    "y_train": Array("iu", ("tasks", "training samples"), least=0, most=MOST_LABEL),
    "x_val": Array("fiu", ("tasks", "validation samples", ...)),
    "y_val": Array("iu", ("tasks", "validation samples"), least=0, most=MOST_LABEL),
    "ids": Array("USiu", ("tasks",), required=False),
}
EXACT_SPECTRUM = 500  # up to here the smallest eigenvalue is computed before the solve


# ---- what the user gives -------------------------------------------------------------------------


def read_tasks(file: Path) -> tuple[Tasks, list[str] | None]:
    """Tasks of a .npz with x_train [n, s, ...], y_train [n, s], x_val [n, t, ...], y_val [n, t],
    and ids [n] if it has any.

    Raises UserError as `user_arrays` does, where samples are of two shapes, and where an id stands
    twice.
    """
    arrays = user_arrays(file, ARRAYS)
    train, val = (list(arrays[name].shape[2:]) for name in ("x_train", "x_val"))
    if train != val:
        raise UserError(
            f"{file}: a sample of x_train has the shape {train} and one of x_val {val}; they must"
            " be of one kind"
        )
    ids = [str(name) for name in arrays["ids"].tolist()] if "ids" in arrays else None
    if ids is not None:
        scoring.check_ids(ids, len(arrays["x_train"]))
    x_train, y_train, x_val, y_val = (
        torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in NAMES
    )
    return Tasks(x_train.double(), y_train.long(), x_val.double(), y_val.long()), ids


def make_model(text: str, example_shape: tuple[int, ...], logits: bool = False) -> nn.Module:
    """A module of the user's (`shared.commands.inputs.user_model`), or a body by name, as
    `shared.vision.backbones` has them; a network with `logits`.
    """
    return user_model(text) if ":" in text else backbone(text, example_shape, logits=logits)


def problem_of(metadata: dict[str, str], options: argparse.Namespace) -> Problem:
    """What the weights of --weights were trained for: as `fit` left it in their file's metadata,
    where no option says otherwise.

    Raises UserError where neither does.
    """
    try:
        kept = dict(json.loads(metadata.get("meta_if", "{}")))
    except (ValueError, TypeError):
        raise UserError(f"{options.weights}: its metadata are damaged") from None
    said = {name: getattr(options, name) for name in Problem.model_fields}
    record = {**kept, **{name: value for name, value in said.items() if value is not None}}
    unknown = [name for name in said if name not in record]
    if unknown:
        raise UserError(
            f"{options.weights} does not say what it was trained with; give --{' --'.join(unknown)}"
        )
    return Problem.from_record(record, str(options.weights))


def make_problem(
    text: str, model: nn.Module, tasks: Tasks, settings: Problem, chunk: int | None, l2: float
) -> MetaProblem:
    """The bilevel problem of `settings` but for the regulariser, which test tasks have none of.

    Args:
        text: the model as `--model` names it, for messages.
        chunk: tasks handled at once; None: all.
    """
    highest = int(max(tasks.y_train.max(), tasks.y_val.max())) + 1
    if highest > settings.ways:
        raise UserError(
            f"a task has a class {highest - 1}, but there are {settings.ways} classes from 0; see"
            " --ways"
        )
    example = tasks.x_train[0]
    what = f"--model {text}, called with samples of shape {tuple(example.shape[1:])}"
    inner: Anil | Imaml
    if settings.inner == "anil":
        with user_code(what):
            inner = Anil.of(model, example, settings.ways, settings.penalty, torch.float64)
    else:
        inner = Imaml.of(model, settings.penalty, torch.float64)
        with torch.no_grad(), user_code(what):
            outputs = inner.model.call(inner.model.flat(), example)
            refuse_unseen_modes(inner.model, example)
        if outputs.shape != (len(example), settings.ways):
            raise UserError(
                f"the network must give {settings.ways} logits a sample, not outputs of shape"
                f" {tuple(outputs.shape[1:])}"
            )
    return MetaProblem(inner, tasks, l2=l2, chunk=chunk, inner_tol=1e-9)


# ---- commands ------------------------------------------------------------------------------------


def fit(options: argparse.Namespace) -> int:
    """Meta-train and write the weights, with the settings they were trained with. Returns the exit
    status.
    """
    recipe = Training.from_options(options)
    check_out(options.out, ".safetensors", what="weights")
    tasks, _ = read_tasks(options.data)
    model = initialised(
        make_model(options.model, tuple(tasks.x_train.shape[2:]), recipe.inner == "imaml"),
        recipe.seed,
    )
    settings = Problem(
        inner=recipe.inner,
        ways=recipe.ways or int(max(tasks.y_train.max(), tasks.y_val.max())) + 1,
        penalty=recipe.penalty,
        l2=recipe.l2,
    )
    problem = make_problem(options.model, model, tasks, settings, options.chunk, settings.l2)
    console = Console(stderr=True)
    with Progress(console, 0, recipe.steps) as progress:

        def shown(steps: Iterable[int]) -> Iterator[int]:
            for step in steps:
                yield step
                progress.step(step + 1, 0, None)

        trained = meta_fit(
            problem,
            problem.inner.parameters.flat(),
            steps=recipe.steps,
            rate=recipe.rate,
            tol=recipe.tol,
            checkpoints=0,
            progress=shown,
        )
    model.double()
    problem.inner.parameters.load(trained.lam)
    atomic_save(model.state_dict(), options.out, {"meta_if": json.dumps(settings.record())})
    console.print(
        f"trained to a total gradient of norm {trained.gradient_norm:.1e}: {options.out}",
        markup=False,
    )
    return 0


def score(options: argparse.Namespace) -> int:
    """Score tasks or samples for the query tasks and write the file. Returns the exit status."""
    recipe, work = Scoring.from_options(options), Work.from_options(options)
    scoring.check_scores_out(options.out)
    tasks, ids = read_tasks(options.data)
    queries, _ = read_tasks(options.query)
    if tasks.x_train.shape[2:] != queries.x_train.shape[2:]:
        raise UserError(
            f"a sample of the query tasks has the shape {tuple(queries.x_train.shape[2:])}, one of"
            f" the meta-training tasks {tuple(tasks.x_train.shape[2:])}; they must be of one kind"
        )
    weights, metadata = user_weights(options.weights)
    settings = problem_of(metadata, options)
    model = make_model(
        options.model, tuple(tasks.x_train.shape[2:]), settings.inner == "imaml"
    ).double()
    load_weights(model, weights, str(options.weights))
    check_finite(model, f"--model {options.model}")  # also what no file of weights holds
    problem = make_problem(options.model, model, tasks, settings, options.chunk, settings.l2)
    tests = make_problem(options.model, model, queries, settings, options.chunk, 0.0)
    lam = problem.inner.parameters.flat()
    state = at(problem, lam)
    assert isinstance(state, Implicit)
    rows = state.check_tasks(options.only) if options.only else list(range(problem.n))
    scoring.check_converged(state.gradient(), work.tol)

    console = Console(stderr=True)
    with user_code(f"--model {options.model}"):
        known = model_digest(model, tasks.x_train[0])
    inputs = {
        "recipe": recipe,
        "problem": settings,
        "model": known,
        "tasks": list(tasks),
        "queries": list(queries),
        "only": rows,
    }

    def score_rows(piece: slice) -> Tensor:
        part = Implicit(_only(problem, rows[piece]), lam)
        if recipe.level == "tasks":
            return estimators.task_scores(part, s, recipe.method)
        of_samples = estimators.train_scores if recipe.level == "train" else estimators.val_scores
        return of_samples(part, s).flatten(1)

    with Pieces(options.out, inputs) as pieces:
        solution = pieces.array("solution", lambda: _solve(state, tests, recipe, work, console))
        s = torch.from_numpy(solution).to(lam)
        scores = scoring.score_in_chunks(score_rows, len(rows), work.rows, pieces, console)
    columns: dict[str, list[object]] = {"task": rows} if scores.ndim == 1 else {}
    if scores.ndim == 2:
        per_task = scores.shape[1]
        columns = {
            "task": list(np.repeat(rows, per_task)),
            "sample": list(np.tile(np.arange(per_task), len(rows))),
        }
    if ids is not None:
        columns["id"] = [ids[int(task)] for task in columns["task"]]
    scoring.write_scores(options.out, scores.reshape(-1), columns)
    console.print(
        f"{scores.size} scores: {options.out} (rank 1: without it the query loss falls most)",
        markup=False,
    )
    return 0


def _only(problem: MetaProblem, rows: list[int]) -> MetaProblem:
    """The problem of some tasks, each with the weight it has among all."""
    share = torch.full((len(rows),), len(rows) / problem.n, dtype=torch.float64)
    return replace(problem, tasks=problem.tasks.pick(rows), weights=share)


def _solve(
    state: Implicit, tests: MetaProblem, recipe: Scoring, work: Work, console: Console
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
            require_positive(operator, b, recipe.damping)
        return cg(
            partial(watched, operator),
            b,
            damping=recipe.damping,
            tol=recipe.solve_tol,
            iterations=work.iterations,
        )

    s, info = estimators.adjoint(state, metric, recipe.method, solver)
    console.print(
        f"solved: {info.products} products, relative residual {info.relative_residual:.1e}",
        markup=False,
    )
    return s
