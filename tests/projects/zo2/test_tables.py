"""The arithmetic of the tables, by hand."""

import numpy as np
import pandas as pd
import pytest

from projects.zo2.tables import cost_of_offloading, lowbit, memory, timings


def test_savings_are_against_mezo_at_the_same_depth():
    rows = [
        {
            "model": "m",
            "layers": layers,
            "hidden": 8,
            "method": method,
            "peak_bytes": peak,
            "host_bytes": 7,
            "counter": "allocator",
        }
        for layers, method, peak in (
            (4, "mezo", 100),
            (4, "zo2-3", 75),
            (8, "mezo", 200),
            (8, "zo2-3", 80),
        )
    ]
    frame = memory(pd.DataFrame(rows).assign(tokens=64, dtype="float32")).frame
    assert list(frame["saving_share"]) == pytest.approx([0.25, 0.6])


def test_timings_are_paired_round_by_round():
    rows = [
        {
            "tier": "disk",
            "variant": variant,
            "repeat": r,
            "step_seconds": seconds,
            "bytes_up": 1,
            "bytes_down": 2,
            "waited_seconds": 0.0,
        }
        for r, (full, other) in enumerate([(1.0, 2.0), (10.0, 20.0), (4.0, 8.0)])
        for variant, seconds in (("full", full), ("other", other))
    ]
    found = timings(pd.DataFrame(rows), "full", ["tier"]).set_index("variant")
    assert found.loc["other", "time_ratio"] == 2.0
    assert found.loc["other", ["time_low_ratio", "time_high_ratio"]].tolist() == [2.0, 2.0]
    assert found.loc["full", "step_seconds"] == 4.0


@pytest.mark.parametrize(("upload", "expected"), [(0.2, 1.0), (0.8, 1.0), (1.6, 1.8)])
def test_the_predicted_cost_is_what_the_longest_lane_adds(upload, expected):
    """A resident step of 1 s, 0.8 s of it in the blocks: uploads of 1.6 s make it 1.8 s, shorter
    ones hide.
    """
    common = {
        "batch_size": 1,
        "sequence": 8,
        "tokens": 8,
        "upload_lane_seconds": upload,
        "compute_lane_seconds": 0.8,
    }
    rows = [
        {
            **common,
            "offload_lane_seconds": 0.1,
            "variant": variant,
            "repeat": r,
            "step_seconds": seconds,
        }
        for r in range(3)
        for variant, seconds in (("resident", 1.0), ("overlap", 1.5), ("no overlap", 3.0))
    ]
    found = cost_of_offloading(pd.DataFrame(rows)).iloc[0]
    assert found["predicted_ratio"] == pytest.approx(expected)
    assert found["overlap_ratio"] == 1.5
    assert found["sync_ratio"] == 3.0


def test_an_update_that_does_not_survive_has_no_cosine():
    row = {
        "storage_dtype": "float8_e4m3",
        "rounding": "nearest",
        "offloaded_bytes": 10,
        "surviving_share": 0.0,
        "update_cosine": np.nan,
    }
    frame = pd.DataFrame(
        [
            {
                **row,
                "largest_loss_difference": 0.1,
                "test_loss": 1.0,
                "test_accuracy": 0.5,
                "steps": 2,
            }
        ]
    )
    assert "| – |" in lowbit(frame).to_markdown()
