"""How long a step of DistZO2 takes: what each lane of a rank moves or computes, how fast it can,
and which waits for which.

A rank has four lanes. Of each block it uploads a part from the host (the whole, or an N-th), takes
the rest from the other ranks, computes (noise, update, and the forwards that are its own) and
offloads its part. Lanes work at the same time on neighbouring blocks, so that in the long run a
block takes as long as the slowest lane; the first upload and the last offload stand alone.
`schedule` walks the lanes with the rules of `projects.zo2.lanes`, so that fill, drain and the few
slots of the device are in it.

    shape = shape_of("opt-13b")  # of projects.distzo2.shapes
    rates = gpu_rates("a100-sxm", ranks=4)
    one, four = Plan(), Plan(dp=4, transfer="sliced")
    print(four.tokens_per_second(shape, rates, 4 * [(1, 2048)]) / one.tokens_per_second(shape,
    rates, 4 * [(1, 2048)]))

What it leaves out: contention for the host's memory, the time to make a batch, kernels too small to
fill a device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from projects.distzo2.labels import (
    DDP,
    FIT,
    GATHER,
    SLICED,
    ZO2,
    ZO2_TWICE,
    Transfer,
)
from shared.errors import UserError

Batches = Sequence[tuple[int, int]]  # (rows, tokens of a row) of each micro-batch of a global batch

# What runs on GPUs reach of their datasheet's rates. Assumptions of ours, not measurements.
COMPUTE_SHARE = 0.5
LINK_SHARE = 0.8
# Memory traffic on a GPU of one draw of float16 noise and the sum it goes into, bytes a parameter:
# z is written (2), scaled twice (4 + 4) and added (6). An update's is smaller; a probe's three are
# counted as they are. See `projects.zo2.noise`.
DRAW_BYTES = 16.0


@dataclass(frozen=True)
class Shape:
    """A model as its cost sees it. Counts of one block, and of all that stays on the device.

    Attributes:
        matrix: weights of a block that every token is multiplied with.
        width: of attention: heads x head size.
        resident: parameters outside the blocks, tied ones once.
        head: weights that turn hidden states into logits.
    """

    blocks: int
    parameters: int
    matrix: int
    width: int
    resident: int
    head: int

    @classmethod
    def llama(cls, layers: int, hidden: int, heads: int, vocabulary: int) -> "Shape":
        """Of the Llama shapes that the experiments time (`causal_lm_config("llama", ...)`), whose
        embedding and head are not tied; counted here without making a model.
        """
        inner = 8 * hidden // 3 // 64 * 64 or 8 * hidden // 3
        matrix = 4 * hidden**2 + 3 * hidden * inner  # q, k, v, o; gate, up, down
        return cls(
            blocks=layers,
            parameters=matrix + 2 * hidden,  # two norms
            matrix=matrix,
            width=hidden,
            resident=2 * vocabulary * hidden + hidden,
            head=vocabulary * hidden,
        )

    def block_flops(self, rows: int, tokens: int) -> float:
        """Of one forward of one block: its matrices, and the scores and sums of attention (all
        pairs, as the engine's kernels count).
        """
        return 2.0 * self.matrix * rows * tokens + 4.0 * self.width * rows * tokens**2

    def head_flops(self, rows: int, tokens: int) -> float:
        return 2.0 * self.head * rows * tokens


@dataclass(frozen=True)
class Rates:
    """How fast one rank works.

    Attributes:
        seconds_per_flop: of forwards.
        seconds_per_draw: of a number of noise, with the sum it goes into.
        seconds_per_call: of one forward of one module beyond its arithmetic.
        seconds_per_host_byte: of the rank's part of the link to the host, each direction.
        seconds_per_exchanged_byte: of what comes in from other ranks.
        seconds_per_gather: of all ranks' losses.
        draws: draws a parameter of a block in a step. The engine keeps a block's noise (2: probe
            and update) but in float16 (4).
    """

    seconds_per_flop: float
    seconds_per_draw: float
    seconds_per_call: float = 0.0
    seconds_per_host_byte: float = 0.0
    seconds_per_exchanged_byte: float = 0.0
    seconds_per_gather: float = 0.0
    draws: int = 2

    RESIDENT_DRAWS = 4  # what stays on the device has no buffer for its noise


class Lanes(NamedTuple):
    """Seconds that each lane of a rank spends on one block, and that computing spends outside the
    blocks in a step.
    """

    upload: float
    exchange: float
    compute: float
    offload: float
    outside: float


@dataclass(frozen=True)
class Plan:
    """A way to share a step out: the mesh of `DistZO2`, its transfers, and the engine's slots. By
    default ZO2 in one process.
    """

    dp: int = 1
    pert: int = 1
    transfer: Transfer = "replicated"
    slots: int = 3

    @property
    def ranks(self) -> int:
        return self.dp * self.pert

    @property
    def part(self) -> float:
        """Of each block, what a rank moves over its link to the host."""
        return 1 / self.ranks if self.transfer == "sliced" else 1.0

    def own(self, batches: Batches) -> Batches:
        """The micro-batches of the fullest share."""
        return batches[: -(-len(batches) // self.dp)]

    def host_bytes(self, shape: Shape, itemsize: int) -> float:
        """What a rank uploads in a step; it offloads as much."""
        return shape.blocks * shape.parameters * itemsize * self.part

    def exchanged_bytes(self, shape: Shape, itemsize: int) -> float:
        """What comes in from other ranks in a step."""
        return shape.blocks * shape.parameters * itemsize * (1 - self.part)

    def device_bytes(self, shape: Shape, itemsize: int, draws: int) -> float:
        """Weights and buffers on a rank's device: slots, kept noise, what stays there. Activations
        and logits come on top.
        """
        return itemsize * (
            self.slots * shape.parameters + (shape.parameters if draws == 2 else 0) + shape.resident
        )

    def work(self, shape: Shape, batches: Batches, draws: int) -> dict[str, float]:
        """What the fullest rank computes in a step: floating-point operations, numbers drawn, calls
        of a module.
        """
        sides = 2 // self.pert
        own = self.own(batches)
        in_blocks = shape.blocks * sum(shape.block_flops(*one) for one in own)
        return {
            "flops": sides * (in_blocks + sum(shape.head_flops(*one) for one in own)),
            "draws": float(
                draws * shape.blocks * shape.parameters + Rates.RESIDENT_DRAWS * shape.resident
            ),
            "calls": float(sides * len(own) * (shape.blocks + 1)),
        }

    def lanes(self, shape: Shape, rates: Rates, batches: Batches, itemsize: int) -> Lanes:
        """Seconds of each lane of the fullest rank."""
        sides, own = 2 // self.pert, self.own(batches)
        block_bytes = shape.parameters * itemsize
        moved = block_bytes * self.part * rates.seconds_per_host_byte
        calls = sides * len(own) * rates.seconds_per_call
        forwards = sides * sum(shape.block_flops(*one) for one in own) * rates.seconds_per_flop
        heads = sides * sum(shape.head_flops(*one) for one in own) * rates.seconds_per_flop
        return Lanes(
            upload=moved,
            exchange=block_bytes * (1 - self.part) * rates.seconds_per_exchanged_byte,
            compute=forwards + shape.parameters * rates.draws * rates.seconds_per_draw + calls,
            offload=moved,
            outside=heads
            + shape.resident * Rates.RESIDENT_DRAWS * rates.seconds_per_draw
            + calls
            + (rates.seconds_per_gather if self.ranks > 1 else 0.0),
        )

    def step_seconds(
        self, shape: Shape, rates: Rates, batches: Batches, itemsize: int = 4
    ) -> float:
        """Of a step in a long run."""
        return schedule(self.lanes(shape, rates, batches, itemsize), shape.blocks, self.slots).step

    def tokens_per_second(
        self, shape: Shape, rates: Rates, batches: Batches, itemsize: int = 4
    ) -> float:
        return sum(rows * tokens for rows, tokens in batches) / self.step_seconds(
            shape, rates, batches, itemsize
        )


class Schedule(NamedTuple):
    """Seconds: a step of a long run; `fill` before the first block computes; `drain` after the last
    step.
    """

    step: float
    fill: float
    drain: float


def schedule(lanes: Lanes, blocks: int, slots: int = 3, steps: int = 6) -> Schedule:
    """When each lane is done with each block over some steps, by the rules of `projects.zo2.lanes`.

    An upload waits for the lane, for the last tenant of its slot to have drained, for the block's
    own last offload, and for the block `ahead` of it to have come to compute, which is when it is
    asked for. An exchange waits for its upload, computing for the exchange, the offload for
    computing. Between steps comes what is `outside` the blocks.
    """
    ahead = max(1, slots - 2)
    upload, exchange, begun, compute, offload = ([] for _ in range(5))
    clock, ends = 0.0, []

    def after(times: list[float], index: int) -> float:
        return times[index] if index >= 0 else 0.0

    for one in range(steps * blocks):
        asked = max(
            after(begun, one - ahead),
            after(compute, one - slots),
            after(offload, one - slots),
            after(offload, one - blocks),
        )
        upload.append(max(after(upload, one - 1), asked) + lanes.upload)
        exchange.append(max(after(exchange, one - 1), upload[one]) + lanes.exchange)
        begun.append(max(clock, exchange[one]))
        compute.append(begun[one] + lanes.compute)
        offload.append(max(after(offload, one - 1), compute[one]) + lanes.offload)
        clock = compute[one]
        if (one + 1) % blocks == 0:
            clock += lanes.outside
            ends.append(clock)
    half = steps // 2
    return Schedule(
        (ends[-1] - ends[half - 1]) / (steps - half), begun[0], max(0.0, offload[-1] - ends[-1])
    )


# ---- rates ---------------------------------------------------------------------------------------


def fit(measured: pd.DataFrame, shapes: Mapping[str, Shape]) -> Rates:
    """Rates of computing from steps of ZO2 in one process: the non-negative least squares of
    relative errors.

    Args:
        measured: one row a kind of step: `shape` (a key of `shapes`), `shares` micro-batches of
            `batch_size` rows of `tokens`, and `step_seconds`.

    Raises UserError with fewer than three kinds of steps: there are three rates.
    """
    if len(measured) < 3:
        raise UserError(f"three rates need three kinds of steps, and there are {len(measured)}")
    rows, seconds = [], []
    for one in measured.to_dict("records"):
        work = Plan().work(shapes[one["shape"]], batches_of(one), draws=2)
        rows.append([work["flops"], work["draws"], work["calls"]])
        seconds.append(one["step_seconds"])
    scaled = np.array(rows) / np.array(seconds)[:, None]
    size = scaled.max(axis=0)
    found, _ = nnls(scaled / size, np.ones(len(seconds)))
    return Rates(*(float(rate) for rate in found / size))


def batches_of(row: Mapping[str, Any]) -> Batches:
    """The global batch of a row of the experiment `cost`."""
    return [(int(row["batch_size"]), int(row["tokens"]))] * int(row["shares"])


def seconds_per_byte(measured: pd.DataFrame, lane: str, nbytes: str) -> float:
    """Of a lane: its busy seconds over its bytes in all `measured` steps; 0 where nothing moved.

    An exchange begins when the last rank has come; what the others waited for it is no part of it,
    so that of each step the rank counts that was at it for the shortest time.
    """
    steps = measured.groupby(["shape", "tokens", "mode", "repeat"]).agg(
        busy=(f"{lane}_busy_seconds", "min"), moved=(nbytes, "max")
    )
    return float(steps["busy"].sum() / steps["moved"].sum()) if steps["moved"].sum() else 0.0


def predictions(
    cost: pd.DataFrame, meshes: Mapping[str, tuple[int, int, str]]
) -> tuple[pd.DataFrame, dict[int, Rates]]:
    """Each kind of step of the experiment `cost` (rows) as measured and as predicted, and the rates
    by the number of busy processes.

    Args:
        meshes: by mode: data-parallel ranks, ranks for the perturbations, transfer.

    Returns:
        One row a kind of step: `kind` ("fit" or "held out"), `shape`, `tokens`, `mode`,
        `link_gigabytes_per_second` (0: as it is), `measured_seconds` (median of the slower rank),
        `predicted_seconds`, `error_ratio` (predicted over measured, less 1).
    """
    gather = float(cost[cost["kind"] == GATHER].groupby("repeat")["step_seconds"].max().median())
    cost = cost[cost["kind"] != GATHER]
    shapes = {}
    for name, rows in cost.groupby("shape", sort=False):
        sizes = [int(rows.iloc[0][key]) for key in ("layers", "hidden", "heads", "vocabulary")]
        shapes[str(name)] = Shape.llama(*sizes)
    keys = [
        "kind",
        "shape",
        "mode",
        "processes",
        "tokens",
        "batch_size",
        "shares",
        "link_gigabytes_per_second",
    ]
    slower = cost.groupby([*keys, "repeat"], sort=False, as_index=False)["step_seconds"].max()
    steps = slower.groupby(keys, sort=False, as_index=False)["step_seconds"].median()

    known = cost[cost["kind"] == FIT]
    of = steps[steps["kind"] == FIT]
    rates = {
        count: fit(of[of["mode"] == mode], shapes) for mode, count in ((ZO2, 1), (ZO2_TWICE, 2))
    }
    found = []
    for one in steps.to_dict("records"):
        alone = one["mode"] in (ZO2, ZO2_TWICE)
        plan = Plan() if alone else Plan(*meshes[one["mode"]])  # type: ignore[arg-type]
        # a file, or memory
        tier = known[known["mode"] == (DDP + SLICED if plan.transfer == "sliced" else DDP)]
        if one["link_gigabytes_per_second"]:
            # the ranks share the emulated link
            host = plan.ranks / (1e9 * one["link_gigabytes_per_second"])
        else:
            host = seconds_per_byte(tier, "upload", "uploaded_bytes")
        own = replace(
            rates[int(one["processes"])],
            seconds_per_host_byte=host,
            seconds_per_exchanged_byte=seconds_per_byte(tier, "exchange", "exchanged_bytes"),
            seconds_per_gather=gather,
        )
        predicted = plan.step_seconds(shapes[one["shape"]], own, batches_of(one))
        row = {
            key: one[key]
            for key in ("kind", "shape", "tokens", "mode", "link_gigabytes_per_second")
        }
        row |= {
            "batch_tokens": sum(rows * tokens for rows, tokens in batches_of(one)),
            "measured_seconds": one["step_seconds"],
        }
        found.append(
            {
                **row,
                "predicted_seconds": predicted,
                "error_ratio": predicted / one["step_seconds"] - 1,
            }
        )
    return pd.DataFrame(found), rates


def hardware() -> pd.DataFrame:
    """Rates of GPUs by their datasheets, one row each, with their source."""
    return pd.read_csv(Path(__file__).with_name("hardware.csv"), keep_default_na=False).set_index(
        "name"
    )


def gpu_rates(
    name: str,
    ranks: int,
    *,
    links: int | None = None,
    host_link: float | None = None,
    exchange: float | None = None,
    compute_share: float = COMPUTE_SHARE,
    link_share: float = LINK_SHARE,
) -> Rates:
    """Rates of each of `ranks` GPUs of a kind in float16, at assumed shares of the datasheet's.

    Args:
        links: how many links to the host the ranks have together; None: each its own.
        host_link, exchange: GB/s each way in place of the datasheet's.

    Raises UserError for a GPU that `hardware.csv` does not know.
    """
    known = hardware()
    if name not in known.index:
        raise UserError(f"no GPU '{name}'; there are: {', '.join(known.index)}")
    row = known.loc[name]
    crowd = max(1.0, ranks / links) if links else 1.0
    return Rates(
        seconds_per_flop=1 / (compute_share * row["flops_per_second"]),
        seconds_per_draw=DRAW_BYTES / (link_share * 1e9 * row["memory_gigabytes_per_second"]),
        seconds_per_host_byte=crowd
        / (link_share * 1e9 * (host_link or row["host_link_gigabytes_per_second"])),
        seconds_per_exchanged_byte=1
        / (link_share * 1e9 * (exchange or row["exchange_gigabytes_per_second"])),
        draws=4,
    )


def busiest(lanes: Lanes, blocks: int) -> str:
    """The lane that has the most to do in a step."""
    work = {
        "link to the host": max(lanes.upload, lanes.offload) * blocks,
        "exchange": lanes.exchange * blocks,
    }
    work["computing"] = lanes.compute * blocks + lanes.outside
    return max(work, key=lambda lane: work[lane])


def sliced_compute_share(compute: float, moving: float, ranks: int) -> float:
    """Of the time that computing and the link to the host are busy, the part of computing once each
    rank moves an N-th.

    Args:
        compute, moving: busy times, or shares of them, with whole blocks.
    """
    return compute / (compute + moving / ranks)
