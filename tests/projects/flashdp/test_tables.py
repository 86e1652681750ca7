"""The arithmetic of the tables, by hand."""

import pandas as pd
import pytest

from projects.flashdp.tables import batch_size, costs, speeds


def test_shares_are_paired_round_by_round_and_memory_is_over_the_non_private():
    common = {"model": "m", "batch_size": 2, "tokens": 8, "clipping": "none"}
    rows = [
        {
            **common,
            "method": method,
            "repeat": r,
            "step_seconds": seconds,
            "tokens_per_second": 16 / seconds,
        }
        for r, (plain, flash) in enumerate([(1.0, 2.0), (10.0, 20.0), (4.0, 8.0)])
        for method, seconds in (("non-private", plain), ("FlashDP", flash))
    ]
    rows += [
        {**common, "method": "non-private", "peak_bytes": 100},
        {**common, "method": "FlashDP", "peak_bytes": 103},
    ]
    found = speeds(pd.DataFrame(rows)).set_index("method")
    assert found.loc["FlashDP", ["throughput_share", "low_share", "high_share"]].tolist() == [
        0.5,
        0.5,
        0.5,
    ]
    assert found.loc["FlashDP", "memory_ratio"] == 1.03
    assert found.loc["non-private", "tokens_per_second"] == 4.0


def test_a_method_without_memory_is_shown_as_a_gap():
    common = {"model": "m", "batch_size": 2, "tokens": 8, "clipping": "none", "peak_bytes": None}
    timed = [
        {
            **common,
            "method": "non-private",
            "repeat": r,
            "step_seconds": 1.0,
            "tokens_per_second": 16.0,
        }
        for r in range(6)
    ]
    failed = {**common, "method": "explicit", "peak_bytes": None, "out_of_memory": True}
    shown = batch_size(pd.DataFrame([*timed, failed])).to_markdown()
    assert "| explicit | none | – | – | – | – | – |" in shown


def test_savings_are_of_what_the_other_method_takes():
    rows = [
        {"method": m, "step_flops": f, "moved_bytes": b}
        for m, f, b in (("non-private", 10, 4), ("BK", 20, 8), ("FlashDP", 12, 6))
    ]
    found = costs(pd.DataFrame(rows)).set_index("method")
    assert found.loc["BK", ["redundant_share", "movement_share"]].tolist() == pytest.approx(
        [0.4, 0.25]
    )
    assert found.loc["FlashDP", ["flops_ratio", "moved_ratio"]].tolist() == [1.2, 1.5]
