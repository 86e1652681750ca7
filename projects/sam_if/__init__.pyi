from .estimators import KINDS, Estimator, influence, sam_hif, sam_if
from .fixed_point import SAMProblem, fit, partition
from .sam import SAM
from .trajectory import Gif, Recipe, gif_checkpoints, unrolled_effects

__all__ = [
    "KINDS",
    "SAM",
    "Estimator",
    "Gif",
    "Recipe",
    "SAMProblem",
    "fit",
    "gif_checkpoints",
    "influence",
    "partition",
    "sam_hif",
    "sam_if",
    "unrolled_effects",
]
