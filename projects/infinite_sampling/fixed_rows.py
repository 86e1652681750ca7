"""Fixed slots: as many rows of cache as the schedule has, each with room for the longest
completion.
"""

import torch
from torch import Tensor

from projects.infinite_sampling.cache import Prefix, SlotCache
from projects.infinite_sampling.jobs import Job, Prompt, RowsOwner

_WIDTH = 64  # rows see their cache in multiples of this many tokens


class FixedRows:
    """Fixed slots. The prompt is copied into each."""

    def __init__(self, run: RowsOwner, shapes: Prefix) -> None:
        self.run, self.engine = run, run.engine
        self.count, self.tokens = run.slots, run.longest
        self.cache = SlotCache(shapes, self.count, self.tokens)
        self.live: dict[int, Job] = {}
        self._returned: list[int] = []  # rows whose jobs had been put aside
        self._place = list(range(self.count))  # where in the cache each row lies
        self._batch = self.count  # rows of a forward
        # the prompt whose keys and values lie at each place
        self._holds: list[int | None] = [None] * self.count

    def learn(self, prompt: Prompt) -> None:
        self.run.note_prompts()

    def forget(self, prompt: Prompt) -> None:
        pass

    def vacant(self) -> list[int]:
        return [row for row in range(self.count) if row not in self.live]

    def admit(self, row: int, job: Job, totals: dict[int, int]) -> bool:
        prompt = self.run.prompts[job.prompt]
        place = self._place[row]
        if self._holds[place] != job.prompt:
            assert prompt.prefix is not None
            self.cache.load(place, prompt.prefix)
            self._holds[place] = job.prompt
        self._batch = self.count
        if len(job.tokens) > 1 and not self.engine.fixed_shape:
            self._returned.append(row)
        job.since = self.run.stats.steps
        self.live[row] = job
        return True

    def make_room(self) -> list[Job]:
        return []

    def places(self, rows: list[int]) -> list[int]:
        return [self._place[row] for row in rows]

    def room(self) -> int:
        return self.count - len(self.live)

    def drop_empty(self) -> None:
        """Move live rows to the front, so that forwards are of no others until a job comes."""
        if self.engine.fixed_shape or len(self.live) == self._batch:
            return
        self._batch = len(self.live)
        taken = set(self.places(list(self.live)))
        gaps = [place for place in range(len(self.live)) if place not in taken]
        for row in self.live:
            if (last := self._place[row]) >= len(self.live):
                first = gaps.pop()
                self.cache.copy(last, first)
                self._holds[first] = self._holds[last]
                other = self._place.index(first)
                self._place[row], self._place[other] = first, last

    def release(self, row: int) -> None:
        del self.live[row]

    def forward(self) -> Tensor:
        device = self.engine.device
        if self._returned:
            jobs = [self.live[row] for row in self._returned]
            ids, positions, pad = self.run.known(jobs)
            width = self._width(int(positions.max()))
            self.cache.select(
                positions.masked_fill(pad, self.tokens - 1),
                width,
                torch.tensor(self.places(self._returned), device=device),
            )
            self.engine.forward(ids, positions, self.cache, width)
            self._returned = []
        rows = self._batch
        tokens, writes, places = [0] * rows, [self.tokens - 1] * rows, [0] * rows
        for row, job in self.live.items():
            place = self._place[row]
            tokens[place] = job.tokens[job.fed]
            writes[place] = places[place] = len(self.run.prompts[job.prompt].tokens) + job.fed
        width = self._width(max(places))
        self.cache.select(torch.tensor(writes, device=device)[:, None], width)
        return self.engine.forward(
            torch.tensor(tokens, device=device)[:, None],
            torch.tensor(places, device=device)[:, None],
            self.cache,
            width,
        )

    def _width(self, last: int) -> int:
        return (
            self.tokens
            if self.engine.fixed_shape
            else min(self.tokens, -(-(last + 1) // _WIDTH) * _WIDTH)
        )
