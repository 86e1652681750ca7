"""ECIF: which image-text pairs helped or harmed a contrastively trained model, as positives and as
negatives (arXiv 2411.11667).
"""

from projects.ecif.influence import Contrastive, Relative, relative
from projects.ecif.pairs import Pairs
from projects.ecif.towers import Clip, Heads, TwoTower

__all__ = ["Clip", "Contrastive", "Heads", "Pairs", "Relative", "TwoTower", "relative"]
