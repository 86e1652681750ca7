"""Reading what R wrote: the one object of an .rda file, or one object of a package's lazy-load
database.
"""

import lzma
import struct
from pathlib import Path
from typing import Any


def rda(file: Path, name: str) -> Any:
    """The object `name` of an .rda file; a data frame becomes a DataFrame, a factor a
    Categorical.
    """
    import rdata

    return rdata.read_rda(file, default_encoding="utf-8")[name]


def lazy_load(database: Path, name: str) -> Any:
    """The object `name` of `<database>.rdx` (where each object is) and `<database>.rdb` (the
    objects).

    Each object is a 4-byte big-endian length of what it decompresses to, the letter Z, and a raw
    LZMA2 stream of R's serialisation.
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
    # A tibble is a data frame with other manners of printing.
    frame = rdata.conversion.DEFAULT_CLASS_MAP["data.frame"]
    classes = {**rdata.conversion.DEFAULT_CLASS_MAP, "tbl_df": frame, "tbl": frame}
    return rdata.conversion.convert(
        rdata.parser.parse_data(serialised, extension=".rds"), classes, default_encoding="utf-8"
    )
