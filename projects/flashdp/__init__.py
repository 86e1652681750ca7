"""FlashDP: per-layer DP-SGD in one backward, without per-sample gradients in memory (arXiv
2507.01154).
"""

from projects.flashdp.accounting import PrivacyReport, noise_multiplier
from projects.flashdp.losses import per_sample_loss
from projects.flashdp.private import DPModel, make_private, untie
from projects.flashdp.sampling import FixedSampling, PoissonSampling

__all__ = [
    "DPModel",
    "FixedSampling",
    "PoissonSampling",
    "PrivacyReport",
    "make_private",
    "noise_multiplier",
    "per_sample_loss",
    "untie",
]
