"""The rollout engine: a group of completions per prompt, decoded in few rows of key-value cache, on
any decoder of transformers.

Completions of prompts are *jobs*. A schedule says how many rows there are and which job takes a row
that is free:

| mode | rows | refill |
| --- | --- | --- |
| `full` | one per job | never: the whole group at once |
| `micro` | `slots` | when all rows are done: the paper's micro sampling groups |
| `continuous` | `slots` | at once: the paper's continuous sampling, with fixed slots |
| `dynamic` | what fits `budget_tokens` of cache | with free pages; else the youngest row waits |

With `prefix` > 0 all jobs first generate that many tokens in rounds, then a predictor says what
remains of each, and the rest is decoded by a plan: the paper's full framework. A job that was put
aside keeps its tokens and gives up its cache; taken up again, its tokens are fed in one forward
(`reingests`), so that memory is that of micro groups. Nothing is ever cut short.

One *step* is one forward of all rows with one token each. The first token of a completion takes
none: it is drawn from the logits of the prompt's last token, which one forward per prompt gives
once for its whole group.

`fixed_shape` makes every forward of a rollout one of [slots, 1] tokens that sees the whole width of
the cache, tokens of a job that was put aside included: then float32 gives the same completions
under any schedule with as many slots. Otherwise a row of another batch size may differ in the last
bit and, seldom, tip a draw.
"""

import inspect
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from projects.infinite_sampling.cache import PagedCache, Prefix, SlotCache, token_bytes
from projects.infinite_sampling.scheduler import Plan, Queue, Refill
from projects.infinite_sampling.streams import draw, stream
from shared.errors import UserError

Mode = Literal["full", "micro", "continuous", "dynamic"]
Finish = Literal["eos", "stop", "length"]
_WIDTH = 64  # rows see their cache in multiples of this many tokens
# tokens decoded beyond the longest stop string's bytes, for what a tokenizer strips
_STOP_MARGIN = 8


class Predictor(Protocol):
    """What the engine asks of a predictor of lengths (`predictor.py` has some)."""

    needs_hidden: bool

    def predict(self, prefixes: "Prefixes") -> np.ndarray:
        """The tokens that remain of each unfinished completion, float64 [jobs]."""


