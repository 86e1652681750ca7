"""IDP: few-shot classifiers adapted to another domain by proxies of its images that are
reconstructed from a source codebook (arXiv 2511.14279).
"""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
