"""Tasks: pairs of clean and corrupted prompts with the answers that are scored.

Two kinds: of tokens, for small models that are trained in place on the clean ones; and of text, for
pretrained models (`tasks`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from projects.pahq.metrics import Margin

# ---- tasks of tokens -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Prompts of one length.

    Attributes:
        clean, corrupted: tokens [B, T].
        positions: the scored ones of each prompt, [B, P]; the token after each is predicted.
        right, wrong: bool [B, P, vocabulary].
        kind: of `metrics.Margin`.
    """

    clean: Tensor
    corrupted: Tensor
    positions: Tensor
    right: Tensor
    wrong: Tensor
    kind: str

    def margin(self) -> Margin:
        """The task's own metric."""
        return Margin(self.right, self.wrong, self.kind)

    def __len__(self) -> int:
        return len(self.clean)

    def part(self, prompts: slice) -> "Task":
        """Some of the prompts."""
        return Task(
            self.clean[prompts], self.corrupted[prompts], self.positions[prompts],
            self.right[prompts], self.wrong[prompts], self.kind,
        )  # fmt: skip

    def to(self, device: torch.device) -> "Task":
        """On a device."""
        return Task(
            self.clean.to(device), self.corrupted.to(device), self.positions.to(device),
            self.right.to(device), self.wrong.to(device), self.kind,
        )  # fmt: skip


@dataclass(frozen=True)
class Small:
    """A task for a small model, and the model's shape.

    Attributes:
        make: prompts by their number and a generator.
    """

    vocabulary: int
    length: int
    layers: int
    inner: int
    make: Callable[[int, torch.Generator], Task]


def hot(tokens: Tensor, vocabulary: int) -> Tensor:
    """Tokens [B, P] or sets of them [B, P, n] as bool [B, P, vocabulary]."""
    sets = tokens if tokens.ndim == 3 else tokens[..., None]
    return torch.zeros(*sets.shape[:2], vocabulary, dtype=torch.bool).scatter_(2, sets, True)


def _distinct(count: int, size: int, among: int, draw: torch.Generator) -> Tensor:
    """`size` different numbers below `among` for each of `count` prompts."""
    return torch.rand(count, among, generator=draw).argsort(dim=1)[:, :size]


def _last(tokens: Tensor) -> Tensor:
    return torch.full((len(tokens), 1), tokens.shape[1] - 1)


def _induction(count: int, draw: torch.Generator) -> Task:
    """Random tokens, and the same again; the corrupted prompt has others in the first half, all
    moved on by one number, so that none is right at its place.
    """
    size, vocabulary = 10, 32
    first = _distinct(count, size, vocabulary, draw)
    shift = torch.randint(1, vocabulary, (count, 1), generator=draw)
    other = (first + shift) % vocabulary
    clean, corrupted = torch.cat([first, first], 1), torch.cat([other, first], 1)
    positions = torch.arange(size, 2 * size - 1).expand(count, -1)
    right, wrong = hot(first[:, 1:], vocabulary), hot(other[:, 1:], vocabulary)
    return Task(clean, corrupted, positions, right, wrong, "difference")


def _ioi(count: int, draw: torch.Generator) -> Task:
    """Start, name, and, name, place, one of the names, gave: the other name comes."""
    names, places, vocabulary = 16, 6, 26
    start, joined, gave = 22, 23, 24
    two, three = (_distinct(count, size, names, draw) for size in (2, 3))
    which = torch.randint(2, (count,), generator=draw)
    place = names + torch.randint(places, (count,), generator=draw)
    rows = torch.arange(count)

    def prompt(a: Tensor, b: Tensor, subject: Tensor) -> Tensor:
        fixed = [torch.full((count,), token) for token in (start, joined, gave)]
        return torch.stack([fixed[0], a, fixed[1], b, place, subject, fixed[2]], 1)

    clean = prompt(two[:, 0], two[:, 1], two[rows, which])
    corrupted = prompt(*three.T)
    right = hot(two[rows, 1 - which][:, None], vocabulary)
    wrong = hot(two[rows, which][:, None], vocabulary)
    return Task(clean, corrupted, _last(clean), right, wrong, "difference")


def _greater(count: int, draw: torch.Generator) -> Task:
    """Start, noun, from, year, to: any later year; the corrupted year is the first."""
    years, nouns, vocabulary = 24, 6, 34
    year = torch.randint(1, years - 1, (count,), generator=draw)
    noun = years + torch.randint(nouns, (count,), generator=draw)

    def prompt(first: Tensor) -> Tensor:
        fixed = [torch.full((count,), token) for token in (30, 31, 32)]
        return torch.stack([fixed[0], noun, fixed[1], first, fixed[2]], 1)

    clean, corrupted = prompt(year), prompt(torch.zeros_like(year))
    later = torch.zeros(count, 1, vocabulary, dtype=torch.bool)
    later[:, 0, :years] = torch.arange(years) > year[:, None]
    earlier = torch.zeros_like(later)
    earlier[:, 0, :years] = ~later[:, 0, :years]
    return Task(clean, corrupted, _last(clean), later, earlier, "probability")


def _docstring(count: int, draw: torch.Generator) -> Task:
    """def, five arguments, doc, param and a word for the third, for the fourth, param: the
    fifth comes.
    """
    names, words, vocabulary = 24, 6, 34

    def fixed(token: int) -> Tensor:
        return torch.full((count,), token)

    word = names + torch.randint(words, (2, count), generator=draw)

    def prompt(arguments: Tensor, documented: Tensor) -> Tensor:
        return torch.stack(
            [
                fixed(30), *arguments.T, fixed(31), fixed(32), documented[:, 0], word[0],
                fixed(32), documented[:, 1], word[1], fixed(32),
            ],
            1,
        )  # fmt: skip

    all_names = _distinct(count, 12, names, draw)
    clean = prompt(all_names[:, :5], all_names[:, 2:4])
    corrupted = prompt(all_names[:, 5:10], all_names[:, 10:12])
    right = hot(all_names[:, 4:5], vocabulary)
    wrong = hot(all_names[:, None, :4], vocabulary)
    return Task(clean, corrupted, _last(clean), right, wrong, "hardest")


SMALL = {
    "induction": Small(32, 20, 2, 0, _induction),
    "IOI": Small(26, 7, 2, 128, _ioi),
    "greater-than": Small(34, 5, 2, 128, _greater),
    "docstring": Small(34, 14, 3, 0, _docstring),
}


def targets(task: Task, draw: torch.Generator) -> Tensor:
    """A right answer for each scored position, drawn evenly from all, [B, P]."""
    noise = torch.rand(task.right.shape, generator=draw)
    return noise.masked_fill(~task.right, -1.0).argmax(-1)
