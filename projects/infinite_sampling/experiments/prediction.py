"""Table 3 and figure 4 (the paper's figure 7): how well lengths are predicted by the number k of
tokens seen.

Prompts are split into those that are fitted on and those that are tested. What is tested changes
with k, as short completions end: so the error of the *total* length over all completions, those
that have ended counted as exact, stands beside the error of what remains.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from projects.infinite_sampling.experiments import common
from projects.infinite_sampling.predictor import PREDICTORS, evaluate, examples
from shared import experiment


class Config(experiment.Config):
    model: str
    """`policy`, random weights by a name of `common.RANDOM`, or a model by its name or folder"""
    fit_prompts: int = Field(ge=1)
    """prompts whose completions the predictors learn from"""
    test_prompts: int = Field(ge=1)
    """other prompts, whose lengths are predicted"""
    group: int = Field(ge=2)
    """completions of a prompt"""
    max_new_tokens: int = Field(ge=2)
    """tokens of a completion at most"""
    prefixes: list[int]
    """tokens of a completion that a predictor sees, one predictor for each number"""
    predictors: list[Literal[tuple(PREDICTORS)]]  # type: ignore[valid-type]
    """by name"""


def run(config: Config, run: experiment.Run) -> None:
    prompts = config.fit_prompts + config.test_prompts
    one = common.subject(
        config.model,
        prompts,
        config.seed,
        limit=config.max_new_tokens,
        run=run,
    )
    made = (
        one.engine(config.seed)
        .run(one.prompts, config.group, common.Schedule("continuous", 64))
        .completions
    )
    fitted, tested = (
        [c for c in made if c.prompt < config.fit_prompts],
        [c for c in made if c.prompt >= config.fit_prompts],
    )
    for prefix in run.progress(config.prefixes, "prefixes"):
        for name in config.predictors:
            model = one.model if name == "ridge" else None
            known, unseen = (
                examples(one.prompts, fitted, prefix, model),
                examples(one.prompts, tested, prefix, model),
            )
            if not len(known) or not len(unseen):
                continue
            predictor = PREDICTORS[name](one.vocabulary)
            predictor.fit(known)
            predicted = predictor.predict(unseen.prefixes)
            found = evaluate(predicted, unseen)
            run.row(
                prefix=prefix,
                predictor=name,
                fitted_on=len(known),
                tested_on=len(unseen),
                remaining_error_tokens=found["error"],
                total_error_tokens=float(np.abs(predicted - unseen.remaining).sum() / len(tested)),
                smape_ratio=found["smape"],
                within_5_share=found["within_5"],
                within_10_share=found["within_10"],
                pooled_tau_ratio=found["pooled"],
                group_tau_ratio=found["within"],
                truncated=int(unseen.censored.sum()),
            )
