"""Plain tables."""

import numpy as np
from numpy.typing import NDArray

from shared.data.cache import path
from shared.data.loaders import r


def letter() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Letter recognition (Slate, 1991): features float64 [20000, 16] with whole values 0 to 15,
    labels int64 0 (A) to 25 (Z).
    """
    table = r.rda(path("letter") / "LetterRecognition.rda", "LetterRecognition")
    labels = np.array([ord(name) - ord("A") for name in table["lettr"].astype(str)], np.int64)
    return table.drop(columns="lettr").to_numpy(np.float64), labels
