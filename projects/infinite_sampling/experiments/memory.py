"""Table 1 and figure 3: bytes of keys and values, and the peak of all allocations, by decode mode
and by group size.

Peaks are what the allocator has handed out beyond the weights while a group is decoded. Completions
run to the limit or their end; what a static cache takes depends on neither.
"""

from typing import Literal

from pydantic import Field

from projects.infinite_sampling import baselines, labels
from projects.infinite_sampling.experiments import common
from projects.infinite_sampling.predictor import Constant
from projects.infinite_sampling.rollout import Schedule
from shared import experiment


class Config(experiment.Config):
    model: str
    """`policy`, random weights by a name of `common.RANDOM`, or a model by its name or folder"""
    grown: str
    """likewise: the model whose groups grow, for the figure"""
    group: int = Field(ge=2)
    """completions of a prompt"""
    slots: int = Field(ge=1)
    """rows of cache"""
    also_slots: list[int]
    """other numbers of rows for micro groups"""
    max_new_tokens: int = Field(ge=2)
    """tokens of a completion at most"""
    prefix: int = Field(ge=1)
    """tokens of a completion that the predictor sees"""
    groups: list[int]
    """sizes of the groups that grow"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where it runs"""


def run(config: Config, run: experiment.Run) -> None:
    for name, groups, all_modes in (
        (config.model, [config.group], True),
        (config.grown, config.groups, False),
    ):
        limit = config.max_new_tokens if all_modes else 56
        one = common.subject(
            name,
            1,
            config.seed,
            limit=limit,
            run=run,
            device=config.device,
            group=max(groups),
        )
        modes = _modes(config)
        if not all_modes:
            modes = {
                mode: schedule
                for mode, schedule in modes.items()
                if mode in (labels.FULL, labels.MICRO, labels.FULL_FRAMEWORK)
            }
        for group in run.progress(groups, "groups"):
            for mode, schedule in run.progress(list(modes.items()), "modes"):
                _measure(
                    run,
                    config,
                    one,
                    mode,
                    schedule,
                    group,
                    name,
                    "modes" if all_modes else "groups",
                )
            if all_modes:
                for mode, rows in (
                    (labels.GENERATE_FULL, group),
                    (labels.GENERATE_CHUNKS, config.slots),
                ):
                    _measure_peer(run, config, one, mode, rows, group)


def _modes(config: Config) -> dict[str, Schedule]:
    slots, guess = config.slots, Constant()
    modes = {labels.FULL: Schedule("full")}
    modes |= {f"micro groups of {other}": Schedule("micro", other) for other in config.also_slots}
    return modes | {
        labels.MICRO: Schedule("micro", slots),
        labels.FIXED_SLOTS: Schedule("continuous", slots),
        labels.DYNAMIC_SLOTS: Schedule("dynamic", slots),
        labels.FULL_FRAMEWORK: Schedule("continuous", slots, "plan_sjf", config.prefix, guess),
    }


def _measure(
    run: experiment.Run,
    config: Config,
    one: common.Subject,
    mode: str,
    schedule: Schedule,
    group: int,
    model: str,
    kind: str,
) -> None:
    engine = one.engine(config.seed)
    jobs = [(0, index) for index in range(group)]
    engine.check(one.prompts)  # before the meter: it is made once for a model
    made, peak, _, counter = common.Meter(config.device).peaks(
        lambda: engine.run(one.prompts, jobs, schedule, limits=one.forced)
    )
    stats = made.stats
    rows = group if schedule.mode == "full" else min(schedule.slots, group)
    tokens = len(one.prompts[0]) + one.limit
    run.row(
        kind=kind,
        model=model,
        mode=mode,
        group=group,
        slots=rows,
        prompt_tokens=len(one.prompts[0]),
        max_new_tokens=one.limit,
        token_bytes=stats.token_bytes,
        kv_bytes=stats.kv_bytes,
        formula_bytes=stats.token_bytes * (rows * tokens + len(one.prompts[0]))
        if schedule.mode != "dynamic"
        else None,
        peak_bytes=peak,
        counter=counter,
        steps=stats.steps,
        prompt="shared pages" if schedule.mode == "dynamic" else "copied into slots",
        weight_bytes=sum(p.numel() * p.element_size() for p in one.model.parameters()),
    )


def _measure_peer(
    run: experiment.Run, config: Config, one: common.Subject, mode: str, rows: int, group: int
) -> None:
    eos = one.eos[0] if one.eos else -1
    _, peak, _, counter = common.Meter(config.device).peaks(
        lambda: baselines.generate(one.model, one.prompts[0], group, rows, one.limit, eos)
    )
    run.row(
        kind="modes",
        model=one.name,
        mode=mode,
        group=group,
        slots=rows,
        prompt_tokens=len(one.prompts[0]),
        max_new_tokens=one.limit,
        token_bytes=None,
        kv_bytes=None,
        formula_bytes=None,
        peak_bytes=peak,
        counter=counter,
        steps=None,
        prompt="copied for each row",
        weight_bytes=sum(p.numel() * p.element_size() for p in one.model.parameters()),
    )
