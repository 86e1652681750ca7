"""What a score command shares: refusals, chunks that a kill leaves whole, the file of scores."""

import io
import os
import signal

import numpy as np
import pandas
import pytest
import torch
from rich.console import Console

from shared.commands.pieces import Pieces
from shared.commands.signals import Stopped
from shared.errors import UserError
from shared.influence import scoring

TRUE = np.arange(23.0) ** 2


def quiet() -> Console:
    return Console(file=io.StringIO())


def run(out, score, chunk=5, **inputs):
    with Pieces(out, inputs) as pieces:
        return scoring.score_in_chunks(score, 23, chunk, pieces, quiet())


# ---- before --------------------------------------------------------------------------------------


def test_a_model_that_is_not_trained_is_refused():
    assert scoring.check_converged(torch.tensor([3e-9, 4e-9]), 1e-8) == pytest.approx(5e-9)
    with pytest.raises(
        UserError, match=r"not trained to a minimum: the gradient's norm is 5, above 0\.001"
    ):
        scoring.check_converged(torch.tensor([3.0, 4.0]), 1e-3)
    with pytest.raises(UserError, match="the gradient of the objective is nan"):
        scoring.check_converged(torch.tensor([float("nan")]), 1e-3)


def test_ids_are_one_per_sample_and_differ():
    scoring.check_ids(["a", "b"], 2)
    with pytest.raises(UserError, match="there are 2 ids for 3 samples"):
        scoring.check_ids(["a", "b"], 3)
    with pytest.raises(UserError, match="samples 0 and 2 have the same id 'a'"):
        scoring.check_ids(["a", "b", "a"], 3)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ((torch.zeros(2, 4),), "a query has 1 tensors and a training sample 2"),
        (
            (torch.zeros(2, 5), torch.zeros(2).long()),
            r"tensor 0 has the shape \(5,\), a training sample's \(4,\)",
        ),
        (
            (torch.zeros(2, 4), torch.zeros(2)),
            r"tensor 1 is of torch\.float32, the training samples' of torch\.int64",
        ),
        ((torch.zeros(0, 4), torch.zeros(0).long()), "no queries"),
    ],
)
def test_queries_of_another_kind_are_refused(query, message):
    train = (torch.zeros(3, 4), torch.zeros(3).long())
    scoring.check_queries(train, (torch.zeros(1, 4), torch.zeros(1).long()))
    with pytest.raises(UserError, match=message):
        scoring.check_queries(train, query)


# ---- chunks --------------------------------------------------------------------------------------


def test_chunks_are_put_together_in_order(tmp_path):
    asked = []

    def score(rows):
        asked.append((rows.start, rows.stop))
        return torch.from_numpy(TRUE[rows])

    assert np.array_equal(run(tmp_path / "s.csv", score), TRUE)
    assert asked == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
    two = run(tmp_path / "t.csv", lambda rows: np.stack([TRUE[rows], -TRUE[rows]], 1))
    assert np.array_equal(two, np.stack([TRUE, -TRUE], 1))


def test_after_a_crash_only_the_rest_is_scored(tmp_path):
    out = tmp_path / "s.csv"
    asked = []

    def failing(rows):
        if rows.start == 10:
            raise RuntimeError("power cut")
        return TRUE[rows]

    with pytest.raises(RuntimeError, match="power cut"):
        run(out, failing, seed=1)
    assert not out.exists()

    def score(rows):
        asked.append(rows.start)
        return TRUE[rows]

    assert np.array_equal(run(out, score, seed=1), TRUE)
    assert asked == [10, 15, 20]


def test_other_inputs_are_scored_anew(tmp_path):
    out = tmp_path / "s.csv"
    run(out, lambda rows: TRUE[rows], w=torch.zeros(2), damping=0.1)
    for other in (
        {"w": torch.zeros(2), "damping": 0.2},
        {"w": torch.ones(2), "damping": 0.1},
        {"w": torch.zeros(2).double(), "damping": 0.1},
    ):
        assert np.array_equal(run(out, lambda rows: -TRUE[rows], **other), -TRUE)
    assert np.array_equal(run(out, lambda rows: -TRUE[rows], w=torch.zeros(2), damping=0.1), TRUE)
    assert np.array_equal(
        run(out, lambda rows: -TRUE[rows], chunk=7, w=torch.zeros(2), damping=0.1), -TRUE
    )


def test_a_signal_ends_the_chunk_under_way_first(tmp_path):
    out = tmp_path / "s.csv"

    def score(rows):
        if rows.start == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return TRUE[rows]

    with pytest.raises(
        Stopped, match="stopped after 10 of 23 samples; the same command goes on from there"
    ) as stopped:
        run(out, score)
    assert stopped.value.signal == signal.SIGTERM
    assert np.array_equal(run(out, lambda rows: TRUE[rows]), TRUE)


def test_a_score_that_is_not_finite_stops_the_run_and_is_not_kept(tmp_path):
    bad = TRUE.copy()
    bad[12] = np.nan
    with pytest.raises(UserError, match="the score of sample 12 is not finite"):
        run(tmp_path / "s.csv", lambda rows: bad[rows])
    assert np.array_equal(run(tmp_path / "s.csv", lambda rows: TRUE[rows]), TRUE)


def test_a_broken_chunk_is_named(tmp_path):
    run(tmp_path / "s.csv", lambda rows: TRUE[rows])
    (chunk,) = tmp_path.glob("s.csv.*.chunks/scores-10-15.npy")
    chunk.write_bytes(b"")
    with pytest.raises(UserError, match=r"10-15\.npy is damaged; delete it and run again"):
        run(tmp_path / "s.csv", lambda rows: TRUE[rows])


# ---- after ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_file_has_index_score_rank_and_the_users_columns(tmp_path, suffix):
    out = tmp_path / f"scores.{suffix}"
    run(out, lambda rows: TRUE[rows])
    scoring.write_scores(
        out, [0.5, -1.0, 0.5, 2.0], {"id": ["a", "b", "c", "d"], "label": [1, 2, 3, 4]}
    )
    table = pandas.read_csv(out) if suffix == "csv" else pandas.read_parquet(out)
    assert list(table.columns) == ["index", "score", "rank", "id", "label"]
    assert table["rank"].tolist() == [2, 1, 3, 4]  # 1 is the most harmful, equals in order
    assert table["score"].tolist() == [0.5, -1.0, 0.5, 2.0]
    assert table["id"].tolist() == ["a", "b", "c", "d"]
    assert [file.name for file in tmp_path.iterdir()] == [out.name]  # the chunks are gone


def test_what_is_no_table_of_scores_is_refused(tmp_path):
    with pytest.raises(UserError, match="one finite number per sample"):
        scoring.score_table(np.zeros((3, 2)))
    with pytest.raises(UserError, match="one finite number per sample"):
        scoring.score_table([1.0, float("inf")])
    with pytest.raises(UserError, match="a column of yours is called 'rank'"):
        scoring.score_table([1.0], {"rank": [3]})
    with pytest.raises(UserError, match="column 'id' has 2 values for 1 samples"):
        scoring.score_table([1.0], {"id": ["a", "b"]})
    (tmp_path / "folder.csv").mkdir()
    for out, message in (
        ("s.txt", r"written as \.csv or \.parquet"),
        ("no/s.csv", "there is no folder"),
        ("folder.csv", "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            scoring.write_scores(tmp_path / out, [1.0])
