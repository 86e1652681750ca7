"""ZO2: zeroth-order fine-tuning with the blocks away from the device (arXiv 2503.12668)."""

import lazy_loader

# Names are imported at their first use: a table needs none of the engines.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
