"""The arithmetic of the tables, by hand."""

import pandas as pd
import pytest

from projects.meta_if import tables


def test_the_interval_over_seeds_is_students():
    found = tables.mean_interval([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - found.value == pytest.approx(4.302653 / 3**0.5)
    assert tables.interval([0.5]) == "0.50"
    assert tables.interval([0.5, 0.5]) == "0.50 (0.50 to 0.50)"


def test_the_curve_is_the_mean_over_seeds_and_read_at_two_fifths():
    common = {"setting": "permuted labels", "spoiled_share": 0.4, "method": "task-IF"}
    rows = [
        {
            **common,
            "kind": "summary",
            "seed": s,
            "detection_auc": 0.5 + s / 10,
            "before_accuracy": 0.5,
            "accuracy": 0.6,
        }
        for s in (0, 1)
    ]
    for seed, middle in ((0, 0.5), (1, 1.0)):
        for inspected, found in ((0.0, 0.0), (0.4, middle), (1.0, 1.0)):
            rows.append(
                {
                    **common,
                    "kind": "curve",
                    "seed": seed,
                    "inspected_share": inspected,
                    "found_share": found,
                }
            )
    line = tables.harmful(pd.DataFrame(rows)).frame.iloc[0]
    assert line["found_at_40"] == 0.75
    assert line["detection_auc"].startswith("0.550 (")


def test_times_of_all_tasks_multiply_the_ratio_of_one():
    rows = [
        {"kind": "counts", "tasks": 10, "products": 4, "inner_solves": 80, "meta_parameters": 7}
    ]
    for variant, value in (
        ("score all tasks", 2.0),
        ("edit one task out", 1.0),
        ("retrain without one, L-BFGS", 3.0),
    ):
        rows += [
            {"kind": "time", "variant": variant, "repeat": r, "work_seconds": value * (1 + r)}
            for r in range(6)
        ]
    table = tables.cost(pd.DataFrame(rows))
    found = table.frame.set_index("variant")["over"]
    assert found["edit one task out"] == 0.5
    assert found["retrain without one, L-BFGS"] == 1.5
    assert found["retrain without each of 10 tasks, L-BFGS"] == 15
    assert "4 products of 2 inner solves" in table.caption


def test_apart_is_the_mean_distance_and_not_the_distance_of_means():
    rows = [
        {
            "source": "mnist",
            "stands_for": "MNIST",
            "seed": seed,
            "method": "task-IF",
            "removed_tasks": 4,
            "edit_accuracy": 0.8 + change,
            "retrain_accuracy": 0.8,
            "same_answers_share": 0.9,
            "edit_relative_error": 0.5,
        }
        for seed, change in enumerate((0.1, -0.1))
    ]
    line = tables.tasks(pd.DataFrame(rows)).frame.iloc[0]
    assert line["apart"] == pytest.approx(0.1)
    assert line["edit_accuracy"] == pytest.approx(0.8)
