"""One rollout on its way: which job takes which row, one token a step, until all have ended."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from projects.infinite_sampling.cache import token_bytes
from projects.infinite_sampling.fixed_rows import FixedRows
from projects.infinite_sampling.jobs import Job, Prompt
from projects.infinite_sampling.paged_rows import PagedRows
from projects.infinite_sampling.rollout import Completion, Prefixes, Rollout, Schedule, Stats
from projects.infinite_sampling.sampler import Sampler, prefix_features
from projects.infinite_sampling.scheduler import Queue
from projects.infinite_sampling.streams import draw, occurrences, stream
from shared.errors import UserError


class Run:
    """One rollout; `go` makes it. Arguments as `Engine.run` takes them, `pairs` being its jobs."""

    def __init__(
        self,
        engine: Sampler,
        prompts: Sequence[Sequence[int]],
        pairs: Sequence[tuple[int, int]],
        schedule: Schedule,
        on_completion: Callable[[Completion], object],
        on_step: Callable[[Stats], object],
        limits: Mapping[tuple[int, int], int],
    ):
        self.engine, self.schedule, self.on_completion, self.on_step = (
            engine,
            schedule,
            on_completion,
            on_step,
        )
        self.prompts = [Prompt(list(map(int, tokens)), 0) for tokens in prompts]
        self.jobs = []
        before = occurrences([prompt.tokens for prompt in self.prompts])
        for number, (prompt, index) in enumerate(pairs):
            uniforms = stream(
                engine.seed,
                self.prompts[prompt].tokens,
                index,
                engine.max_new_tokens,
                before[prompt],
            ).tolist()
            limit = min(limits.get((prompt, index), engine.max_new_tokens), engine.max_new_tokens)
            self.jobs.append(Job(number, prompt, index, uniforms, limit))
            self.prompts[prompt].jobs += 1
        self.unread = {prompt for prompt, _ in pairs}  # prompts, by number
        self.stats = Stats()
        self.longest = (
            max(len(self.prompts[prompt].tokens) for prompt, _ in pairs) + engine.max_new_tokens
        )
        self.slots = len(pairs) if schedule.mode == "full" else min(schedule.slots, len(pairs))
        self.states: Tensor | None = None
        self.rows: FixedRows | PagedRows | None = None

    @torch.no_grad()
    def go(self) -> Rollout:
        schedule, jobs = self.schedule, self.jobs
        began = time.process_time()
        with self._hidden_states():
            predicted: Sequence[float] = [0.0] * len(jobs)
            if schedule.prefix:
                order = Queue(predicted, self.slots)
                self._decode(jobs, order, schedule.prefix, barrier=schedule.mode != "dynamic")
                self.stats.prefix_steps = self.stats.steps
                jobs = [job for job in jobs if job.finish is None]
                predicted = [0.0] * len(jobs)
            if schedule.predictor is not None and jobs:
                start = time.process_time()
                predicted = _usable(
                    schedule.predictor.predict(self._prefixes(jobs)), self.engine.max_new_tokens
                )
                self.stats.predict_seconds = time.process_time() - start
            start = time.process_time()
            # Of tokens that remain, the first of all takes no step.
            durations = (
                predicted if schedule.prefix else [max(0.0, value - 1) for value in predicted]
            )
            order = Queue(durations, self.slots, schedule.refill, schedule.eps)
            self.stats.plan_seconds, self.stats.plan = time.process_time() - start, order.plan
            remaining = (
                {job.number: round(left) for job, left in zip(jobs, predicted, strict=True)}
                if schedule.predictor is not None
                else {}
            )
            self._decode(
                jobs, order, None, barrier=schedule.mode in ("full", "micro"), remaining=remaining
            )
        done = []
        for job in self.jobs:
            assert job.finish is not None
            done.append(Completion(job.prompt, job.index, job.tokens, job.logprobs, job.finish))
        self.stats.tokens = sum(len(one.tokens) for one in done)
        self.stats.seconds = time.process_time() - began
        return Rollout(done, self.stats)

    # ---- the loop ----

    def _decode(
        self,
        jobs: list[Job],
        queue: Queue,
        limit: int | None,
        barrier: bool,
        remaining: dict[int, int] | None = None,
    ) -> None:
        """Decode jobs until each has ended or has `limit` tokens."""
        self._read_ahead(queue, jobs, self.slots)
        rows = self._storage()
        # dynamic rows only: jobs that lost their row, and at most one that found none
        aside: deque[Job] = deque()
        totals = {
            number: left + (self.schedule.prefix or 0) for number, left in (remaining or {}).items()
        }
        while queue.waiting or aside or rows.live:
            if not (barrier and rows.live):
                self._read_ahead(queue, jobs, rows.room())
                for row in rows.vacant():
                    full = False
                    while (
                        job := aside.popleft() if aside else self._next(queue, jobs, row)
                    ) is not None:
                        self._begin(job)
                        if self._settled(job, limit):
                            self._leave(job)
                            if barrier:
                                break
                            continue
                        full = not rows.admit(row, job, totals)
                        if full:
                            aside.appendleft(job)
                        break
                    if full:
                        break
            if rows.live:
                for job in rows.make_room():
                    self.stats.preemptions += 1
                    self._span(job)
                    aside.appendleft(job)
                if not queue.waiting:
                    rows.drop_empty()
                self._step(rows, limit)

    def _next(self, queue: Queue, jobs: list[Job], row: int) -> Job | None:
        number = queue.take(row % self.slots)
        return None if number is None else jobs[number]

    def _begin(self, job: Job) -> None:
        """Make sure that a job's prompt has been read and its first token drawn, with those of its
        group.
        """
        prompt = self._read(job.prompt)
        if not job.tokens:
            assert prompt.logits is not None
            group = [one for one in self.jobs if one.prompt == job.prompt]
            # a vocabulary of 150,000 in float64 is large; no more rows than steps have
            for start in range(0, len(group), self.slots):
                part = group[start : start + self.slots]
                hidden = None if prompt.hidden is None else prompt.hidden.expand(len(part), -1)
                self._append(part, prompt.logits.expand(len(part), -1), hidden)

    def _step(self, rows: FixedRows | PagedRows, limit: int | None) -> None:
        live = rows.live
        logits = rows.forward()
        self.stats.steps += 1
        self.stats.busy += len(live)
        self.stats.rows += rows.count
        sampled = []
        for row, job in live.items():
            job.fed += 1
            if job.fed == len(job.tokens):
                sampled.append((row, job))
        if sampled:
            chosen = [row for row, _ in sampled]
            at = rows.places(chosen)
            self._append(
                [job for _, job in sampled],
                logits[at],
                None if self.states is None else self.states[at, -1],
            )
        for row, job in sampled:
            if self._settled(job, limit):
                self._span(job, row)
                rows.release(row)
                self._leave(job)
        self.on_step(self.stats)

    def _append(self, jobs: list[Job], logits: Tensor, hidden: Tensor | None) -> None:
        """Draw a token for each job from its row of `logits`."""
        engine = self.engine
        uniforms = torch.tensor(
            [job.uniforms[len(job.tokens)] for job in jobs],
            dtype=torch.float64,
            device=engine.device,
        )
        tokens, logprobs = draw(logits, uniforms, engine.temperature, engine.top_k, engine.top_p)
        if not logprobs.isfinite().all():
            place = int((~logprobs.isfinite()).int().argmax())
            raise UserError(
                f"{type(engine.model).__name__} gives logits that are not finite, for token"
                f" {len(jobs[place].tokens) + 1} of completion {jobs[place].index} of prompt"
                f" {jobs[place].prompt + 1}; its weights are broken, or {engine.model.dtype} is too"
                " narrow for them"
            )
        for place, (job, token, logprob) in enumerate(
            zip(jobs, tokens.tolist(), logprobs.tolist(), strict=True)
        ):
            job.tokens.append(token)
            job.logprobs.append(logprob)
            job.finish = engine.ended(job.tokens, job.limit)
            if hidden is not None and len(job.tokens) == max(1, self.schedule.prefix):
                job.hidden = hidden[place].clone()

    def _settled(self, job: Job, limit: int | None) -> bool:
        return job.finish is not None or (limit is not None and len(job.tokens) >= limit)

    def _leave(self, job: Job) -> None:
        """A job without a row: it has ended, or is put aside until there is a plan."""
        job.fed = 0
        if job.finish is None:
            return
        prompt = self.prompts[job.prompt]
        prompt.jobs -= 1
        if prompt.jobs == 0:
            assert self.rows is not None
            self.rows.forget(prompt)
            prompt.prefix, prompt.logits, prompt.hidden = None, None, None
        self.on_completion(Completion(job.prompt, job.index, job.tokens, job.logprobs, job.finish))

    def _span(self, job: Job, row: int = -1) -> None:
        if row >= 0 and self.stats.steps > job.since:
            self.stats.spans.append((row, job.number, job.since, self.stats.steps))

    # ---- prompts ----

    def _read(self, number: int) -> Prompt:
        """A prompt whose keys and values are there: read once for the whole group."""
        if number in self.unread:
            self._read_all([number])
        return self.prompts[number]

    def _read_ahead(self, queue: Queue, jobs: list[Job], rows: int) -> None:
        """Read the prompts of the jobs that as many free rows would take, and no more: they take
        memory until their groups are done.
        """
        if self.unread and rows:
            ahead = dict.fromkeys(jobs[number].prompt for number in queue.ahead(rows))
            self._read_all([number for number in ahead if number in self.unread])

    def _read_all(self, unread: list[int]) -> None:
        """Read prompts that have not been, several in a forward."""
        self.unread.difference_update(unread)
        while unread:
            count = self.engine.together([self.prompts[n].tokens for n in unread])
            part, unread = [self.prompts[n] for n in unread[:count]], unread[count:]
            logits, prefixes, at = self.engine.prefill([prompt.tokens for prompt in part])
            for row, prompt in enumerate(part):
                prompt.logits, prompt.prefix = logits[row : row + 1], prefixes[row]
                if self.states is not None:
                    prompt.hidden = self.states[row : row + 1, at[row]]
            self.stats.prefills += 1
            for prompt in part:
                if self.rows is not None:
                    self.rows.learn(prompt)

    def known(self, jobs: list[Job]) -> tuple[Tensor, Tensor, Tensor]:
        """What jobs that had been put aside must be fed before they can go on, all of them in one
        forward: token ids, positions and whether a place is padding, each [jobs, tokens]. The last
        token of each is left to the step.
        """
        device = self.engine.device
        longest = max(len(job.tokens) for job in jobs) - 1
        ids = torch.tensor(
            [(job.tokens[:-1] + [0] * longest)[:longest] for job in jobs], device=device
        )
        pad = torch.arange(longest, device=device) >= torch.tensor(
            [[len(job.tokens) - 1] for job in jobs], device=device
        )
        starts = torch.tensor(
            [[len(self.prompts[job.prompt].tokens)] for job in jobs], device=device
        )
        for job in jobs:
            job.fed = len(job.tokens) - 1
            self.stats.reingested_tokens += job.fed
        self.stats.reingests += 1
        return ids, (starts + torch.arange(longest, device=device)).masked_fill(pad, 0), pad

    def note_prompts(self) -> None:
        """Keep the most bytes that prompts have taken beside the cache."""
        held = [
            tensor for prompt in self.prompts for pair in prompt.prefix or () for tensor in pair
        ]
        self.stats.prompt_bytes = max(
            self.stats.prompt_bytes, sum(x.numel() * x.element_size() for x in held)
        )

    def _storage(self) -> FixedRows | PagedRows:
        if self.rows is None:
            first = self._read(self.jobs[0].prompt)
            assert first.prefix is not None
            self.stats.token_bytes = token_bytes(first.prefix)
            self.rows = (PagedRows if self.schedule.mode == "dynamic" else FixedRows)(
                self, first.prefix
            )
            self.stats.cache_bytes = self.rows.cache.nbytes()
            self.rows.learn(first)
        return self.rows

    # ---- prediction ----

    @contextmanager
    def _hidden_states(self) -> Iterator[None]:
        """Inside, `self.states` [rows, tokens, hidden size] are those from which the last forward
        made logits, where a predictor wants them.
        """
        if self.schedule.predictor is None or not self.schedule.predictor.needs_hidden:
            yield
            return

        def look(module: Any, inputs: tuple[Tensor, ...]) -> None:
            self.states = inputs[0]

        hook = self.engine.model.get_output_embeddings().register_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def _prefixes(self, jobs: list[Job]) -> Prefixes:
        """What a predictor may look at: the prompt and the first `prefix` tokens."""
        prefix = self.schedule.prefix
        hidden = None
        assert self.schedule.predictor is not None
        if self.schedule.predictor.needs_hidden:
            if not prefix:
                for job in jobs:
                    job.hidden = self._read(job.prompt).hidden[0]  # type: ignore[index]
            states = torch.stack([job.hidden for job in jobs])  # type: ignore[misc]
            last = [
                job.tokens[-1] if prefix else self.prompts[job.prompt].tokens[-1] for job in jobs
            ]
            hidden = prefix_features(self.engine.model, states, last)
        tokens = [job.tokens[:prefix] for job in jobs]
        return Prefixes(
            [self.prompts[job.prompt].tokens for job in jobs],
            tokens,
            [(job.prompt, job.index) for job in jobs],
            hidden,
        )


def _usable(predicted: Sequence[float], most: int) -> list[float]:
    """Predictions of what remains, in tokens, between 0 and `most`; NaN counts as the mean of the
    others. A wrong prediction costs steps, whatever it is.
    """
    values = np.asarray(predicted, dtype=np.float64)
    known = values[~np.isnan(values)]
    clipped: list[float] = np.clip(
        np.where(np.isnan(values), known.clip(0, most).mean() if len(known) else 1.0, values),
        0,
        most,
    ).tolist()
    return clipped
