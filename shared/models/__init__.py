"""Loading models from the data cache, a folder or the hub cache, and making ones with random
weights: the only way by which a model enters.

Nothing here touches the network; `repro data fetch` and the hub's own client do. Nothing that lies
in a model folder is run, and a folder that is not what its config.json says is refused in a line.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
