"""ECIF: which image-text pairs helped or harmed a contrastively trained model, as positives and as
negatives (arXiv 2411.11667).
"""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
