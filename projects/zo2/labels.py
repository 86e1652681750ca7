"""The methods of ZO2's tables: the names that rows bear, their order, and their colours (names of
`shared.figures.PALETTE`). No torch.

Experiments, tables, figures and claims take them from here.
"""

from typing import NamedTuple

# ---- accuracy: in the order in which they are trained ----------------------------------------

ZERO_SHOT = "zero-shot"
UNFLUSHED = "ZO2, not flushed"
ZO2 = "ZO2"
MEZO = "MeZO"
FIRST_ORDER = "AdamW (first order)"
ACCURACY = (ZERO_SHOT, UNFLUSHED, ZO2, MEZO, FIRST_ORDER)
# Curves of training losses; MeZO lies under ZO2, which equals it.
CURVES: dict[str, tuple[str, dict[str, float]]] = {  # colour, how the line is drawn
    FIRST_ORDER: ("purple", {}),
    MEZO: ("orange", {"linewidth": 5, "alpha": 0.5}),
    ZO2: ("blue", {"linewidth": 1.5}),
}

# ---- memory ----------------------------------------------------------------------------------


class MemoryMethod(NamedTuple):
    """How a method of the memory table is shown: the column of its bytes, its name, its colour."""

    column: str
    label: str
    colour: str


MEMORY = {
    "adamw": MemoryMethod("adamw_bytes", "AdamW", "purple"),
    "sgd": MemoryMethod("sgd_bytes", "SGD", "amber"),
    "mezo": MemoryMethod("mezo_bytes", "MeZO", "orange"),
    "zo2-resident": MemoryMethod("resident_bytes", "ZO2, nothing offloaded", "sky"),
    "zo2-3": MemoryMethod("zo2_bytes", "ZO2, 3 slots", "blue"),
    "zo2-lean": MemoryMethod("lean_bytes", "ZO2, 1 slot, noise not cached", "green"),
}

LIMITED = {"mezo": "MeZO", "zo2-resident": "ZO2 with nothing offloaded", "zo2": "ZO2 from disk"}

# ---- throughput ------------------------------------------------------------------------------

ON_DEVICE = "ZO2, all on the device"
FROM_RAM = "ZO2, RAM"
FROM_WARM_DISK = "ZO2, disk warm"
FROM_COLD_DISK = "ZO2, disk cold"
NO_OVERLAP = ", no overlap"  # appended to the name of a tier
THROUGHPUT = (
    MEZO,
    ON_DEVICE,
    FROM_RAM,
    FROM_RAM + NO_OVERLAP,
    FROM_WARM_DISK,
    FROM_COLD_DISK,
    FROM_COLD_DISK + NO_OVERLAP,
)
OVERLAPPED = (FROM_RAM, FROM_WARM_DISK, FROM_COLD_DISK)

# ---- sensitivity and schedule ----------------------------------------------------------------

RESIDENT = "resident"
OVERLAP = "overlap"
SYNCHRONOUS = "no overlap"
LANES = ("upload", "compute", "offload")
LANE_SHADES = ("blue", "sky")  # of blocks in turns

# ---- ablation --------------------------------------------------------------------------------

FULL = "full"
NO_DEFERRED_UPDATE = "no deferred update"
THREE_VISITS = "no dual forward (three visits)"
NO_REUSED_SLOTS = "no reused slots"
TWO_SLOTS = "two slots"
ONE_SLOT = "one slot"
NOISE_NOT_CACHED = "noise not cached"
TENSOR_BY_TENSOR = "tensor by tensor"
IN_RAM, ON_DISK = "RAM", "disk"  # the tiers

# ---- equality --------------------------------------------------------------------------------

MUST_BE_EQUAL = "must be equal"
KNOWN_BUG = "known fault"

# ---- other implementations -------------------------------------------------------------------

IN_MEMORY = "in memory"
