"""Loading models from the data cache, a folder or the hub cache, and making ones with random
weights.

Nothing here touches the network; `repro data fetch` and the hub's own client do.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
