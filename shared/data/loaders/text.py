"""Text: articles, reviews, maths word problems, quotations, a dictionary."""

import gzip
import lzma
import struct
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd

from shared.data.cache import path


def wiki100() -> dict[str, str]:
    """100 Wikipedia articles on broad subjects, as {title: plain text}, by title; 4.8 MB in all."""
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(path("wiki100").glob("*.txt"))}


def fine_food_reviews() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Amazon fine-food reviews: (train, test) with 4,000 and 1,000 rows.

    Columns: `text` (str), `label` (int64; 1: the score was "great", that is five stars; 0: any other).
    """
    return _reviews("training_data"), _reviews("testing_data")


def _reviews(name: str) -> pd.DataFrame:
    table = _r_object(path("fine-food") / "Rdata", name)
    return pd.DataFrame({"text": table["review"].astype(str), "label": (table["score"] == "great").astype("int64")}).reset_index(drop=True)


def _r_object(database: Path, name: str) -> Any:
    """One object of an R lazy-load database, `<database>.rdx` (where each object is) and `<database>.rdb` (the objects).

    Each object is a 4-byte big-endian length of what it decompresses to, the letter Z, and a raw LZMA2 stream of R's serialisation.
    """
    import rdata

    offset, length = rdata.read_rds(database.with_suffix(".rdx"))["variables"][name]
    with database.with_suffix(".rdb").open("rb") as stream:
        stream.seek(int(offset))
        record = stream.read(int(length))
    (size,) = struct.unpack(">I", record[:4])
    assert record[4:5] == b"Z"
    serialised = lzma.decompress(record[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    assert len(serialised) == size
    with tempfile.NamedTemporaryFile(suffix=".rds") as file:
        file.write(serialised)
        file.flush()
        return rdata.read_rds(file.name)