@dataclass(frozen=True)
class Prefixes:
    """The beginnings of unfinished completions.

    Attributes:
        prompts: each one's prompt, tokens.
        tokens: the first k tokens of each.
        jobs: (prompt, index) of each.
        hidden: [jobs, features], the state that produced the k-th token beside that token's
            embedding; or None.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    jobs: list[tuple[int, int]]
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Schedule:
    """How a rollout is decoded. It changes steps, seconds and bytes, and no completion.

    Attributes:
        mode: see above.
        slots: rows of the cache. More than there are jobs are not made.
        refill: see `scheduler.Queue`; with `dynamic` one without a plan.
        prefix: tokens generated before lengths are predicted.
        predictor: of lengths. Without one, refills by length have nothing to go by and keep the
            order.
        eps: of the plan.
        budget_tokens: of `dynamic`, tokens of cache in all; None: as many as `slots` fixed rows
            would have.
        page: of `dynamic`, tokens in a page.
    """

    mode: Mode = "continuous"
    slots: int = 8
    refill: Refill = "fifo"
    prefix: int = 0
    predictor: Predictor | None = None
    eps: float = 0.1
    budget_tokens: int | None = None
    page: int = 16

    def __post_init__(self) -> None:
        if self.slots < 1 or self.page < 1 or self.prefix < 0:
            raise ValueError("slots and page must be at least 1, prefix at least 0")
        if self.prefix and self.mode in ("full", "micro"):
            raise ValueError(f"mode {self.mode} has no prefix phase")
        if self.mode == "dynamic" and self.refill.startswith("plan_"):
            raise ValueError(
                "dynamic rows have no planned queues; use fifo, sjf_global or lpt_global"
            )


@dataclass(frozen=True)
class Completion:
    """One sampled completion: `tokens` (the end token included, if it came), their
    log-probabilities, and why it ended.
    """

    prompt: int
    index: int
    tokens: list[int]
    logprobs: list[float]
    finish: Finish


@dataclass
class Stats:
    """What a rollout took.

    Attributes:
        steps: forwards of all rows, one token each; `prefix_steps` of them before the plan.
        busy: rows with a job, summed over steps; `rows`: rows, summed over steps.
        prefills: forwards of a prompt. reingests: forwards of tokens of jobs that had been put
            aside, `reingested_tokens` in all.
        preemptions: jobs that lost their row for want of a page.
        cache_bytes: the cache that was allocated; prompt_bytes: the most that prompts' keys and
            values took beside it, at any one time.
        token_bytes: keys and values of a token.
        plan: of the refill, if it has one. plan_seconds, predict_seconds, seconds: process time
            (CPU) of the plan, of predicting, of all.
        spans: (row, job, first step, step after its last), job by its number in the rollout.
    """

    steps: int = 0
    prefix_steps: int = 0
    busy: int = 0
    rows: int = 0
    prefills: int = 0
    reingests: int = 0
    reingested_tokens: int = 0
    preemptions: int = 0
    cache_bytes: int = 0
    prompt_bytes: int = 0
    token_bytes: int = 0
    tokens: int = 0
    plan: Plan | None = None
    plan_seconds: float = 0.0
    predict_seconds: float = 0.0
    seconds: float = 0.0
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def kv_bytes(self) -> int:
        """The peak of keys and values."""
        return self.cache_bytes + self.prompt_bytes

    @property
    def occupancy(self) -> float:
        """The share of row-steps that had a job."""
        return self.busy / self.rows if self.rows else 1.0


@dataclass(frozen=True)
class Rollout:
    """Completions in the order of the jobs, and what they took."""

    completions: list[Completion]
    stats: Stats


@dataclass
class _Job:
    number: int
    prompt: int
    index: int
    uniforms: list[float]
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    fed: int = 0  # of its tokens, how many have their keys and values in the row
    finish: Finish | None = None
    hidden: Tensor | None = None
    since: int = 0  # the step at which it took its row


@dataclass
class _Prompt:
    tokens: list[int]
    jobs: int  # that are not finished
    logits: Tensor | None = None  # [1, vocabulary]
    hidden: Tensor | None = None
    prefix: Prefix | None = None  # all of it, or (paged) what does not fill a page
    pages: list[int] = field(default_factory=list)


class Engine:
    """Samples completions from a model.

    Args:
        model: a decoder of transformers with sdpa or eager attention that looks at all earlier
            tokens, in eval mode.
        eos: tokens that end a completion.
        max_new_tokens: tokens of a completion at most.
        temperature: of the softmax; 0 takes the likeliest token.
        seed: of the streams of random numbers.
        stop: strings that end a completion once its text holds one; they need `tokenizer`.
        fixed_shape: see above.

    Raises:
        UserError: a model that this cannot drive.
    """

    def __init__(
        self,
        model: Any,
        eos: Collection[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        tokenizer: Any = None,
        fixed_shape: bool = False,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError("a completion needs at least 1 new token")
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        if "" in stop:
            raise UserError("an empty stop string would end every completion at once")
        _check_model(model)
        self.model, self.eos, self.max_new_tokens = model, frozenset(eos), max_new_tokens
        self.temperature, self.seed, self.fixed_shape = temperature, seed, fixed_shape
        self.stop, self.tokenizer = tuple(stop), tokenizer
        self.device = next(model.parameters()).device
        self.context = getattr(model.config, "max_position_embeddings", None)
        # which adds its mask, where sdpa takes true and false
        self.additive = model.config._attn_implementation == "eager"
        self._keep = {"logits_to_keep": 1} if can_keep(model) else {}
        self._stop_window = (
            max((len(text.encode()) for text in self.stop), default=0) + _STOP_MARGIN
        )

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        group: int | Sequence[tuple[int, int]],
        schedule: Schedule,
        on_completion: Callable[[Completion], object] = lambda completion: None,
        on_step: Callable[[Stats], object] = lambda stats: None,
        limits: Mapping[tuple[int, int], int] | None = None,
    ) -> Rollout:
        """Sample `group` completions of each prompt, or the (prompt, index) pairs that `group`
        lists.

        Args:
            prompts: tokens of each.
            on_completion: called with each completion as it ends.
            on_step: called after each step.
            limits: tokens of some (prompt, index) at most, where fewer than `max_new_tokens`:
                forced lengths, for a model with random
            weights.

        Raises:
            UserError: an empty prompt, one too long for the model, a budget too small for a row.
        """
        pairs = (
            [(p, i) for p in range(len(prompts)) for i in range(group)]
            if isinstance(group, int)
            else list(group)
        )
        if not pairs:
            return Rollout([], Stats())
        for number, tokens in enumerate(prompts):
            if not len(tokens):
                raise UserError(
                    f"prompt {number + 1} is empty; a model needs at least one token to go on from"
                )
            if self.context is not None and len(tokens) + self.max_new_tokens > self.context:
                raise UserError(
                    f"prompt {number + 1} has {len(tokens)} tokens; with {self.max_new_tokens} new"
                    f" ones that is more than the model's context of {self.context}"
                )
        return _Run(self, prompts, pairs, schedule, on_completion, on_step, limits or {}).go()

    # ---- forwards ----

    def forward(self, ids: Tensor, positions: Tensor, cache: Any, width: int) -> Tensor:
        """Logits [rows, vocabulary] of the last of the tokens `ids` [rows, new], which stand at
        `positions` and see what is before them.
        """
        mask = torch.arange(width, device=self.device) <= positions[:, None, :, None]
        if self.additive:
            lowest = torch.finfo(self.model.dtype).min
            mask = torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device).masked_fill_(
                ~mask, lowest
            )
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self._keep,
        )
        return output.logits[:, -1]

    def prefill(self, tokens: Sequence[int]) -> tuple[Tensor, Prefix]:
        """Logits [1, vocabulary] after a prompt, and its keys and values."""
        cache = DynamicCache()
        ids = torch.tensor([list(tokens)], device=self.device)
        try:
            logits = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, **self._keep
            ).logits[:, -1]
            prefix = [(layer.keys, layer.values) for layer in cache.layers]
            if len(prefix) != self.model.config.get_text_config().num_hidden_layers or prefix[0][
                0
            ].shape[2] != len(tokens):
                raise AttributeError
        except (TypeError, AttributeError):
            raise UserError(
                f"{type(self.model).__name__} fills no key-value cache; rows cannot be decoded one"
                " token at a time"
            ) from None
        return logits, prefix

    def ended(self, tokens: list[int], limit: int) -> Finish | None:
        """Why a completion ends here, if it does."""
        if tokens[-1] in self.eos:
            return "eos"
        if self.stop:
            text = self.tokenizer.decode(tokens[-self._stop_window :])
            if any(stop in text for stop in self.stop):
                return "stop"
        return "length" if len(tokens) >= limit else None


def can_keep(model: Any) -> bool:
    """Whether the model can leave out logits that nobody asks for; PEFT hands on what it does not
    know.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _check_model(model: Any) -> None:
    """Refuse what rows at different positions would get wrong. Whether there is a cache at all
    shows in the first forward.
    """
    config, name = model.config, type(model).__name__
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder and a decoder; rollouts need a decoder alone")
    if model.training:
        raise UserError(
            f"{name} is in training mode, whose dropout would change completions; call model.eval()"
            " first"
        )
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(text, "sliding_window", None)):
        raise UserError(
            f"{name} has layers that do not look at all earlier tokens (a sliding window?), which"
            " rows of this cache do"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"attention '{config._attn_implementation}' takes no mask of rows at different"
            " positions; load the model with sdpa"
        )


