"""SAM-IF: what a training sample did to a model trained by sharpness-aware minimisation (arXiv
2507.04059).
"""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
