"""SAM-IF: what a training sample did to a model trained by sharpness-aware minimisation (arXiv
2507.04059).
"""

from projects.sam_if.estimators import KINDS, Estimator, influence, sam_hif, sam_if
from projects.sam_if.fixed_point import SAMProblem, fit, partition
from projects.sam_if.sam import SAM
from projects.sam_if.trajectory import Gif, Recipe, gif_checkpoints, unrolled_effects

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
