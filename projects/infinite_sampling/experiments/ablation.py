"""Table 4: what predictions bring to each refill, and what eps costs the plan. Replayed from
measured lengths, as completions do not depend on the schedule; `schedule` shows that live steps are
replayed steps.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from projects.infinite_sampling import labels
from projects.infinite_sampling.experiments import common
from projects.infinite_sampling.predictor import BinnedTransformer, examples
from projects.infinite_sampling.scheduler import (
    REFILLS,
    Queue,
    lower_bound,
    plan,
    replay,
    replay_framework,
)
from shared import experiment


class Config(experiment.Config):
    model: str
    """`policy`, random weights by a name of `common.RANDOM`, or a model by its name or folder"""
    prompts: int = Field(ge=1)
    """those whose lengths are scheduled"""
    fit_prompts: int = Field(ge=1)
    """other prompts, whose completions the predictors learn from"""
    group: int = Field(ge=2)
    """completions of a prompt"""
    slots: int = Field(ge=1)
    """rows of cache"""
    max_new_tokens: int = Field(ge=2)
    """tokens of a completion at most"""
    prefixes: list[int]
    """tokens of a completion that a predictor sees, one predictor for each number"""
    eps: list[float]
    """of the plans"""
    plan_slots: list[int]
    """rows that plans are made for"""


def run(config: Config, run: experiment.Run) -> None:
    prompts = config.prompts + config.fit_prompts
    one = common.subject(
        config.model,
        prompts,
        config.seed,
        limit=config.max_new_tokens,
        run=run,
    )
    pairs = [
        (p, i) for p in range(prompts) for i in range(config.group if p < config.prompts else 16)
    ]
    made = (
        one.engine(config.seed)
        .run(one.prompts, pairs, common.Schedule("continuous", 64))
        .completions
    )
    tested, fitted = (
        [c for c in made if c.prompt < config.prompts],
        [c for c in made if c.prompt >= config.prompts],
    )
    lengths = {p: [d + 1 for d in common.durations(tested, p)] for p in range(config.prompts)}

    for prefix in run.progress(config.prefixes, "prefixes"):
        predictor = BinnedTransformer(one.vocabulary, seed=config.seed)
        predictor.fit(examples(one.prompts, fitted, prefix))
        unseen = examples(one.prompts, tested, prefix)
        said = dict(
            zip(unseen.prefixes.jobs, predictor.predict(unseen.prefixes).tolist(), strict=True)
        )
        for prompt, of in lengths.items():
            _replays(
                run,
                config,
                f"k = {prefix}",
                prefix,
                prompt,
                of,
                lambda jobs, p=prompt, s=said: [s[p, j] for j in jobs],
            )
    for prompt, of in lengths.items():
        _replays(run, config, "none", 0, prompt, of, lambda jobs: [1.0] * len(jobs))
        _replays(
            run, config, "oracle", 0, prompt, of, lambda jobs, o=of: [float(o[j]) for j in jobs]
        )
        durations = [n - 1 for n in of]
        for name, order in (
            (labels.MICRO, durations),
            ("sorted micro groups", sorted(durations, reverse=True)),
        ):
            steps = replay(order, config.slots, Queue(order, config.slots), barrier=True).steps
            bound = lower_bound(durations, config.slots)
            run.row(
                kind="steps",
                lengths="none" if order is durations else "oracle",
                refill=name,
                prompt=prompt,
                steps=steps,
                lower_bound=bound,
            )

    for slots in config.plan_slots:
        for eps in config.eps:
            for prompt, of in lengths.items():
                start = time.process_time()
                made_plan = plan([n - 1 for n in of], slots, eps)
                run.row(
                    kind="plan",
                    slots=slots,
                    eps_ratio=eps,
                    prompt=prompt,
                    status=made_plan.status,
                    states=made_plan.states,
                    steps=made_plan.value,
                    lower_bound=made_plan.lower_bound,
                    certificate_ratio=made_plan.certificate,
                    plan_seconds=time.process_time() - start,
                )


def _replays(
    run: experiment.Run,
    config: Config,
    known: str,
    prefix: int,
    prompt: int,
    of: Sequence[int],
    predict: Callable[[list[int]], Sequence[float]],
) -> None:
    bound = lower_bound([n - 1 for n in of], config.slots)
    for refill in REFILLS:
        found, _ = replay_framework(of, config.slots, prefix, predict, refill)  # type: ignore[arg-type]
        left = [j for j, n in enumerate(of) if n > prefix]
        error = (
            float(
                np.mean(
                    [abs(p - (of[j] - prefix)) for p, j in zip(predict(left), left, strict=True)]
                )
            )
            if left
            else 0.0
        )
        run.row(
            kind="steps",
            lengths=known,
            refill=refill,
            prompt=prompt,
            steps=found.steps,
            lower_bound=bound,
            occupancy_share=found.occupancy,
            error_tokens=error,
        )
