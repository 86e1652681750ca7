"""One function for each dataset of the catalogue: from the files in the cache to numpy arrays,
DataFrames, lists.

Each raises UserError, naming the command that fetches it, when the dataset is not in the cache.
None touches the network. Models and tokenizers are read in `shared/models/`, from
`shared.data.path(name)`.
"""

from shared.data.loaders.graphs import CORA_CLASSES, Cora, cora, debian_packages, wordnet
from shared.data.loaders.images import (
    Labelled,
    cifar10,
    digits,
    emoji,
    fashion_mnist,
    font_glyphs,
    mnist,
    photos,
    quickdraw,
)
from shared.data.loaders.scenes import (
    MOTORCYCLE_CALIBRATION,
    RenderedFrames,
    SensorFrames,
    Stereo,
    StereoCalibration,
    aloe,
    castel_real,
    castle_simu,
    motorcycle,
)
from shared.data.loaders.tables import letter
from shared.data.loaders.text import (
    fine_food_reviews,
    wiki100,
)

__all__ = [
    "CORA_CLASSES",
    "MOTORCYCLE_CALIBRATION",
    "Cora",
    "Labelled",
    "RenderedFrames",
    "SensorFrames",
    "Stereo",
    "StereoCalibration",
    "aloe",
    "castel_real",
    "castle_simu",
    "cifar10",
    "cora",
    "debian_packages",
    "digits",
    "emoji",
    "fashion_mnist",
    "fine_food_reviews",
    "font_glyphs",
    "letter",
    "mnist",
    "motorcycle",
    "photos",
    "quickdraw",
    "wiki100",
    "wordnet",
]
