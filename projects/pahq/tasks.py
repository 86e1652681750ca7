"""Tasks of text for pretrained models: the paper's, and the user's own from a JSONL.

A line of the user's file: {"clean": "...", "corrupted": "...", "answer": " Mary", "wrong":
" John"}. `answer` and `wrong` may be lists. All prompts must have one length in tokens, because the
senders' outputs of a clean and a corrupted prompt are exchanged position by position.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from projects.pahq.data import Task, hot
from shared.errors import UserError

Kind = Literal["difference", "hardest", "probability"]


@dataclass(frozen=True)
class Example:
    """One pair of prompts, and the tokens that may follow the clean one."""

    clean: str
    corrupted: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


# ---- the user's own ------------------------------------------------------------------------------


def read_examples(path: Path) -> list[Example]:
    """The lines of a JSONL file.

    Raises:
        UserError: names the line that is no such object, lacks a field, or says nothing (clean and
            corrupted prompt are the same).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--task {path}: {reason}") from None
    found = [
        _example(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"{path} holds no prompts")
    return found


def _example(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: no JSON") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: no JSON object")
    unknown = sorted(record.keys() - {"clean", "corrupted", "answer", "wrong"})
    if unknown:
        raise UserError(
            f"{where}: unknown field '{unknown[0]}'; there are: clean, corrupted, answer, wrong"
        )
    for name in ("clean", "corrupted"):
        if not isinstance(record.get(name), str) or not record[name]:
            raise UserError(f"{where}: '{name}' must be a text")
    if record["clean"] == record["corrupted"]:
        raise UserError(
            f"{where}: the clean and the corrupted prompt are the same, so that no edge matters"
        )
    return Example(
        record["clean"],
        record["corrupted"],
        _answers(record, "answer", where),
        _answers(record, "wrong", where),
    )


def _answers(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = record.get(name)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str) and one for one in values):
        raise UserError(f"{where}: '{name}' must be a text, or a list of texts")
    return tuple(values)


# ---- text to tokens ------------------------------------------------------------------------------


def encode(tokenizer: Any, examples: Sequence[Example], kind: Kind, vocabulary: int) -> Task:
    """Prompts as tokens; the last position of each is scored.

    Args:
        kind: of `metrics.Margin`.
        vocabulary: of the model's logits.

    Raises:
        UserError: prompts of unequal length in tokens, an answer that is not one token, or one that
            is right and wrong at once.
    """
    pairs = [
        (tokenizer(one.clean)["input_ids"], tokenizer(one.corrupted)["input_ids"])
        for one in examples
    ]
    length = len(pairs[0][0])
    for number, (clean, corrupted) in enumerate(pairs, 1):
        for name, tokens in (("clean", clean), ("corrupted", corrupted)):
            if len(tokens) != length:
                raise UserError(
                    f"prompt {number}: the {name} one has {len(tokens)} tokens and the first of all"
                    f" has {length}; give all prompts the same number of tokens"
                )
        if clean == corrupted:
            raise UserError(f"prompt {number}: clean and corrupted are the same tokens")
    clean, corrupted = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    right, wrong = (
        torch.cat([_hot(tokenizer, words, n, vocabulary) for n, words in enumerate(side, 1)])
        for side in ([one.right for one in examples], [one.wrong for one in examples])
    )
    both = (right & wrong).any(-1).any(-1).nonzero()
    if len(both):
        raise UserError(f"prompt {int(both[0]) + 1}: an answer is right and wrong at once")
    positions = torch.full((len(pairs), 1), length - 1)
    return Task(clean, corrupted, positions, right, wrong, kind)


def _hot(tokenizer: Any, words: Sequence[str], number: int, vocabulary: int) -> torch.Tensor:
    tokens = []
    for word in words:
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            hint = "" if word.startswith(" ") else "; a word inside a sentence begins with a space"
            raise UserError(
                f"prompt {number}: the answer {word!r} is {len(pieces)} tokens of this model, and"
                f" only one can be scored{hint}"
            )
        tokens.append(pieces[0])
    return hot(torch.tensor([[tokens]]), vocabulary)


# ---- the paper's tasks ---------------------------------------------------------------------------

NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Anna", "Paul", "Mark", "Kate",
    "Laura", "Peter", "Alex", "Jack", "Rachel", "Sarah", "Simon",
)  # fmt: skip
PLACES = ("store", "park", "school", "house", "garden", "station")
THINGS = ("ring", "book", "drink", "ball", "letter", "key")
NOUNS = ("war", "trial", "project", "marriage", "voyage", "siege", "strike", "reign")
ARGUMENTS = (
    "files", "state", "size", "shape", "option", "path", "name", "model", "value", "index",
    "image", "text", "label", "order", "mode", "key",
)  # fmt: skip


