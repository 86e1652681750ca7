"""Real datasets and models, by name: `path("mnist")` is a folder in the cache, `repro data fetch
mnist` puts it there.

`path` never touches the network and `fetch` is the only thing that does. Arrays and tables come
from `shared.data.loaders`.
"""

from shared.data.cache import path, stamp, verify
from shared.data.fetching import fetch

__all__ = ["fetch", "path", "stamp", "verify"]
