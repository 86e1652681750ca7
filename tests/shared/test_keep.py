"""`repro keep`: only a whole run of a paper becomes the reference."""

import json

import numpy as np
import pytest

from shared import cli, experiment, reference, rows
from shared.errors import UserError


@pytest.fixture
def ran(toy, tmp_path):
    """A folder with a whole run of the toy paper at scale smoke."""
    from shared import manifest

    for name in manifest.scale_config("toy", "smoke"):
        experiment.run_experiment("toy", name, "smoke", None, tmp_path / "results")
    return tmp_path


def keep(folder):
    return reference.keep("toy", "smoke", folder / "results", folder / "reference")


def test_rows_verdicts_tables_and_figures_are_kept_in_one_form_each(ran):
    place = keep(ran)
    assert place == ran / "reference" / "smoke" / "toy"
    assert {file.suffix for file in (place / "tables").iterdir()} == {".md"}
    assert {file.suffix for file in (place / "figures").iterdir()} == {".svg"}
    assert json.loads((place / "claims.json").read_text())
    made = {file.name: file for file in (ran / "results" / "smoke" / "toy" / "rows").glob("[!.]*")}
    kept = {file.name for file in (place / "rows").iterdir()}
    assert kept == set(made)
    for name in kept:
        assert (place / "rows" / name).read_bytes() == made[name].read_bytes()


def test_tensors_stay_with_the_results(tmp_path):
    import torch

    path = rows.rows_path(tmp_path, "cpu", "toy", "squares")
    content = {"config": {}, "seed": 0, "provenance": {}, "rows": [{"n": 1}]}
    whole = {"paper": "toy", "experiment": "squares", "scale": "cpu", **content}
    rows.write_rows(path, whole, {"grid": np.arange(3.0)}, {"weights": {"w": torch.ones(2)}})
    place = rows.rows_path(tmp_path / "kept", "cpu", "toy", "squares")
    reference._copy(path, place.parent)
    assert {file.suffix for file in place.parent.iterdir()} == {".json", ".npy"}
    assert rows.are_whole(place, tensors=False)
    assert not rows.are_whole(place)
    next(place.parent.glob("*.npy")).unlink()
    assert not rows.are_whole(place, tensors=False)


def test_what_was_kept_before_goes(ran):
    old = ran / "reference" / "smoke" / "toy" / "tables" / "gone.md"
    old.parent.mkdir(parents=True)
    old.touch()
    keep(ran)
    assert not old.exists()


def test_a_run_that_lacks_rows_is_refused_and_the_reference_stays(ran):
    kept = keep(ran) / "claims.json"
    before = kept.stat().st_mtime_ns
    rows.rows_path(ran / "results", "smoke", "toy", "squares").unlink()
    with pytest.raises(UserError, match=r"squares\.json is missing, or not whole"):
        keep(ran)
    assert kept.stat().st_mtime_ns == before


def test_a_run_with_other_values_than_the_scale_has_is_refused(ran):
    experiment.run_experiment("toy", "squares", "smoke", {"seed": 5}, ran / "results")
    with pytest.raises(UserError, match="made with other values"):
        keep(ran)


def test_a_scale_at_which_nothing_runs_is_refused(toy, refused):
    assert "nothing of toy runs at scale paper" in refused("keep", "toy", "--scale", "paper")


def test_the_settings_of_an_experiment_are_listed_with_their_values(toy, capsys):
    assert cli.main(["list", "toy/squares"]) == 0
    out = capsys.readouterr().out
    assert "int >= 0" in out
    assert "all random numbers" in out
