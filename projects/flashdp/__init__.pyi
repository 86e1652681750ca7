from .accounting import PrivacyReport, noise_multiplier
from .losses import per_sample_loss
from .private import DPModel, make_private, untie
from .sampling import FixedSampling, PoissonSampling, private_loader

__all__ = [
    "DPModel",
    "FixedSampling",
    "PoissonSampling",
    "PrivacyReport",
    "make_private",
    "noise_multiplier",
    "per_sample_loss",
    "private_loader",
    "untie",
]
