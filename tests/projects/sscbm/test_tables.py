"""The arithmetic of the tables, by hand, and tables and figures of the smallest rows."""

import pandas as pd
import pytest
import test_claims as rows

from projects.sscbm import labels, tables
from projects.sscbm.experiments.common import SETTINGS
from shared.statistics import Mean


def test_a_share_is_shown_as_a_percentage_with_half_its_interval():
    assert tables.spread(Mean(0.221, 0.213, 0.229)) == "22.1 ± 0.8"
    assert tables.spread(Mean(0.5, float("nan"), float("nan"))) == "50.0"
    assert tables.points(Mean(0.021, 0.004, 0.038)) == "+2.1 points [+0.4, +3.8]"


def test_differences_are_paired_by_seed():
    frame = pd.DataFrame(
        {"seed": [0, 0, 1, 1], "method": ["a", "b", "a", "b"], "x": [1.0, 0.5, 3.0, 2.0]}
    )
    found = tables.paired(frame, "x", "a", "b")
    assert found.value == 0.75
    assert found.high - found.value == pytest.approx(12.706205 * 0.25, rel=1e-6)


def test_the_sweep_takes_the_tenth_and_the_whole_from_the_main_table():
    both = tables.with_main(pd.DataFrame(rows.ratios()), pd.DataFrame(rows.main()))
    own = both[(both["dataset"] == "fashion") & (both["seed"] == 0)]
    of = {method: one["ratio_share"].tolist() for method, one in own.groupby("method")}
    assert of == {
        labels.SSCBM: [0.01, 0.05, 0.1, 0.2],
        labels.LABELLED_ONLY: [0.01, 0.05, 0.1, 0.2, 1.0],
    }
    whole = own[own["ratio_share"] == 1.0].iloc[0]
    assert whole["concept_accuracy"] == rows.LEVELS[labels.CEM_FULL][0]
    assert whole["labelled_share"] == 1.0


def test_a_step_is_over_one_of_cem_in_the_same_round():
    frame = pd.DataFrame(rows.cost(step=1.2))
    steps = frame["kind"] == "step"
    frame.loc[steps, "work_seconds"] *= 1 + frame.loc[steps, "repeat"]  # a machine that slows down
    assert tables.step_ratio(frame).value == pytest.approx(1.2)


def test_every_method_that_is_trained_has_a_place_in_the_table():
    assert set(SETTINGS) < set(labels.METHODS)
    assert len(set(labels.METHODS)) == len(labels.METHODS)
