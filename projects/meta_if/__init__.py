"""meta-IF: influence functions through the two levels of meta-learning (arXiv 2501.15963)."""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
