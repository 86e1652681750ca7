"""Table 2, figures 1 and 2: decoding steps, occupancy and throughput by schedule, against the lower
bound and against transformers.

Each prompt's group is decoded live under every schedule, and replayed from its lengths: the steps
must be the same. Where a model is slow, all but `live` prompts, and all but the schedules of
`only`, are decoded once and replayed.
"""

from typing import Any, Literal

from pydantic import Field

from projects.infinite_sampling import baselines, labels
from projects.infinite_sampling.experiments import common
from projects.infinite_sampling.predictor import BinnedTransformer, Oracle, examples
from projects.infinite_sampling.scheduler import (
    Queue,
    Replay,
    lower_bound,
    replay,
    replay_framework,
)
from shared import experiment, meters

PEERS = {
    labels.GENERATE_FULL: baselines.generate,
    labels.GENERATE_CHUNKS: baselines.generate,
    labels.GENERATE_BATCH: baselines.generate_batch,
}
Peer = Literal[labels.PEERS]  # type: ignore[valid-type]
ScheduleName = Literal[labels.SCHEDULES]  # type: ignore[valid-type]


class Config(experiment.Config):
    model: str
    """`policy`, random weights by a name of `common.RANDOM`, or a model by its name or folder"""
    prompts: int = Field(ge=1)
    """those whose groups are decoded"""
    prompts_file: str | None
    """a file of prompts for a model that is not the policy; null: short questions"""
    group: int = Field(ge=2)
    """completions of a prompt"""
    slots: int = Field(ge=1)
    """rows of cache"""
    max_new_tokens: int = Field(ge=2)
    """tokens of a completion at most"""
    prefix: int = Field(ge=0)
    """tokens of a completion that the predictor sees"""
    fit_prompts: int = Field(ge=1)
    """other prompts, whose completions the predictor learns from"""
    fit_group: int = Field(ge=1)
    """completions of each of them"""
    repeats: int = Field(ge=1)
    """rounds in which every schedule is timed once"""
    timed: list[ScheduleName]
    """schedules that are timed, where they run live"""
    peers: list[Peer]
    """ways of transformers to do the same, timed beside them"""
    only: list[ScheduleName]
    """schedules to run live beside micro groups; none: all"""
    live: int | None = Field(ge=1)
    """prompts to decode live, the rest is replayed; null: all"""
    warmup: int = Field(ge=0)
    """rounds before those that are timed"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where it runs"""


