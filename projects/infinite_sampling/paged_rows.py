"""Dynamic rows in a pool of pages: as many as fit a budget of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from projects.infinite_sampling.cache import PagedCache, Prefix
from projects.infinite_sampling.jobs import Job, Prompt, RowsOwner
from shared.errors import UserError


@dataclass
class _Row:
    job: Job
    pages: list[int]
    total: int | None  # tokens it is predicted to have, prompt included


class PagedRows:
    """Dynamic rows in a pool of pages. The prompt's whole pages are shared; what does not fill one
    is copied.
    """

    def __init__(self, run: RowsOwner, shapes: Prefix) -> None:
        self.run, self.engine, self.page = run, run.engine, run.schedule.page
        if self.engine.fixed_shape:
            raise UserError("fixed shapes need fixed slots; dynamic rows come and go")
        budget = run.schedule.budget_tokens or run.slots * run.longest
        pages, least = budget // self.page, self._pages(run.longest)
        if pages < least:
            raise UserError(
                f"a budget of {budget} tokens is too small for one row: a prompt and"
                f" {self.engine.max_new_tokens} new tokens take {least * self.page}"
            )
        self.cache = PagedCache(shapes, pages, self.page)
        self._rows: dict[int, _Row] = {}  # in the order in which they were admitted
        self._batch: dict[int, int] = {}  # row -> its place in the last forward
        self._returned: list[int] = []  # rows whose jobs had been put aside
        self._next = 0
        self.count = 0

    @property
    def live(self) -> dict[int, Job]:
        return {number: row.job for number, row in self._rows.items()}

    def learn(self, prompt: Prompt) -> None:
        """Its pages are taken when its first row is admitted."""
        self.run.note_prompts()

    def forget(self, prompt: Prompt) -> None:
        self.cache.release(prompt.pages)
        prompt.pages = []

    def vacant(self) -> Iterator[int]:
        """Numbers for new rows, one after another as long as they are taken."""
        while True:
            offered = self._next
            yield offered
            if self._next == offered:
                return

    def admit(self, row: int, job: Job, totals: dict[int, int]) -> bool:
        """Give a job a row if its tokens fit now, beside what live rows are predicted to need and
        at least a page more for each.
        """
        prompt = self.run.prompts[job.prompt]
        assert prompt.prefix is not None
        tokens, known = len(prompt.tokens), job.tokens[:-1]
        whole = tokens // self.page
        total = min(tokens + totals[job.number], self.run.longest) if job.number in totals else None

        def fits() -> bool:
            now = self._pages(tokens + len(known) + 1) - (whole if prompt.pages else 0)
            ahead = max(0, self._pages(total or 0) - self._pages(tokens + len(known) + 1))
            reserve = (
                max(ahead + sum(map(self._ahead, self._rows.values())), len(self._rows))
                if self._rows
                else 0
            )
            return now + reserve <= len(self.cache.free)

        if not fits() and not (self._drop_unused(prompt) and fits()):
            assert self._rows, "a budget that holds one row always has room for the first"
            return False
        if whole and not prompt.pages:
            prompt.pages = self._taken(whole)
            self.cache.write(
                prompt.pages,
                [
                    (k[:, :, : whole * self.page], v[:, :, : whole * self.page])
                    for k, v in prompt.prefix
                ],
            )
        own = self._taken(self._pages(tokens + len(known) + 1) - whole)
        if tokens % self.page:
            self.cache.write(own[:1], prompt.prefix, whole * self.page)
        self.cache.share(prompt.pages)
        self._rows[row] = _Row(job, prompt.pages + own, total)
        self._next = row + 1
        if known:
            self._returned.append(row)
        job.since = self.run.stats.steps
        return True

    def make_room(self) -> list[Job]:
        """A page for each row whose next token needs one. Where there is none the youngest row
        loses its own; returns the losers' jobs.
        """
        lost: list[Job] = []
        for number in list(self._rows):
            while number in self._rows and self._pages(
                self._position(self._rows[number]) + 1
            ) > len(self._rows[number].pages):
                page = self.cache.take()
                if page is not None:
                    self._rows[number].pages.append(page)
                elif not self._drop_unused(None):
                    youngest = next(reversed(self._rows))
                    job = self._rows[youngest].job
                    self.release(youngest)
                    job.fed = 0
                    lost.append(job)
        return lost

    def room(self) -> int:
        return len(self.cache.free) // self._pages(self.run.longest)

    def drop_empty(self) -> None:
        """There are none."""

    def places(self, rows: list[int]) -> list[int]:
        return [self._batch[row] for row in rows]

    def release(self, row: int) -> None:
        self.cache.release(self._rows.pop(row).pages)
        if row in self._returned:
            self._returned.remove(row)

    def forward(self) -> Tensor:
        if self._returned:
            returned = [self._rows[row] for row in self._returned]
            ids, positions, pad = self.run.known([row.job for row in returned])
            self._select(returned, positions, pad)
            self.engine.forward(ids, positions, self.cache, self.cache.width)
            self._returned = []
        rows = list(self._rows.values())
        self._batch = {number: place for place, number in enumerate(self._rows)}
        self.count = len(rows)
        positions = torch.tensor([[self._position(row)] for row in rows], device=self.engine.device)
        self._select(rows, positions)
        ids = torch.tensor(
            [[row.job.tokens[row.job.fed]] for row in rows], device=self.engine.device
        )
        return self.engine.forward(ids, positions, self.cache, self.cache.width)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def _position(self, row: _Row) -> int:
        return len(self.run.prompts[row.job.prompt].tokens) + max(
            row.job.fed, len(row.job.tokens) - 1
        )

    def _ahead(self, row: _Row) -> int:
        """Pages a row is predicted to need yet."""
        return max(0, self._pages(row.total) - len(row.pages)) if row.total is not None else 0

    def _taken(self, pages: int) -> list[int]:
        return [page for _ in range(pages) if (page := self.cache.take()) is not None]

    def _drop_unused(self, but: Prompt | None) -> bool:
        """Free the pages of prompts that no row is using; whether there were any. They are written
        again when one does.
        """
        used = {row.job.prompt for row in self._rows.values()}
        found = False
        for number, prompt in enumerate(self.run.prompts):
            if prompt.pages and number not in used and prompt is not but:
                self.forget(prompt)
                found = True
        return found

    def _select(self, rows: list[_Row], positions: Tensor, pad: Tensor | None = None) -> None:
        """The next forward is about these rows, whose new tokens stand at `positions` [rows, new]
        but for padding.
        """
        longest = int(positions.max()) // self.page + 1
        tables = torch.tensor(
            [(row.pages + [self.cache.pages] * longest)[:longest] for row in rows],
            device=self.engine.device,
        )
        offsets = torch.arange(self.page, device=self.engine.device)
        reads = (tables[:, :, None] * self.page + offsets).flatten(1)
        writes = reads.gather(1, positions)
        self.cache.select(
            reads, writes if pad is None else writes.masked_fill(pad, self.cache.scratch)
        )
