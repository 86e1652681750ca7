"""The user's own text as batches of tokens.

A file is tokenised once, line by line, into memory-mapped arrays beside the run: neither the text
nor the tokens are ever in memory as a whole. Which rows step t takes is a pure function of (seed,
t), so that a run can go on anywhere.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from shared.files import atomic_folder, sha256
from shared.records import is_conversation, is_jsonl, lines, objects
from shared.seeding import step_seed

IGNORED = -100  # the label of a token that no loss is taken on
_TOKENISED = 256  # texts handed to the tokenizer at a time

Batch = dict[str, Tensor]
Example = tuple[list[int], list[int]]  # tokens before the loss begins, tokens with a loss


def tokenizer_digest(tokenizer: Any) -> str:
    """64 hexadecimal digits of all that decides which tokens a text becomes: vocabulary, merges,
    normalisation, special tokens and chat template.
    """
    rules = {}
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for setting in ("truncation", "padding"):  # those of the last call
            rules.pop(setting, None)
    content = [
        rules,
        sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt with the special tokens that begin a text, and without the one that some tokenizers
    put at its end: what follows goes on from it.
    """
    ids: list[int] = tokenizer(prompt)["input_ids"]
    end = tokenizer.eos_token_id
    if end is None or ids[-1:] != [end]:
        return ids
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids[:-1] if ids[-1 - len(plain) : -1] == plain else ids


class Corpus:
    """Rows of at most `length` tokens.

    `rows` is how many there are, `tokens` how many tokens they have together. Made by
    `Corpus.build`.
    """

    def __init__(self, folder: Path):
        about = json.loads((folder / "about.json").read_text())
        self.length: int = about["length"]
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r")
        self._with_loss = np.memmap(folder / "with_loss.bin", np.bool_, "r")
        self._ends = np.memmap(folder / "ends.bin", np.int64, "r")
        self.rows, self.tokens = len(self._ends), len(self._tokens)

    @classmethod
    def build(
        cls, file: Path, tokenizer: Any, length: int, folder: Path, *, pack: bool = True
    ) -> "Corpus":
        """Tokenise `file` into `folder`, or open what is there when it was made from the same file
        in the same way.

        A `.txt` file has texts with blank lines between them. A `.jsonl` file has on each line an
        object with `text`; with `prompt` and `completion` (the loss is on the completion); or with
        `messages`, a list of {"role", "content"} that go through the tokenizer's chat template (the
        loss is on the last one, if the assistant's). Texts are packed, each closed by the
        end-of-text token, into rows of `length`; the others are a row each, where a prompt too long
        loses its beginning and a completion its end.

        With `pack=False` a text is a row of its own too, and one too long loses its end: in
        differential privacy the record is what is protected, so that it must neither share a row
        nor be split over several. A text of a single token, in which there is nothing to predict,
        is left out.

        Raises UserError, with the number of the line, for a line that is none of these.
        """
        about = {
            "data": sha256(file),
            "tokenizer": tokenizer_digest(tokenizer),
            "length": length,
            "pack": pack,
        }
        try:
            if json.loads((folder / "about.json").read_text()) == about:
                return cls(folder)
        except (OSError, ValueError):
            pass
        with atomic_folder(folder) as partial:
            _write(file, tokenizer, length, pack, partial)
            (partial / "about.json").write_text(json.dumps(about))
        return cls(folder)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """How many tokens each of the rows has."""
        return np.where(rows == 0, self._ends[rows], self._ends[rows] - self._ends[rows - 1])

    def batch(self, rows: np.ndarray | range) -> Batch:
        """`input_ids` and `labels`, padded on the right.

        There is no attention mask: in a causal model no token sees the padding to its right.
        """
        spans = [
            (0 if row == 0 else int(self._ends[row - 1]), int(self._ends[row])) for row in rows
        ]
        longest = max(end - start for start, end in spans)
        input_ids = torch.zeros(len(spans), longest, dtype=torch.int64)
        labels = torch.full((len(spans), longest), IGNORED, dtype=torch.int64)
        for index, (start, end) in enumerate(spans):
            tokens = torch.from_numpy(self._tokens[start:end].astype(np.int64))
            input_ids[index, : end - start] = tokens
            labels[index, : end - start] = tokens.where(
                torch.from_numpy(np.array(self._with_loss[start:end])), IGNORED
            )
        return {"input_ids": input_ids, "labels": labels}

    def step_batches(self, seed: int, step: int, batch_size: int, accumulate: int) -> list[Batch]:
        """The micro-batches of a step: each pass over the rows is in a new order."""
        first = step * batch_size * accumulate
        places = range(first, first + batch_size * accumulate)
        rows = np.array(
            [_order(seed, place // self.rows, self.rows)[place % self.rows] for place in places]
        )
        return [self.batch(part) for part in rows.reshape(accumulate, batch_size)]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng(step_seed(seed, "order", epoch)).permutation(rows).astype(np.int32)


def _write(file: Path, tokenizer: Any, length: int, pack: bool, folder: Path) -> None:
    """The arrays of a corpus: tokens, whether each has a loss, and where each row ends."""
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "with_loss.bin", "wb") as with_loss,
        open(folder / "ends.bin", "wb") as ends,
    ):
        written = 0
        for before, after in _rows(file, tokenizer, length, pack):
            array("i", before + after).tofile(tokens)
            with_loss.write(bytes(len(before)) + b"\1" * len(after))
            written += len(before) + len(after)
            array("q", [written]).tofile(ends)
    if not written:
        raise UserError(f"{file} holds no text to train on")


