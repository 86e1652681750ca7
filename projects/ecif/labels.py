"""The names under which methods, variants and curvatures stand in rows, tables and figures."""

ECIF = "ECIF"
ECIF_LINEAR = "ECIF, paper"
POSITIVE_ONLY = "positive only"
NEGATIVE_ONLY = "negative only"
LARGER_CLEAN_SET = "ECIF, larger clean set"
SMALLER_CLEAN_SET = "ECIF, smaller clean set"
RELATIVE = "relative ECIF"
RELATIVE_LARGER_CLEAN_SET = "relative ECIF, larger clean set"
GAUSS_NEWTON_ECIF = "ECIF, Gauss-Newton"
IF_EKFAC = "IF-EKFAC"
TRAK = "TRAK"
TRACIN = "TracIn"
TRACIN_BY_GRADIENTS = "TracIn, gradients of pairs"
TRACIN_FORWARD = "TracIn, forward mode"
SELF_INFLUENCE = "self-influence"
CLIP_SCORE = "CLIP-score"
PAIR_LOSS = "pair loss"
RANDOM = "random"

# the paper's own baselines
PEERS = (IF_EKFAC, TRAK, TRACIN)

# an edit's mode and parts, of `Contrastive.removal_gradient`
EDITS = {
    ECIF: ("exact", "both"),
    ECIF_LINEAR: ("paper", "both"),
    POSITIVE_ONLY: ("exact", "positive"),
}

# rows that no method made
RETRAIN = "retrain"
RETRAIN_WARM = "retrain, from the full model"
RETRAIN_WITH_HESSIAN = "retrain, with the Hessian at hand"
NO_REMOVAL = "no removal"
KNOWN_EXCHANGED = "known exchanged"
BEFORE_FINE_TUNING = "before fine-tuning"
FINE_TUNED = "fine-tuned"

# what is removed first
KINDS = {"harmful": "blue", "random": "black", "valuable": "orange"}

# parts of the loss that `ablation` predicts by
VARIANTS = {
    "exact": "blue",
    "paper": "sky",
    "positive": "orange",
    "negative": "green",
    "wrong sign": "purple",
}

# curvatures of `ablation`
HESSIAN = "Hessian"
GAUSS_NEWTON = "Gauss-Newton"
IDENTITY = "identity"
# by the basis that `projects.ecif.fit.projection` takes
LOGRA = {"leading": "LoGra, leading", "random": "LoGra, random"}

# rankings of `trace`
RELATIVE_INFLUENCE = "relative influence"
RELATIVE_INFLUENCE_SIGNED = "relative influence, signed"
INFLUENCE = "influence"
INFLUENCE_HARMFUL = "influence, harmful"
COSINE = "cosine"
GALLERY = (RELATIVE_INFLUENCE, INFLUENCE, COSINE)

# Colours are names of `shared.figures.PALETTE`; the figure has these methods in this order.
COLOURS = {
    ECIF: "blue",
    LARGER_CLEAN_SET: "sky",
    IF_EKFAC: "orange",
    TRAK: "amber",
    TRACIN: "purple",
    SELF_INFLUENCE: "green",
    PAIR_LOSS: "black",
}