def run(config: Config, run: experiment.Run) -> None:
    subject = common.subject(
        config.model,
        config.prompts + config.fit_prompts,
        config.seed,
        limit=config.max_new_tokens,
        run=run,
        device=config.device,
        group=max(config.group, config.fit_group),
        file=config.prompts_file,
    )
    engine = subject.engine(config.seed)
    tested = range(config.prompts)
    learnt: Any = BinnedTransformer(subject.vocabulary, seed=config.seed)
    fitted = [
        (p, i) for p in range(config.prompts, len(subject.prompts)) for i in range(config.fit_group)
    ]
    schedule = common.Schedule("continuous", 4 * config.slots)
    made = engine.run(subject.prompts, fitted, schedule, limits=subject.forced).completions
    learnt.fit(examples(subject.prompts, made, config.prefix))
    recorder = common.Recorder(learnt)
    truth: dict[tuple[int, int], int] = {}
    schedules = common.schedules(config.slots, config.prefix, recorder, Oracle(truth))
    wanted = {
        name: one
        for name, one in schedules.items()
        if not config.only or name in config.only or name == labels.MICRO
    }
    setting = {"model": config.model, "group": config.group, "slots": config.slots}

    for prompt in run.progress(tested, "prompts"):
        jobs = [(prompt, index) for index in range(config.group)]
        live = dict(wanted) if prompt < (config.live or config.prompts) else {}
        first = labels.MICRO if live else labels.FULL
        completions = None
        for name in [first, *(other for other in live if other != first)]:
            rollout = engine.run(subject.prompts, jobs, schedules[name], limits=subject.forced)
            truth.update({(c.prompt, c.index): len(c.tokens) for c in rollout.completions})
            completions = completions or rollout.completions
            if name not in live:
                continue
            durations = [len(c.tokens) - 1 for c in rollout.completions]
            stats, played = (
                rollout.stats,
                _replayed(schedules[name], durations, config, recorder.said, prompt),
            )
            run.row(
                kind="rollout",
                **setting,
                schedule=name,
                prompt=prompt,
                live=True,
                tokens=stats.tokens,
                longest=max(durations) + 1,
                truncated=sum(c.finish == "length" for c in rollout.completions),
                same=sum(
                    a.tokens == b.tokens
                    for a, b in zip(rollout.completions, completions, strict=True)
                ),
                steps=stats.steps,
                replayed=None if played is None else played.steps,
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
            if prompt == 0 and schedules[name].mode != "dynamic":
                for row, job, start, end in stats.spans:
                    run.row(
                        kind="span",
                        **setting,
                        schedule=name,
                        slot=row,
                        completion=job,
                        first=start,
                        last=end,
                    )
        assert completions is not None
        unseen = examples(subject.prompts, completions, config.prefix)
        said = (
            dict(zip(unseen.prefixes.jobs, learnt.predict(unseen.prefixes).tolist(), strict=True))
            if len(unseen)
            else {}
        )
        durations = [len(c.tokens) - 1 for c in completions]
        for name in (name for name in schedules if name not in live):
            played = _replayed(schedules[name], durations, config, said, prompt)
            if played is None:
                continue
            run.row(
                kind="rollout",
                **setting,
                schedule=name,
                prompt=prompt,
                live=False,
                tokens=sum(durations) + len(durations),
                longest=max(durations) + 1,
                truncated=sum(c.finish == "length" for c in completions),
                steps=played.steps,
                lower_bound=lower_bound(durations, config.slots),
                occupancy_share=played.occupancy,
            )

    produced: dict[str, list[int]] = {}
    variants = {
        name: _ours(engine, subject, one, config, produced, name)
        for name, one in wanted.items()
        if name in config.timed
    }
    variants |= {name: _theirs(subject, name, config, produced) for name in config.peers}
    timings = meters.interleave(
        variants,
        config.repeats,
        config.warmup,
        clock=common.clock_of(config.device),
        progress=lambda total: run.progress(total, "rounds"),
    )
    for name, timing in timings.items():
        for repeat, (seconds, tokens) in enumerate(
            zip(timing.seconds, produced[name][-config.repeats :], strict=True)
        ):
            run.row(
                kind="time",
                **setting,
                schedule=name,
                repeat=repeat,
                tokens=tokens,
                pass_seconds=seconds,
                tokens_per_second=tokens / seconds,
            )


def _replayed(
    schedule: Any,
    durations: list[int],
    config: Config,
    said: dict[tuple[int, int], float],
    prompt: int,
) -> Replay | None:
    """The schedule from the lengths alone; None for one that depends on more."""
    lengths = [d + 1 for d in durations]
    if schedule.mode == "dynamic":
        return None
    if schedule.prefix:
        return replay_framework(
            lengths,
            config.slots,
            schedule.prefix,
            lambda jobs: [said[prompt, j] for j in jobs],
            schedule.refill,
        )[0]
    slots = len(durations) if schedule.mode == "full" else config.slots
    return replay(
        durations,
        slots,
        Queue(durations, slots, schedule.refill),
        barrier=schedule.mode != "continuous",
    )


def _ours(
    engine: Any,
    subject: Any,
    schedule: Any,
    config: Config,
    produced: dict[str, list[int]],
    name: str,
) -> Any:
    def once() -> None:
        tokens = 0
        for prompt in range(config.live or config.prompts):
            jobs = [(prompt, index) for index in range(config.group)]
            tokens += engine.run(
                subject.prompts, jobs, schedule, limits=subject.forced
            ).stats.tokens
        produced.setdefault(name, []).append(tokens)

    return once


def _theirs(subject: Any, name: str, config: Config, produced: dict[str, list[int]]) -> Any:
    rows = config.group if name == labels.GENERATE_FULL else config.slots
    # Continuous batching is slow enough for one prompt to do.
    prompts = range(1 if name == labels.GENERATE_BATCH else config.live or config.prompts)

    def once() -> None:
        eos = subject.eos[0] if subject.eos else -1
        lengths = [
            PEERS[name](
                subject.model,
                subject.prompts[p],
                config.group,
                rows,
                subject.limit,
                eos,
                config.seed + p,
            )
            for p in prompts
        ]
        produced.setdefault(name, []).append(sum(map(sum, lengths)))

    return once
