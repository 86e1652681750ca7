from .influence import Contrastive, Relative, relative
from .pairs import Pairs
from .towers import Clip, Heads, TwoTower

__all__ = ["Clip", "Contrastive", "Heads", "Pairs", "Relative", "TwoTower", "relative"]
