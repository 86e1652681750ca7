"""The names under which methods and variants stand in rows, tables and figures. No torch."""

MAJORITY = "majority"
KNN = "KNN only"
LABELLED_ONLY = "CEM, labelled images only"
NO_PSEUDO = "CEM, all class labels, no pseudo labels"
CBM_SSL = "CBM+SSL"
CEM_SSL = "CEM+SSL"
FIXMATCH = "CEM, FixMatch on concepts"
SSCBM = "SSCBM"
SSCBM_LABELED = "SSCBM, class labels of labelled images only"
PROPAGATED = "CEM, class-propagated concepts (oracle)"
CEM_FULL = "CEM, all annotations"
CBM_FULL = "CBM, all annotations"

# in the order of the main table
METHODS = (
    *(MAJORITY, KNN, LABELLED_ONLY, NO_PSEUDO, CBM_SSL, CEM_SSL, FIXMATCH, SSCBM, SSCBM_LABELED),
    *(PROPAGATED, CBM_FULL, CEM_FULL),
)
# with the annotations that SSCBM has, and some way to use images without
RIVALS = (NO_PSEUDO, CBM_SSL, CEM_SSL, FIXMATCH)
FULLY_SUPERVISED = (CEM_FULL, CBM_FULL)

# Colours are names of `shared.figures.PALETTE`.
COLOURS = {
    SSCBM: "blue",
    CEM_SSL: "orange",
    NO_PSEUDO: "green",
    LABELLED_ONLY: "purple",
    CEM_FULL: "black",
    CBM_FULL: "amber",
}

# what stands in for which of the paper's data sets
SETS = {
    "fashion": "Fashion-MNIST attributes",
    "cifar10": "CIFAR-10 attributes",
    "strokes": "MNIST strokes",
    "scenes": "two-digit scenes",
    "synthetic": "synthetic patterns",
}

# experts of `interventions`
RIGHT, WRONG = "right", "wrong"
RANDOM_ORDER, UNCERTAIN_ORDER = "random", "by uncertainty"

# pseudo labels of `ablation`
CORRECTED = "corrected"
WRONG_INDEX = "as released: neighbours' index"
TWICE_NORMALISED = "as released: weights normalised twice"
LEAKED = "as released: RandInt reads hidden concepts"
AS_RELEASED = "as released: all three"
RELEASED = (WRONG_INDEX, TWICE_NORMALISED, LEAKED, AS_RELEASED)

# maps of `saliency`
INK = "a random pixel of ink"
UNTRAINED_MAP = "SSCBM, no alignment"
ALIGNED = "SSCBM"
ALIGNED_MORE = "SSCBM, stronger alignment"
TRUE_PSEUDO = "SSCBM, true concepts as pseudo labels (oracle)"
MAP_ARRAYS = {UNTRAINED_MAP: "maps_untrained", ALIGNED: "maps_aligned"}

# of `ablation`
FROZEN, PIXELS, OWN = "frozen network", "pixels", "model's own"
STRONGER = "stronger alignment"
COSINE = "heat maps by cosine"
BY_PIXELS = "neighbours by pixels"

# beside SSCBM in `cost`
CEM = "CEM"
