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
        # the prompt whose keys and values lie in each slot
        self._holds: list[int | None] = [None] * self.count

    def learn(self, prompt: Prompt) -> None:
        self.run.note_prompts()

    def forget(self, prompt: Prompt) -> None:
        pass

    def vacant(self) -> list[int]:
        return [row for row in range(self.count) if row not in self.live]

    def admit(self, row: int, job: Job, totals: dict[int, int]) -> bool:
        prompt = self.run.prompts[job.prompt]
        if self._holds[row] != job.prompt:
            assert prompt.prefix is not None
            self.cache.load(row, prompt.prefix)
            self._holds[row] = job.prompt
        if len(job.tokens) > 1 and not self.engine.fixed_shape:
            self._returned.append(row)
        job.since = self.run.stats.steps
        self.live[row] = job
        return True

    def make_room(self) -> list[Job]:
        return []

    def places(self, rows: list[int]) -> list[int]:
        return rows

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
                torch.tensor(self._returned, device=device),
            )
            self.engine.forward(ids, positions, self.cache, width)
            self._returned = []
        tokens, writes, places = [0] * self.count, [self.tokens - 1] * self.count, [0] * self.count
        for row, job in self.live.items():
            tokens[row] = job.tokens[job.fed]
            writes[row] = places[row] = len(self.run.prompts[job.prompt].tokens) + job.fed
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
