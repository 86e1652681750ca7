"""Tables say what their rows say: means, intervals, ratios, dashes."""

import numpy as np
import pandas as pd
import pytest

from projects.sam_if import tables


def test_a_mean_is_shown_with_half_of_its_interval():
    # 4.3027 (Student's, 2) x 0.8819
    assert tables.shown_interval(pd.Series([1.0, 2.0, 4.0, np.nan]), 2) == "2.33 ± 3.79"
    assert tables.shown_interval(pd.Series([0.5]), 2) == "0.50"
    assert tables.shown_interval(pd.Series([np.nan])) == "–"


def timed(seconds: dict[str, float], n: int = 2000, queries: int = 1) -> pd.DataFrame:
    rows = []
    for name, value in seconds.items():
        task = "train" if name.startswith(("Retrain", "edit")) else "score"
        rows += [
            {
                "kind": "time",
                "task": task,
                "n": n,
                "parameters": 650,
                "queries": queries,
                "method": name,
                "repeat": one,
                "work_seconds": value * (1 + one),
            }
            for one in range(6)
        ]
        if task == "score":
            counts = dict.fromkeys(
                ("gradients", "curvature_products", "forward_mode", "per_sample_gradients"), 2
            )
            rows.append(
                {
                    "kind": "cost",
                    "task": task,
                    "n": n,
                    "queries": queries,
                    "method": name,
                    "score_error": 1e-3 if name != "TRAK" else None,
                    **counts,
                }
            )
    return pd.DataFrame(rows)


SECONDS = {
    "SAM-HIF": 1.0,
    "TRAK": 3.0,
    "Retrain, batches": 6.0,
    "Retrain, from the solution": 0.5,
    "edit by SAM-HIF": 2.0,
    "edit by SAM-GIF": 4.0,
}


def test_times_are_divided_round_by_round():
    found = tables.times_over(timed(SECONDS), "TRAK", ["SAM-HIF"])["SAM-HIF"]
    assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0)
    shuffled = timed(SECONDS).sample(frac=1, random_state=0)
    assert tables.times_over(shuffled, "TRAK", ["SAM-HIF"])["SAM-HIF"].low == 3.0


def test_the_speed_table_multiplies_one_training_by_the_number_of_samples():
    text = tables.speed(timed(SECONDS)).to_markdown()
    assert "| retraining, 2000 times | 42,000 s" in text.replace("42000 s", "42,000 s")
    assert "12,000x" in text
    assert "2 / 2 / 2 / 2" in text
    (line,) = [one for one in text.splitlines() if one.startswith("| TRAK ")]
    assert [one.strip() for one in line.split("|")][2:5] == ["10.50 s", "3.00x (3.00 to 3.00)", "–"]


def test_the_table_of_several_queries_divides_by_sam_hif_in_float32():
    seconds = {"SAM-HIF, float32": 2.0, "IF (dattri, explicit)": 3.0}
    both = pd.concat([timed({**SECONDS, **seconds}), timed(seconds, queries=50)])
    frame = tables.queries(both).frame
    assert frame[["queries", "method"]].values.tolist() == [
        [queries, method] for queries in (1, 50) for method in seconds
    ]
    assert frame["over"].tolist()[1::2] == ["1.50x (1.50 to 1.50)"] * 2
    assert "| TRAK | 10.50 s | 3.00x" in tables.speed(both).to_markdown()


def edited(seed: int, retrained: float, accuracy: float) -> list[dict]:
    row = {"dataset": "a", "model": "m", "seed": seed}
    removed = {**row, "removed_share": 0.01, "true_loss_difference": 0.001}
    return [
        {**row, "removed_share": 0.0, "method": "before", "test_accuracy": 0.9},
        {**removed, "method": "Retrain", "test_accuracy": retrained},
        {
            **removed,
            "method": "SAM-HIF",
            "test_accuracy": accuracy,
            "same_class_share": 0.99,
            "parameter_error": 0.1,
            "predicted_loss_difference": 0.002,
        },
        {**removed, "method": "TRAK", "predicted_loss_difference": -0.003},
    ]


