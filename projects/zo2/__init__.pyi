from .engine import ZO2, Step
from .mezo import MeZO

__all__ = ["ZO2", "MeZO", "Step"]