class _Run:
    """One rollout."""

    def __init__(
        self,
        engine: Engine,
        prompts: Any,
        pairs: list[tuple[int, int]],
        schedule: Schedule,
        on_completion: Any,
        on_step: Any,
        limits: Any,
    ):
        self.engine, self.schedule, self.on_completion, self.on_step = (
            engine,
            schedule,
            on_completion,
            on_step,
        )
        self.prompts = [_Prompt(list(map(int, tokens)), 0) for tokens in prompts]
        self.jobs = []
        for number, (prompt, index) in enumerate(pairs):
            uniforms = stream(
                engine.seed, self.prompts[prompt].tokens, index, engine.max_new_tokens
            ).tolist()
            limit = min(limits.get((prompt, index), engine.max_new_tokens), engine.max_new_tokens)
            self.jobs.append(_Job(number, prompt, index, uniforms, limit))
            self.prompts[prompt].jobs += 1
        self.stats = Stats()
        self.longest = (
            max(len(self.prompts[prompt].tokens) for prompt, _ in pairs) + engine.max_new_tokens
        )
        self.slots = len(pairs) if schedule.mode == "full" else min(schedule.slots, len(pairs))
        self.hidden: Tensor | None = None
        self.rows: _Fixed | _Paged | None = None

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
                predicted = list(map(float, schedule.predictor.predict(self._prefixes(jobs))))
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
        jobs: list[_Job],
        queue: Queue,
        limit: int | None,
        barrier: bool,
        remaining: dict[int, int] | None = None,
    ) -> None:
        """Decode jobs until each has ended or has `limit` tokens."""
        rows = self._storage()
        # dynamic rows only: jobs that lost their row, and at most one that found none
        aside: deque[_Job] = deque()
        totals = {
            number: left + (self.schedule.prefix or 0) for number, left in (remaining or {}).items()
        }
        while queue.waiting or aside or rows.live:
            if not (barrier and rows.live):
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
                self._step(rows, limit)

    def _next(self, queue: Queue, jobs: list[_Job], row: int) -> _Job | None:
        number = queue.take(row % self.slots)
        return None if number is None else jobs[number]

    def _begin(self, job: _Job) -> None:
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

    def _step(self, rows: "_Fixed | _Paged", limit: int | None) -> None:
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
                None if self.hidden is None else self.hidden[at],
            )
        for row, job in sampled:
            if self._settled(job, limit):
                self._span(job, row)
                rows.release(row)
                self._leave(job)
        self.on_step(self.stats)

    def _append(self, jobs: list[_Job], logits: Tensor, hidden: Tensor | None) -> None:
        """Draw a token for each job from its row of `logits`."""
        engine = self.engine
        uniforms = torch.tensor(
            [job.uniforms[len(job.tokens)] for job in jobs],
            dtype=torch.float64,
            device=engine.device,
        )
        tokens, logprobs = draw(logits, uniforms, engine.temperature)
        for place, (job, token, logprob) in enumerate(
            zip(jobs, tokens.tolist(), logprobs.tolist(), strict=True)
        ):
            job.tokens.append(token)
            job.logprobs.append(logprob)
            job.finish = engine.ended(job.tokens, job.limit)
            if hidden is not None and len(job.tokens) == max(1, self.schedule.prefix):
                job.hidden = hidden[place].clone()

    def _settled(self, job: _Job, limit: int | None) -> bool:
        return job.finish is not None or (limit is not None and len(job.tokens) >= limit)

    def _leave(self, job: _Job) -> None:
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

    def _span(self, job: _Job, row: int = -1) -> None:
        if row >= 0 and self.stats.steps > job.since:
            self.stats.spans.append((row, job.number, job.since, self.stats.steps))

    # ---- prompts ----

    def _read(self, number: int) -> _Prompt:
        """A prompt whose keys and values are there: one forward for the whole group."""
        prompt = self.prompts[number]
        if prompt.logits is None:
            prompt.logits, prompt.prefix = self.engine.prefill(prompt.tokens)
            prompt.hidden = self.hidden
            self.stats.prefills += 1
            if self.rows is not None:
                self.rows.learn(prompt)
        return prompt

    def known(self, jobs: list[_Job]) -> tuple[Tensor, Tensor, Tensor]:
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

    def _storage(self) -> "_Fixed | _Paged":
        if self.rows is None:
            first = self._read(self.jobs[0].prompt)
            assert first.prefix is not None
            self.stats.token_bytes = token_bytes(first.prefix)
            self.rows = (_Paged if self.schedule.mode == "dynamic" else _Fixed)(self, first.prefix)
            self.stats.cache_bytes = self.rows.cache.nbytes()
            self.rows.learn(first)
        return self.rows

    # ---- prediction ----

    @contextmanager
    def _hidden_states(self) -> Iterator[None]:
        """Inside, `self.hidden` is the last hidden state of each row of the last forward, where a
        predictor wants it.
        """
        if self.schedule.predictor is None or not self.schedule.predictor.needs_hidden:
            yield
            return

        def look(module: Any, inputs: tuple[Tensor, ...]) -> None:
            self.hidden = inputs[0][:, -1]

        hook = self.engine.model.get_output_embeddings().register_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def _prefixes(self, jobs: list[_Job]) -> Prefixes:
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


