"""FlashDP: per-layer DP-SGD in one backward, without per-sample gradients in memory (arXiv
2507.01154).
"""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
