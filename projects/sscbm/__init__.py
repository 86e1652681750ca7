"""SSCBM: a concept bottleneck model from a few concept annotations (arXiv 2406.18992)."""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