def prefix_features(model: Any, states: Tensor, last: Sequence[int]) -> Tensor:
    """What a hidden-state predictor sees, float32 [jobs, 2 hidden size]: the state that produced
    the last token of the prefix, and that token's embedding. No forward of its own is needed for
    it.
    """
    embeddings = model.get_input_embeddings()(torch.tensor(list(last), device=states.device))
    return torch.cat([states.float(), embeddings.float()], -1).cpu()


class _Fixed:
    """Fixed slots. The prompt is copied into each."""

    def __init__(self, run: _Run, shapes: Prefix) -> None:
        self.run, self.engine = run, run.engine
        self.count, self.tokens = run.slots, run.longest
        self.cache = SlotCache(shapes, self.count, self.tokens)
        self.live: dict[int, _Job] = {}
        self._returned: list[int] = []  # rows whose jobs had been put aside
        # the prompt whose keys and values lie in each slot
        self._holds: list[int | None] = [None] * self.count

    def learn(self, prompt: _Prompt) -> None:
        self.run.note_prompts()

    def forget(self, prompt: _Prompt) -> None:
        pass

    def vacant(self) -> list[int]:
        return [row for row in range(self.count) if row not in self.live]

    def admit(self, row: int, job: _Job, totals: dict[int, int]) -> bool:
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

    def make_room(self) -> list[_Job]:
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


@dataclass
class _Row:
    job: _Job
    pages: list[int]
    total: int | None  # tokens it is predicted to have, prompt included


class _Paged:
    """Dynamic rows in a pool of pages. The prompt's whole pages are shared; what does not fill one
    is copied.
    """

    def __init__(self, run: _Run, shapes: Prefix) -> None:
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
    def live(self) -> dict[int, _Job]:
        return {number: row.job for number, row in self._rows.items()}

    def learn(self, prompt: _Prompt) -> None:
        """Its pages are taken when its first row is admitted."""
        self.run.note_prompts()

    def forget(self, prompt: _Prompt) -> None:
        self.cache.release(prompt.pages)
        prompt.pages = []

    def vacant(self) -> Iterator[int]:
        """Numbers for new rows, one after another as long as they are taken."""
        while True:
            offered = self._next
            yield offered
            if self._next == offered:
                return

    def admit(self, row: int, job: _Job, totals: dict[int, int]) -> bool:
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

    def make_room(self) -> list[_Job]:
        """A page for each row whose next token needs one. Where there is none the youngest row
        loses its own; returns the losers' jobs.
        """
        lost: list[_Job] = []
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

    def _drop_unused(self, but: _Prompt | None) -> bool:
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
