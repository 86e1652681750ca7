"""A user's text, line by line: `lines` of a file, and `objects`, the JSON objects of a .jsonl.

Lines end in a line feed, or a carriage return and one, and in nothing else that Unicode takes for
the end of a line. A byte order mark is no part of the first.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError

SUFFIXES = (".txt", ".jsonl")  # in either case


def is_jsonl(file: Path) -> bool:
    """Whether it holds objects (.jsonl) or text (.txt). UserError for any other suffix."""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{file}: name a .jsonl or a .txt file")
    return suffix == ".jsonl"


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end).

    Raises UserError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    number = 0
    try:
        with open(file, encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UserError(f"{file}, near line {number + 1}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of each line that is not blank.

    Raises UserError as `lines`, and with the number of a line that is no JSON object; NaN,
    infinity and halves of a surrogate pair are none of JSON's.
    """
    for number, line in lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_no_number)
            if "\\u" in line:
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            reason = "half of a surrogate pair, which is no text"
            raise UserError(f"{file}, line {number}: {reason}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{file}, line {number}: a JSON object is wanted, not {line[:40]}")
        yield number, record


def is_conversation(messages: object) -> bool:
    """Whether it is a list of {"role": text, "content": text} that a chat template takes."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
