from .attribution import eap, eap_ig, hisp
from .engine import Engine, check
from .families import decoder_of
from .graph import Graph
from .metrics import Kl, Margin
from .policy import Policy
from .search import effects

__all__ = [
    "Engine",
    "Graph",
    "Kl",
    "Margin",
    "Policy",
    "check",
    "decoder_of",
    "eap",
    "eap_ig",
    "effects",
    "hisp",
]
