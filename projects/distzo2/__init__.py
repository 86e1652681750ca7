"""DistZO2 (arXiv 2507.03211): ZO2 over several processes and machines, bit for bit what one process
computes.
"""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