def test_the_editing_table_takes_gaps_to_retraining_seed_by_seed():
    one = pd.DataFrame(edited(0, 0.91, 0.905))
    text = tables.editing(one, timed(SECONDS)).to_markdown()
    assert "| SAM-HIF | 90.50 | 0.50 | 99.00 | 0.100 | +2.00e-03 | +1.00e-03 |" in text
    assert "| TRAK | – | – | – | – | -3.00e-03 | +1.00e-03 |" in text
    assert "edit by SAM-HIF 3x (3 to 3), edit by SAM-GIF 1.5x" in text
    assert "factored before: 0.25x" in text
    assert "paper: not available" in text
    # a gap above and one below do not cancel
    both = pd.DataFrame(edited(0, 0.91, 0.905) + edited(1, 0.90, 0.905))
    frame = tables.editing(both, timed(SECONDS)).frame.set_index("method")
    assert frame.loc["SAM-HIF", "accuracy_gap"] == "0.50 ± 0.00"
    assert frame.loc["before", "accuracy_gap"] == "–"


def test_curves_are_means_over_the_seeds():
    rows = [
        {
            "kind": "curve",
            "dataset": "a",
            "seed": seed,
            "flipped_share": 0.2,
            "method": "SAM-HIF",
            "removed_share": share,
            "test_accuracy": one,
        }
        for share in (0.1, 0.3)
        for seed, one in enumerate((0.8, 0.9))
    ]
    rows.append({**rows[0], "method": "none removed", "removed_share": 0.0})
    rows += [
        {
            "kind": "detection",
            "dataset": "a",
            "seed": 0,
            "flipped_share": 0.2,
            "method": "loss",
            "detection_auc": 0.9,
            "detection_precision": 0.5,
        }
    ]
    table = tables.removal(pd.DataFrame(rows))
    assert table.frame.columns.tolist() == [
        "dataset",
        "method",
        "removed 0 %",
        "removed 10 %",
        "removed 30 %",
    ]
    assert table.frame.loc[0, "removed 0 %"] == "–"
    assert table.frame.loc[0, "removed 30 %"].startswith("85.00 ±")
    found = tables.detection(pd.DataFrame(rows)).frame
    assert found.to_dict("records") == [
        {
            "dataset": "a",
            "method": "loss",
            "detection_auc": "0.9000",
            "detection_precision": "0.500",
        }
    ]


def test_the_radius_table_shows_the_largest_error_of_the_derivative():
    rows = [
        {
            "rho_scale": rho,
            "method": method,
            "seed": seed,
            "parameter_error": 0.1,
            "perturbation_ratio": 2.0,
            "derivative_error": 1e-9 * (seed + 1),
        }
        for seed in range(3)
        for rho in (0.0, 0.5)
        for method in ("SAM-HIF", "IF")
    ]
    frame = tables.radius(pd.DataFrame(rows)).frame
    assert len(frame) == 4
    assert frame["derivative_error"].tolist() == pytest.approx([3e-9] * 4)


def test_the_resnet_table_joins_scores_and_curves():
    shown = {
        "dataset": "cifar10",
        "n": 100,
        "seed": 0,
        "flipped_share": 0.2,
        "parameters": 11_173_962,
    }
    rows = [
        {
            **shown,
            "kind": "curve",
            "method": "none removed",
            "removed_share": 0.0,
            "test_accuracy": 0.5,
        }
    ]
    for method, solved in (
        ("SAM-HIF", {"products": 12, "solve_error": 0.03, "damping_scale": 0.1}),
        ("loss", {}),
    ):
        lds = None if method == "loss" else 0.25
        rows.append(
            {
                **shown,
                "kind": "scores",
                "method": method,
                "lds_correlation": lds,
                "detection_auc": 0.75,
                **solved,
            }
        )
        rows.append(
            {
                **shown,
                "kind": "curve",
                "method": method,
                "removed_share": 0.2,
                "test_accuracy": 0.625,
            }
        )
    table = tables.resnet(pd.DataFrame(rows))
    assert table.frame.set_index("method").loc["SAM-HIF"].tolist() == [
        "0.250",
        "0.750",
        "12 / 3.0e-02",
        "–",
        "62.50",
    ]
    assert table.frame.set_index("method").loc["loss"].tolist() == ["–", "0.750", "–", "–", "62.50"]
    assert table.frame.set_index("method").loc["none removed"].tolist() == [
        "–",
        "–",
        "–",
        "50.00",
        "–",
    ]
    assert "11,173,962 parameters" in table.to_markdown()
