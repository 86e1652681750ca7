"""The methods that rows, tables, figures and claims name: their names, order and colours."""

NON_PRIVATE = "non-private"
UNTRAINED = "untrained"
EXPLICIT = "explicit"  # per-layer clipping with all per-sample gradients of a layer
OPACUS = "Opacus, per layer"
OPACUS_FGC = "Opacus, FGC"
OPACUS_GHOST = "Opacus, ghost"
GHOST_CLIP = "GhostClip"
BOOK_KEEPING = "BK"
FLASHDP = "FlashDP"

METHODS = (
    NON_PRIVATE,
    EXPLICIT,
    OPACUS,
    OPACUS_FGC,
    OPACUS_GHOST,
    GHOST_CLIP,
    BOOK_KEEPING,
    FLASHDP,
)
# one norm over all layers: another algorithm
FLAT = (OPACUS_FGC, OPACUS_GHOST, GHOST_CLIP, BOOK_KEEPING)
FLAT_RUN = "flat (BK)"  # flat clipping in `utility`, where it is trained for its loss

# by names of the palette
COLOURS = {
    NON_PRIVATE: "black",
    EXPLICIT: "sky",
    OPACUS: "orange",
    OPACUS_FGC: "amber",
    OPACUS_GHOST: "amber",
    GHOST_CLIP: "purple",
    BOOK_KEEPING: "green",
    FLASHDP: "blue",
    FLAT_RUN: "amber",
}
BACKEND_COLOURS = {
    "loop": "blue",
    "ghost": "orange",
    "recompute": "green",
    "explicit": "sky",
    "triton_2k": "purple",
    "triton_persistent": "amber",
}


def clipping(method: str) -> str:
    """What a method clips: "none", "flat" (a sample's whole gradient) or "per layer"."""
    return "none" if method == NON_PRIVATE else "flat" if method in FLAT else "per layer"
