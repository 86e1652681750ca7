"""Text: articles, reviews."""

import pandas as pd

from shared.data.cache import path
from shared.data.loaders import r


def wiki100() -> dict[str, str]:
    """101 Wikipedia articles on broad subjects as {title: text}, by title; 4.8 million characters
    in all.

    The text is plain but for section headings, which stand before their paragraph as "*: Heading -
    ".
    """
    return {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted(path("wiki100").glob("*.txt"))
    }


def fine_food_reviews() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Amazon fine-food reviews: (train, test) with 4,000 and 1,000 rows.

    Columns: `text` (str), `label` (int64; 1 for a score of "great", 0 for "other").
    """
    train, test = (
        r.lazy_load(path("fine-food") / "Rdata", name) for name in ("training_data", "testing_data")
    )
    return _reviews(train), _reviews(test)


def _reviews(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {"text": table["review"].astype(str), "label": (table["score"] == "great").astype("int64")}
    ).reset_index(drop=True)
