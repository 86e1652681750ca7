from .model import CBM, CEM, SSCBM, ConceptModel, build
from .pseudo import choose_labelled, pseudo_labels
from .training import Data, Losses, train

__all__ = [
    "CBM",
    "CEM",
    "SSCBM",
    "ConceptModel",
    "Data",
    "Losses",
    "build",
    "choose_labelled",
    "pseudo_labels",
    "train",
]
