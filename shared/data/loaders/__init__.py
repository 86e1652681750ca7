"""One function for each dataset of the catalogue: from the files in the cache to numpy arrays, DataFrames, lists.

Each raises UserError, naming the command that fetches it, when the dataset is not in the cache. None touches the network.
"""

from shared.data.loaders.text import fine_food_reviews, wiki100

__all__ = ["fine_food_reviews", "wiki100"]
