"""The arithmetic of the tables, by hand."""

import pandas as pd
import pytest

from projects.ecif.tables import costs, mean, paired, spread


def test_a_mean_has_students_interval():
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - found.value == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert mean([0.5]) == (0.5, 0.5, 0.5)
    assert spread(mean([0.5])) == "50.0"
    assert spread(mean([0.21, 0.23])) == f"22.0 ± {100 * 12.706205 * 0.01:.1f}"


def test_differences_are_paired_by_seed_after_the_mean_over_draws():
    rows = [
        {
            "seed": seed,
            "draw": draw,
            "method": method,
            "x": base + seed + (1 + draw if method == "a" else 0),
        }
        for seed, base in ((0, 10.0), (1, 20.0))
        for draw in (0, 1)
        for method in ("a", "b")
    ]
    assert paired(pd.DataFrame(rows), "x", "a", "b") == (1.5, 1.5, 1.5)


def test_times_are_over_ecifs_of_the_same_round():
    rows = [
        {
            "task": "score",
            "method": m,
            "kind": "passes",
            "gradients": 1,
            "curvature_products": 2,
            "forward_mode": 1,
            "per_sample_gradients": 0,
            "score_error": 1e-3 if m == "ECIF" else None,
            "rank_correlation": 0.99 if m == "ECIF" else None,
        }
        for m in ("ECIF", "TRAK")
    ]
    for repeat, own in enumerate((1.0, 10.0, 4.0)):
        rows.append(
            {
                "task": "score",
                "method": "ECIF",
                "kind": "time",
                "repeat": repeat,
                "work_seconds": own,
            }
        )
        rows.append(
            {
                "task": "score",
                "method": "TRAK",
                "kind": "time",
                "repeat": repeat,
                "work_seconds": 3 * own,
            }
        )
    found = costs(pd.DataFrame(rows)).set_index("method")
    assert found.loc["TRAK", ["time_ratio", "low_ratio", "high_ratio"]].tolist() == [3, 3, 3]
    assert found.loc[
        "ECIF", ["work_seconds", "time_ratio", "curvature_products", "score_error"]
    ].tolist() == [4, 1, 2, 1e-3]
