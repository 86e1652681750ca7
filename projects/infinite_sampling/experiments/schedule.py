"""Table 2, figures 1 and 2: decoding steps, occupancy and throughput by schedule, against the lower bound and against transformers.

Each prompt's group is decoded live under every schedule, and replayed from its lengths: the steps must be the same.
"""

from typing import Any, Literal

from pydantic import Field

from projects.infinite_sampling import peers
from projects.infinite_sampling.experiments import _common
from projects.infinite_sampling.predictor import BinnedTransformer, Oracle, examples
from projects.infinite_sampling.scheduler import Queue, lower_bound, replay, replay_framework
from shared import experiment, meters

PEERS = {"generate, full group": peers.generate, "generate, chunks": peers.generate, "generate_batch": peers.generate_batch}
Peer = Literal["generate, full group", "generate, chunks", "generate_batch"]


class Config(experiment.Config):
    """`fit_prompts` x `fit_group` other completions are what the predictor learns from; it sees `prefix` tokens."""

    model: str = "policy"
    train_steps: int = Field(default=600, ge=1)
    prompts: int = Field(default=8, ge=1)
    prompts_file: str | None = None
    group: int = Field(default=32, ge=2)
    slots: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=56, ge=2)
    prefix: int = Field(default=1, ge=0)
    fit_prompts: int = Field(default=60, ge=1)
    fit_group: int = Field(default=16, ge=1)
    repeats: int = Field(default=6, ge=1)
    timed: list[str] = ["full group", "micro groups", "continuous, FIFO", "framework (predicted)", "plan (oracle)", "dynamic slots"]
    peers: list[Peer] = ["generate, full group", "generate, chunks", "generate_batch"]
    only: list[str] = Field(default=[], description="schedules to run; none: all")
    device: Literal["cpu", "cuda"] = "cpu"


def run(config: Config, run: experiment.Run) -> None:
    subject = _common.subject(
        config.model,
        config.prompts + config.fit_prompts,
        config.seed,
        limit=config.max_new_tokens,
        train_steps=config.train_steps,
        run=run,
        device=config.device,
        group=max(config.group, config.fit_group),
        file=config.prompts_file,
    )
    engine = subject.engine(config.seed)
    tested = range(config.prompts)
    learnt: Any = BinnedTransformer(subject.vocabulary, seed=config.seed)
    fitted = [(p, i) for p in range(config.prompts, len(subject.prompts)) for i in range(config.fit_group)]
    schedule = _common.Schedule("continuous", 4 * config.slots)
    made = engine.run(subject.prompts, fitted, schedule, limits=subject.forced).completions
    learnt.fit(examples(subject.prompts, made, config.prefix))
    recorder = _common.Recorder(learnt)
    truth: dict[tuple[int, int], int] = {}
    wanted = {
        name: one
        for name, one in _common.schedules(config.slots, config.prefix, recorder, Oracle(truth)).items()
        if not config.only or name in config.only or name == "micro groups"
    }
    common = {"model": config.model, "group": config.group, "slots": config.slots}

    for prompt in run.progress(tested, "prompts"):
        jobs = [(prompt, index) for index in range(config.group)]
        reference: list[list[int]] | None = None
        for name in ["micro groups", *(other for other in wanted if other != "micro groups")]:
            rollout = engine.run(subject.prompts, jobs, wanted[name], limits=subject.forced)
            tokens = [c.tokens for c in rollout.completions]
            truth.update({(c.prompt, c.index): len(c.tokens) for c in rollout.completions})
            reference = reference or tokens
            durations = [len(one) - 1 for one in tokens]
            stats = rollout.stats
            run.row(
                kind="rollout",
                **common,
                schedule=name,
                prompt=prompt,
                tokens=stats.tokens,
                longest=max(durations) + 1,
                truncated=sum(c.finish == "length" for c in rollout.completions),
                same=sum(a == b for a, b in zip(tokens, reference, strict=True)),
                steps=stats.steps,
                replayed=_replayed(wanted[name], durations, config, recorder.said, prompt),
                lower_bound=lower_bound(durations, config.slots),
                reingests=stats.reingests,
                prefills=stats.prefills,
                occupancy_share=stats.occupancy,
                kv_bytes=stats.kv_bytes,
                plan=stats.plan.status if stats.plan else None,
                plan_seconds=stats.plan_seconds,
                predict_seconds=stats.predict_seconds,
                rollout_seconds=stats.seconds,
            )
            if prompt == 0 and name != "dynamic slots":
                for row, job, first, last in stats.spans:
                    run.row(kind="span", **common, schedule=name, slot=row, completion=job, first=first, last=last)

    produced: dict[str, list[int]] = {}
    variants = {name: _ours(engine, subject, one, config, produced, name) for name, one in wanted.items() if name in config.timed}
    variants |= {name: _theirs(subject, name, config, produced) for name in config.peers}
    timings = meters.interleave(
        variants, config.repeats, clock=_common.clock_of(config.device), progress=lambda total: run.progress(total, "rounds")
    )
    for name, timing in timings.items():
        for repeat, (seconds, tokens) in enumerate(zip(timing.seconds, produced[name][-config.repeats :], strict=True)):
            run.row(
                kind="time", **common, schedule=name, repeat=repeat, tokens=tokens, pass_seconds=seconds, tokens_per_second=tokens / seconds
            )


def _replayed(schedule: Any, durations: list[int], config: Config, said: dict[tuple[int, int], float], prompt: int) -> int | None:
    """Steps from the lengths alone."""
    lengths = [d + 1 for d in durations]
    if schedule.mode == "dynamic":
        return None
    if schedule.prefix:
        found, _ = replay_framework(lengths, config.slots, schedule.prefix, lambda jobs: [said[prompt, j] for j in jobs], schedule.refill)
        return found.steps
    slots = len(durations) if schedule.mode == "full" else config.slots
    return replay(durations, slots, Queue(durations, slots, schedule.refill), barrier=schedule.mode != "continuous").steps


def _ours(engine: Any, subject: Any, schedule: Any, config: Config, produced: dict[str, list[int]], name: str) -> Any:
    def once() -> None:
        tokens = 0
        for prompt in range(config.prompts):
            jobs = [(prompt, index) for index in range(config.group)]
            tokens += engine.run(subject.prompts, jobs, schedule, limits=subject.forced).stats.tokens
        produced.setdefault(name, []).append(tokens)

    return once


def _theirs(subject: Any, name: str, config: Config, produced: dict[str, list[int]]) -> Any:
    rows = config.group if name == "generate, full group" else config.slots
    # Continuous batching is slow enough for one prompt to do.
    prompts = range(1 if name == "generate_batch" else config.prompts)

    def once() -> None:
        eos = subject.eos[0] if subject.eos else -1
        lengths = [PEERS[name](subject.model, subject.prompts[p], config.group, rows, subject.limit, eos, config.seed + p) for p in prompts]
        produced.setdefault(name, []).append(sum(map(sum, lengths)))

    return once
