"""What the commands that score a user's data share: refusals before the work, chunks that survive a
kill, a file of scores.

Retraining, indefinite Hessians and solvers that do not converge are refused where they are
(`retrain`, `solvers`).
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from torch import Tensor

from shared.commands.folder import check_out
from shared.commands.pieces import Pieces, remove_pieces
from shared.commands.progress import Progress
from shared.commands.signals import Stopped, stop_signals
from shared.errors import UserError
from shared.files import atomic_write

if TYPE_CHECKING:
    import pandas

COLUMNS = ("index", "score", "rank")


# ---- before --------------------------------------------------------------------------------------


def check_converged(gradient: Tensor, tol: float) -> float:
    """The norm of the objective's gradient [p] where the model is said to be trained; UserError
    when it is above `tol`.

    A score is the derivative of an optimum: away from one it predicts nothing.
    """
    norm = float(gradient.norm())
    if not math.isfinite(norm):
        raise UserError(
            f"the gradient of the objective is {norm}; look at the model's weights and the data"
        )
    if norm > tol:
        raise UserError(
            f"the model is not trained to a minimum: the gradient's norm is {norm:.2g}, above"
            f" {tol:g}; train on, or allow more"
        )
    return norm


def check_ids(ids: Sequence[object], n: int) -> None:
    """UserError unless there is an id of its own for each of n samples."""
    if len(ids) != n:
        raise UserError(f"there are {len(ids)} ids for {n} samples; give one per sample")
    seen: dict[object, int] = {}
    for row, one in enumerate(ids):
        if one in seen:
            raise UserError(
                f"samples {seen[one]} and {row} have the same id '{one}'; ids must differ"
            )
        seen[one] = row


def check_queries(train: Sequence[Tensor], query: Sequence[Tensor]) -> None:
    """UserError unless the queries are tensors like the training data's: as many, of the same
    shapes and types, and some.
    """
    if len(train) != len(query):
        raise UserError(
            f"a query has {len(query)} tensors and a training sample {len(train)}; they must be of"
            " one kind"
        )
    for number, (a, b) in enumerate(zip(train, query, strict=True)):
        if a.shape[1:] != b.shape[1:]:
            raise UserError(
                f"a query's tensor {number} has the shape {tuple(b.shape[1:])}, a training sample's"
                f" {tuple(a.shape[1:])}"
            )
        if a.dtype != b.dtype:
            raise UserError(
                f"the queries' tensor {number} is of {b.dtype}, the training samples' of {a.dtype};"
                " convert one"
            )
    if not query or query[0].shape[0] == 0:
        raise UserError("there are no queries to score for")


# ---- chunks --------------------------------------------------------------------------------------


def score_in_chunks(
    score: Callable[[slice], ArrayLike], n: int, chunk: int, pieces: Pieces, console: Console
) -> np.ndarray:
    """Score n samples chunk by chunk; finished chunks outlive a kill, and the next call with the
    same inputs does the rest.

    Args:
        score: a range of samples -> their scores, [samples] or [samples, q].
        pieces: where finished chunks lie, under the key of all that the scores depend on;
            `write_scores` removes them.
        console: for progress.

    Raises:
        UserError: a score is not finite, or the disk is full.
        Stopped: Ctrl-C or SIGTERM came; the chunk under way was ended first.
    """
    chunks = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    names = [f"scores-{rows.start}-{rows.stop}" for rows in chunks]
    missing = [i for i, name in enumerate(names) if not pieces.has(name)]
    done = len(chunks) - len(missing)
    with stop_signals() as stop, Progress(console, done, len(chunks)) as progress:
        for i in missing:
            if stop:
                raise Stopped(
                    f"stopped after {min(done * chunk, n)} of {n} samples; the same command goes on"
                    " from there",
                    stop[0],
                )
            rows = chunks[i]
            pieces.array(names[i], lambda rows=rows: _finite(score(rows), rows))  # type: ignore[misc]
            done += 1
            progress.step(done, 0, None)
    return np.concatenate([pieces.read(name) for name in names])


def _finite(scores: ArrayLike, rows: slice) -> np.ndarray:
    values = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores)
    assert values.shape[0] == rows.stop - rows.start
    if not np.isfinite(values).all():
        bad = rows.start + int(np.argwhere(~np.isfinite(values))[0][0])
        raise UserError(
            f"the score of sample {bad} is not finite; look at the sample, or use more damping"
        )
    return values


# ---- after ---------------------------------------------------------------------------------------


def score_table(
    scores: ArrayLike, columns: Mapping[str, Sequence[object]] | None = None
) -> "pandas.DataFrame":
    """Scores [n] with the sample's index and its rank; `columns` (ids, labels ...) stand after
    them.

    Rank 1 is the lowest score: for a metric that is a loss, the most harmful sample. Equal scores
    rank in the order of the samples.

    Raises:
        UserError: scores are not one finite number per sample, or a column is taken or of another
            length.
    """
    import pandas

    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise UserError(
            "a table of scores takes one finite number per sample; reduce those of several queries"
            " to one first"
        )
    rank = np.empty(values.size, dtype=np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(1, values.size + 1)
    own = {"index": np.arange(values.size), "score": values, "rank": rank}
    for name, column in (columns or {}).items():
        if name in COLUMNS:
            raise UserError(
                f"a column of yours is called '{name}', as one of the scores' own"
                f" ({', '.join(COLUMNS)}); rename it"
            )
        if len(column) != values.size:
            raise UserError(f"column '{name}' has {len(column)} values for {values.size} samples")
    return pandas.DataFrame(
        {**own, **{name: list(column) for name, column in (columns or {}).items()}}
    )


def check_scores_out(out: Path) -> None:
    """UserError unless scores can be written there, which is tried: a name that ends in .csv or
    .parquet, in a folder that exists.
    """
    check_out(out, ".csv", ".parquet", what="scores")


def write_scores(
    out: Path, scores: ArrayLike, columns: Mapping[str, Sequence[object]] | None = None
) -> None:
    """Write `score_table` to a .csv or .parquet file in one step, and remove the chunks that lie
    beside it.
    """
    check_scores_out(out)
    table = score_table(scores, columns)
    buffer = io.BytesIO()
    if out.suffix == ".csv":
        table.to_csv(buffer, index=False)
    else:
        table.to_parquet(buffer, index=False)
    atomic_write(out, buffer.getvalue())
    remove_pieces(out)