def _rows(file: Path, tokenizer: Any, length: int, pack: bool) -> Iterator[Example]:
    """Rows of at most `length`, each with at least one token to predict."""
    packed: list[int] = []
    full = False
    for before, after in _examples(file, tokenizer):
        if before:
            after = after[: length - 1]
            yield before[-(length - len(after)) :], after
            continue
        if not pack:
            if len(after) > 1:
                yield after[:1], after[1:length]
            continue
        packed += after
        cut = len(packed) // length * length
        for start in range(0, cut, length):
            yield packed[start : start + 1], packed[start + 1 : start + length]
        full = full or cut > 0
        del packed[:cut]
    # otherwise the rest of the last text is left out: rows of one length keep every step alike
    if len(packed) > 1 and not full:
        yield packed[:1], packed[1:]


def _examples(file: Path, tokenizer: Any) -> Iterator[Example]:
    """Tokens of each text or conversation; the first part is empty for a text, which may be packed
    with others.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts: list[str] = []

    def tokenised() -> Iterator[Example]:
        if texts:
            for ids in tokenizer(texts, add_special_tokens=True)["input_ids"]:
                yield [], ids if ids[-1:] == end else ids + end
            texts.clear()

    for number, text in _texts(file):
        if isinstance(text, str):
            texts.append(text)
            if len(texts) == _TOKENISED:
                yield from tokenised()
            continue
        yield from tokenised()
        if isinstance(text, tuple):
            before = prompt_tokens(tokenizer, text[0])
            after = tokenizer(text[1], add_special_tokens=False)["input_ids"]
            start = before or (
                [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else end
            )
            if not start:
                raise UserError(
                    f"{file}, line {number}: an empty prompt, and the tokenizer has no token that"
                    " begins or ends a text"
                )
            yield start, after + end
        else:
            try:
                ids = tokenizer.apply_chat_template(text, tokenize=True, return_dict=False)
                question: list[int] = []
                if len(text) > 1 and text[-1]["role"] == "assistant":
                    question = tokenizer.apply_chat_template(
                        text[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
                    )
            except Exception as error:  # templates raise whatever they like
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"{file}, line {number}: the tokenizer's chat template refuses it: {reason}"
                ) from None
            if len(ids) < 2:
                raise UserError(f"{file}, line {number}: a conversation of fewer than two tokens")
            if question and not (len(question) < len(ids) and ids[: len(question)] == question):
                raise UserError(
                    f"{file}, line {number}: the chat template writes the conversation otherwise"
                    " than its generation prompt, so that where the answer begins is not known;"
                    ' give it as "prompt" and "completion"'
                )
            split = len(question) or 1
            yield ids[:split], ids[split:]
    yield from tokenised()


def _texts(file: Path) -> Iterator[tuple[int, str | tuple[str, str] | list[dict[str, str]]]]:
    """(line number, a text | a prompt and its completion | messages)."""
    if is_jsonl(file):
        for number, record in objects(file):
            yield number, _parsed(f"{file}, line {number}", record)
        return
    number, paragraph = 0, ""
    for number, line in lines(file):
        paragraph += line + "\n"
        if paragraph.strip() and not line.strip():
            yield number, paragraph
            paragraph = ""
    if paragraph.strip():
        yield number, paragraph


def _parsed(where: str, record: dict[str, Any]) -> str | tuple[str, str] | list[dict[str, str]]:
    kinds = [key for key in ("text", "prompt", "messages") if key in record]
    if len(kinds) > 1:
        raise UserError(f'{where}: both "{kinds[0]}" and "{kinds[1]}"; which is meant?')
    if record.get("tools"):
        raise UserError(f'{where}: "tools" are not put into the chat template here; leave them out')
    match record:
        case {"text": str(text)} if text:
            return text
        case {"prompt": str(prompt), "completion": str(completion)} if completion:
            return prompt, completion
        case {"messages": [*messages]} if is_conversation(messages):
            return messages
    raise UserError(
        f'{where}: needs a "text", a "prompt" and a "completion", or "messages" with'
        ' "role" and "content", none empty'
    )
