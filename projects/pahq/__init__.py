"""PAHQ: circuits of language models by greedy search, where only the head under test keeps full
precision (arXiv 2510.23264).
"""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
