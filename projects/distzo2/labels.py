"""The modes of DistZO2's tables: the names that rows bear, what they are, their order, and their
colours (names of `shared.figures.PALETTE`). No torch.

Experiments, tables, figures and claims take them from here.
"""

from typing import Literal, NamedTuple

Transfer = Literal["replicated", "sliced"]


class Mode(NamedTuple):
    """A way to share a step out: data-parallel ranks, ranks for the two perturbed forwards (1 or
    2), and how blocks travel.
    """

    dp: int
    pert: int
    transfer: Transfer

    @property
    def world(self) -> int:
        """How many ranks it takes."""
        return self.dp * self.pert


SLICED = ", sliced"  # appended to a mode's name
DDP, PERTP, TWO_D = "DDP", "PertP", "2D"
NAIVE = "PertP, naive restore"

MODES = {
    "ZO2": Mode(1, 1, "replicated"),
    PERTP: Mode(1, 2, "replicated"),
    PERTP + SLICED: Mode(1, 2, "sliced"),
    NAIVE: Mode(1, 2, "replicated"),
    DDP: Mode(2, 1, "replicated"),
    DDP + SLICED: Mode(2, 1, "sliced"),
    "DDP x 3": Mode(3, 1, "replicated"),
    "DDP x 3, sliced": Mode(3, 1, "sliced"),
    "DDP x 4": Mode(4, 1, "replicated"),
    "DDP x 4, sliced": Mode(4, 1, "sliced"),
    TWO_D: Mode(2, 2, "replicated"),
    TWO_D + SLICED: Mode(2, 2, "sliced"),
    "DDP x 8": Mode(8, 1, "replicated"),
    "DDP x 8, sliced": Mode(8, 1, "sliced"),
    "2D x 8": Mode(4, 2, "replicated"),
    "2D x 8, sliced": Mode(4, 2, "sliced"),
}

# What the modes are compared with.
ZO2, MEZO, START = "ZO2", "MeZO", "start"
ZO2_TWICE = "ZO2, twice"  # two processes that make the same steps and say nothing to one another
FIRST_ORDER = "first-order DDP"


def one_process(threads: int) -> str:
    """The name of ZO2 in one process of so many threads."""
    return f"one process, {threads} thread{'s' if threads > 1 else ''}"


LANES = {
    "upload": "orange",
    "exchange": "purple",
    "compute": "blue",
    "offload": "green",
}

# Rows of the experiment `cost`: rates may be fitted on them; they are held against the fit; how
# long the ranks take to gather their losses.
FIT, HELD_OUT, GATHER = "fit", "held out", "gather"
KINDS = {FIT: ("s", "amber"), HELD_OUT: ("o", "green")}  # marker and colour

# Lines of the figure of whole blocks and slices.
WHOLE_COLOUR, SLICED_COLOUR = "orange", "blue"

# Rows of the experiment `plan`: a link to the host for each GPU or one for all; the batch that
# stays the same when there are more GPUs.
OWN_LINK, SHARED_LINK = "own", "shared"
BATCH_A_GPU, BATCH_IN_ALL = "a GPU", "in all"
# (links, transfer): what the figure says, and its colour; some lie on others, the first are widest
PLANS: dict[tuple[str, Transfer], tuple[str, str]] = {
    (OWN_LINK, "sliced"): ("slices, a link each", "blue"),
    (OWN_LINK, "replicated"): ("whole blocks, a link each", "sky"),
    (SHARED_LINK, "sliced"): ("slices, one link", "amber"),
    (SHARED_LINK, "replicated"): ("whole blocks, one link", "orange"),
}

LARGE = "opt-175b"
