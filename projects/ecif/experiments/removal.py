"""The paper's table of ECIF against retraining, and figure 1: pairs are removed at random, the most
valuable or the most harmful first.

Valuable and harmful are by ECIF's own scores for the clean validation loss. Each edit is one step
from the full model; its truth is the minimum without the pairs, found from the full model with the
same batches.
"""

import math

import torch
from pydantic import Field, PositiveInt

from projects.ecif import labels
from projects.ecif.data import Name
from projects.ecif.experiments.common import ProblemConfig, build
from shared import experiment
from shared.influence.evaluate import cosine, most_harmful, relative_error, spearman
from shared.seeding import generator, step_seed


class Config(ProblemConfig):
    """The problems, and the shares of their pairs that are removed."""

    seeds: dict[Name, PositiveInt] = Field(min_length=1)
    """Runs of each data set: each draws the split, the batches, the heads and what is removed."""
    shares: list[float] = Field(min_length=1)
    """Shares of the training pairs that are removed."""
    curve: Name
    """The data set of the removal curves."""
    curve_shares: list[float]
    """Larger shares, which are removed of it besides."""
    draws: PositiveInt
    """Random removals of each share."""


def run(config: Config, run: experiment.Run) -> None:
    cases = [
        (name, seed)
        for name, count in config.seeds.items()
        for seed in range(config.seed, config.seed + count)
    ]
    for name, seed in run.progress(cases, "data sets and seeds"):
        case = build(config, name, seed, config.test)
        problem, w, metric = case.problem, case.fitted.w, case.validation.mean_loss
        n = problem.pairs.n
        scores = problem.scores(w, metric, case.fitted.solve).cpu()
        common = {
            "dataset": name,
            "seed": seed,
            "pairs": n,
            "parameters": w.numel(),
            "repeated_share": case.repeated_share,
        }

        def measured(at: torch.Tensor, **values: object) -> None:
            losses = {
                "validation_loss": float(metric(at)),  # noqa: B023
                "test_loss": float(case.test.mean_loss(at)),  # noqa: B023
            }
            run.row(**common, **values, test_accuracy=case.accuracy(at), **losses)  # noqa: B023

        elsewhere = problem.scores(w, case.test.mean_loss, case.fitted.solve).cpu()
        # what harms one held-out set need not harm another
        agreement = {"agreement_correlation": spearman(scores, elsewhere)}
        lowest = {
            "eigenvalue_ratio": float(torch.linalg.eigvalsh(case.fitted.hessian)[0])
            * problem.pairs.batches
            / problem.delta
        }
        norm = case.fitted.gradient_norm
        measured(
            w,
            kind="none",
            share=0.0,
            draw=0,
            method=labels.NO_REMOVAL,
            gradient_norm=norm,
            **agreement,
            **lowest,
        )
        orders = {
            ("harmful", 0): most_harmful(-scores).tolist(),
            ("valuable", 0): most_harmful(scores).tolist(),
        }
        for draw in range(config.draws):
            orders["random", draw] = torch.randperm(
                n, generator=generator(step_seed(seed, "random", draw))
            ).tolist()
        for (kind, draw), order in orders.items():
            for share in [*config.shares, *(config.curve_shares if name == config.curve else [])]:
                removed = order[: math.ceil(share * n)]
                root = case.fitted.without(removed)
                where = {"kind": kind, "share": share, "draw": draw}
                measured(root.w, **where, method=labels.RETRAIN, gradient_norm=root.residual)
                truth = (root.w - w).cpu()
                for method, (mode, parts) in labels.EDITS.items():
                    effect = problem.removal_effect(w, [removed], case.fitted.solve, mode, parts)[
                        :, 0
                    ]
                    errors = {
                        "parameter_error": float(relative_error(effect.cpu(), truth)),
                        "parameter_cosine": float(cosine(effect.cpu(), truth)),
                    }
                    measured(w + effect, **where, method=method, **errors)
