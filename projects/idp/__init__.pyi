from .align import FINE_TUNING, IDP, Alignment, Losses, align
from .classify import embed, propagate, ridge_head
from .codebook import build, class_codebooks
from .network import DensePrototypes, ResidualNet
from .norms import TaskNetwork
from .ridge import effective_dimension, reconstruct, ridge_logits
from .source import Source, Training

__all__ = [
    "FINE_TUNING",
    "IDP",
    "Alignment",
    "DensePrototypes",
    "Losses",
    "ResidualNet",
    "Source",
    "TaskNetwork",
    "Training",
    "align",
    "build",
    "class_codebooks",
    "effective_dimension",
    "embed",
    "propagate",
    "reconstruct",
    "ridge_head",
    "ridge_logits",
]
