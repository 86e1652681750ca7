"""Rows of the experiment `cost` as they would be where every step keeps to the cost model."""

from dataclasses import replace
from typing import Any

from projects.distzo2.cost_model import Plan, Rates, Shape
from projects.distzo2.labels import MODES


def make_cost(held_out: float = 1.0) -> list[dict[str, Any]]:
    """`held_out`: by how much the steps held out are longer than the model says."""
    cases = [
        (3, 32, 2, 16, True),
        (3, 32, 2, 96, True),
        (2, 64, 2, 16, True),
        (5, 32, 2, 8, True),
        (3, 64, 4, 32, False),
    ]
    alone = Rates(2e-11, 5e-9, 3e-4)
    both = Rates(4e-11, 6e-9, 3e-4)
    rows: list[dict[str, Any]] = [
        {"kind": "gather", "processes": 2, "repeat": r, "rank": k, "step_seconds": 2e-3}
        for r in (0, 1)
        for k in (0, 1)
    ]
    for layers, hidden, heads, tokens, fit in cases:
        shape = Shape.llama(layers, hidden, heads, 101)
        size = {
            "layers": layers,
            "hidden": hidden,
            "heads": heads,
            "vocabulary": 101,
            "tokens": tokens,
            "batch_size": 1,
            "shares": 2,
        }
        kinds = [
            ("ZO2", 1, 0.0),
            ("ZO2, twice", 2, 0.0),
            *((mode, 2, 0.0) for mode in ("PertP", "PertP, sliced", "DDP", "DDP, sliced")),
        ]
        kinds += [] if fit else [("DDP", 2, 0.001), ("DDP, sliced", 2, 0.001)]
        for mode, processes, link in kinds:
            plan = Plan() if mode.startswith("ZO2") else Plan(*MODES[mode])
            host = 2e-10 if plan.transfer == "sliced" else 1e-10
            rates = replace(
                both if processes == 2 else alone,
                seconds_per_exchanged_byte=4e-10,
                seconds_per_gather=2e-3,
            )
            rates = replace(rates, seconds_per_host_byte=2 / (1e9 * link) if link else host)
            kind = "fit" if fit and "PertP" not in mode else "held out"
            seconds = plan.step_seconds(shape, rates, [(1, tokens)] * 2) * (
                held_out if kind == "held out" else 1.0
            )
            if mode.startswith("ZO2"):  # what is fitted on is computing alone
                seconds = plan.step_seconds(
                    shape, replace(rates, seconds_per_host_byte=0.0), [(1, tokens)] * 2
                )
                seconds *= held_out if kind == "held out" else 1.0
            up, exchanged = plan.host_bytes(shape, 4), plan.exchanged_bytes(shape, 4)
            for repeat in (0, 1):
                for rank in range(processes):
                    row = {
                        "rank": rank,
                        "kind": kind,
                        "shape": f"{layers} x {hidden}",
                        **size,
                        "mode": mode,
                        "processes": processes,
                    }
                    row |= {
                        "link_gigabytes_per_second": link,
                        "repeat": repeat,
                        "step_seconds": seconds,
                    }
                    row |= {
                        "uploaded_bytes": up,
                        "offloaded_bytes": up,
                        "exchanged_bytes": exchanged,
                    }
                    row |= {
                        "upload_busy_seconds": host * up,
                        "offload_busy_seconds": host * up,
                        "exchange_busy_seconds": 4e-10 * exchanged,
                    }
                    rows.append({**row, "compute_busy_seconds": 0.0})
    return rows