def _pick(draw: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    return [str(word) for word in draw.choice(np.array(words), count, replace=False)]


def _ioi(draw: np.random.Generator) -> Example:
    """ABBA and BABA; the corrupted prompt has three names of its own (ABC)."""
    a, b, *others = _pick(draw, NAMES, 5)
    (place,), (thing,) = _pick(draw, PLACES, 1), _pick(draw, THINGS, 1)

    def prompt(first: str, second: str, subject: str) -> str:
        return f"When {first} and {second} went to the {place}, {subject} gave a {thing} to"

    two = (a, b) if draw.random() < 0.5 else (b, a)
    return Example(prompt(*two, b), prompt(*others), (f" {a}",), (f" {b}",))


def _greater_than(draw: np.random.Generator) -> Example:
    """Years go digit by digit in many tokenizers, so the decade is scored. Corrupted: year 01."""
    century, year = int(draw.integers(11, 20)), int(draw.integers(20, 80))
    (noun,) = _pick(draw, NOUNS, 1)

    def prompt(of: int) -> str:
        return f"The {noun} lasted from the year {century}{of:02d} to the year {century}"

    later = tuple(str(digit) for digit in range(year // 10 + 1, 10))
    earlier = tuple(str(digit) for digit in range(year // 10))
    return Example(prompt(year), prompt(1), later, earlier)


def _docstring(draw: np.random.Generator) -> Example:
    """A function of four arguments, two of them documented; the third comes. Corrupted: other
    arguments, and others documented.
    """
    names = _pick(draw, ARGUMENTS, 10)

    def prompt(arguments: list[str], documented: list[str]) -> str:
        lines = "".join(f"    :param {name}: the {name}\n" for name in documented)
        return f'def run({", ".join(arguments)}):\n    """Run it.\n\n{lines}    :param'

    first, second, third, fourth = (f" {name}" for name in names[:4])
    return Example(
        prompt(names[:4], names[:2]), prompt(names[4:8], names[8:]), (third,),
        (first, second, fourth),
    )  # fmt: skip


TEXT: dict[str, tuple[Callable[[np.random.Generator], Example], Kind]] = {
    "ioi": (_ioi, "difference"),
    "greater-than": (_greater_than, "probability"),
    "docstring": (_docstring, "hardest"),
}
REPEATED = "repeated"
TASKS = (*TEXT, REPEATED)


def examples(name: str, count: int, seed: int) -> tuple[list[Example], Kind]:
    """Prompts of a task of `TEXT`."""
    make, kind = TEXT[name]
    draw = np.random.default_rng(seed)
    return [make(draw) for _ in range(count)], kind


def repeated(vocabulary: int, count: int, seed: int, half: int = 12) -> Task:
    """Random tokens, and the same again; the corrupted prompt has others in the first half. Every
    position of the second half but the last is scored.
    """
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(vocabulary, (count, half), generator=draw)
    other = (first + torch.randint(1, vocabulary, (count, 1), generator=draw)) % vocabulary
    positions = torch.arange(half, 2 * half - 1).expand(count, -1)
    return Task(
        torch.cat([first, first], 1),
        torch.cat([other, first], 1),
        positions,
        hot(first[:, 1:], vocabulary),
        hot(other[:, 1:], vocabulary),
        "difference",
    )


def load_task(text: str, tokenizer: Any, vocabulary: int, count: int, seed: int) -> Task:
    """A task by its name (`TASKS`), or that of a JSONL file.

    Raises:
        UserError: it is neither; or as `read_examples` and `encode`.
    """
    if text == REPEATED:
        return repeated(min(vocabulary, len(tokenizer)), count, seed)
    if text in TEXT:
        made, kind = examples(text, count, seed)
        return encode(
            tokenizer, _of_one_length(tokenizer, made, text, count, seed), kind, vocabulary
        )
    if not Path(text).is_file():
        raise UserError(f"--task {text}: no file, and not one of {', '.join(TASKS)}")
    return encode(tokenizer, read_examples(Path(text)), "difference", vocabulary)


def _of_one_length(
    tokenizer: Any, made: list[Example], name: str, count: int, seed: int
) -> list[Example]:
    """Of a task's prompts those that this tokenizer gives the most common length, and whose answers
    are one token.
    """
    many = [*made, *examples(name, 20 * count, seed + 1)[0]]

    def lengths(one: Example) -> tuple[int, int]:
        clean, corrupted = (tokenizer(text)["input_ids"] for text in (one.clean, one.corrupted))
        # words that the tokenizer does not know may make the two the same
        return len(clean), len(corrupted) if clean != corrupted else -1

    def single(one: Example) -> bool:
        return all(
            len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
            for word in (*one.right, *one.wrong)
        )

    found = [(lengths(one), one) for one in many if single(one)]
    usual = [pair[0] for pair, _ in found if pair[0] == pair[1]]
    if not usual:
        raise UserError(f"--task {name}: no prompt of it suits this model's tokenizer")
    length = max(set(usual), key=usual.count)
    chosen = [one for pair, one in found if pair == (length, length)][:count]
    if len(chosen) < count:
        raise UserError(
            f"--task {name}: only {len(chosen)} prompts of one length suit this model's tokenizer"
        )
    return chosen


KINDS: tuple[Kind, ...] = get_args(Kind)
