"""ZO2: zeroth-order fine-tuning with the blocks away from the device (arXiv 2503.12668)."""

from projects.zo2.engine import ZO2, Step
from projects.zo2.mezo import MeZO

__all__ = ["ZO2", "MeZO", "Step"]
