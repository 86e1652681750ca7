"""Folders that the environment names."""

from pathlib import Path

import pytest

from shared import paths


@pytest.mark.parametrize("function", [paths.cache_dir, paths.results_dir])
def test_a_variable_that_is_set_to_nothing_names_no_folder(function, monkeypatch):
    variable = {"cache_dir": "REPRO_CACHE", "results_dir": "REPRO_RESULTS"}[function.__name__]
    monkeypatch.delenv(variable, raising=False)
    usual = function()
    monkeypatch.setenv(variable, "")
    assert function() == usual
    monkeypatch.setenv(variable, "/elsewhere")
    assert function() == Path("/elsewhere")
