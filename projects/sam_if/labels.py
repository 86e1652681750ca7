"""The names under which methods and models stand in rows, tables and figures."""

SAM_HIF = "SAM-HIF"
SAM_IF = "SAM-IF"
IF = "IF"
SAM_GIF = "SAM-GIF"
SAM_GIF_UNROLLED = "SAM-GIF, unrolled"
SAM_GIF_CHECKPOINTS = "SAM-GIF, checkpoints"
TRACIN = "TracIn"
TRAK = "TRAK"
EKFAC = "EK-FAC"
GRADIENT_DOT = "gradient dot"
SELF_INFLUENCE = "self-influence"
LOSS = "loss"
CHANCE = "chance"
RETRAIN = "Retrain"

# the paper's three, by the `kind` of their `Estimator`
ESTIMATORS = {SAM_HIF: "sam_hif", SAM_IF: "sam_if", IF: "if"}

# SAM-HIF with one of its two terms left out, and the option that leaves it out
NO_TERM_IN_R = "HIF, no term in r"
NO_TERM_IN_J = "HIF, no term in J"
ABLATIONS = {NO_TERM_IN_R: "drop_eq9_term", NO_TERM_IN_J: "drop_matrix_term"}

# rows that no method made
BEFORE = "before"
NO_EDIT = "no edit"  # the weights as they are, which a claim of closeness must beat
NONE_REMOVED = "none removed"
ALL_WRONG_REMOVED = "all wrong ones removed"
OTHER_SEED = "the run with another seed"

# what `speed` times besides: the same methods in other precision and other packages, and edits
SAM_HIF_FLOAT32 = "SAM-HIF, float32"
IF_FLOAT32 = "IF, float32"
TRACIN_CAPTUM = "TracIn (captum)"
TRACIN_FORWARD = "TracIn, forward mode"
IF_DATTRI_EXPLICIT = "IF (dattri, explicit)"
EKFAC_KRONFLUENCE = "EK-FAC (kronfluence)"
EDIT_BY_HIF = "edit by SAM-HIF"
EDIT_BY_GIF = "edit by SAM-GIF"
RETRAIN_BATCHES = "Retrain, batches"
RETRAIN_WARM = "Retrain, from the solution"


def if_dattri_cg(iterations: int) -> str:
    """dattri's influence function by conjugate gradients that stop after so many iterations."""
    return f"IF (dattri, cg {iterations})"


# Colours are names of `shared.figures.PALETTE`; lines are drawn in this order.
LOOKS: dict[str, dict[str, object]] = {
    SAM_HIF: {"color": "blue", "linewidth": 2.6, "zorder": 5},
    SAM_GIF: {"color": "green"},
    SAM_IF: {"color": "sky", "linestyle": "--"},
    IF: {"color": "orange"},
    TRACIN: {"color": "green", "linestyle": ":"},
    TRAK: {"color": "purple"},
    EKFAC: {"color": "amber"},
    SELF_INFLUENCE: {"color": "amber", "linestyle": ":"},
    LOSS: {"color": "black"},
    CHANCE: {"color": "black", "linestyle": ":"},
}
ABLATION_LOOKS: dict[str, dict[str, object]] = {
    NO_TERM_IN_R: {"color": "purple", "linestyle": ":"},
    NO_TERM_IN_J: {"color": "amber"},
}
