"""Which part of ECIF matters (positive, negative, both), which curvature, the rank of its
projection, the regulariser: against retraining.

"wrong sign" subtracts the negative part: what a mistaken sign costs.
"""

from functools import partial

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt

from projects.ecif import labels
from projects.ecif.data import Name
from projects.ecif.experiments.common import ProblemConfig, build
from projects.ecif.fit import projection
from shared import experiment
from shared.influence.baselines import metric_gradient
from shared.influence.evaluate import cosine, relative_error, spearman
from shared.influence.solvers import cg, galerkin, identity
from shared.seeding import step_seed


class Config(ProblemConfig):
    """The problem, what is left out, and the curvatures that are tried."""

    dataset: Name
    """The data set."""
    seeds: PositiveInt
    """Runs at the problem's own `delta`."""
    pairs: PositiveInt
    """Pairs left out one by one."""
    group_shares: list[float]
    """Shares of the pairs left out together, at the problem's own `delta`."""
    ranks: list[PositiveInt]
    """Directions a side of every layer that LoGra projects to, leading and random ones."""
    deltas: list[PositiveFloat]
    """Other weights of the regulariser, with single pairs left out."""
    delta_seeds: PositiveInt
    """Runs at each of these."""


def run(config: Config, run: experiment.Run) -> None:
    seeds = range(config.seed, config.seed + config.seeds)
    cases = [(config.delta, seed) for seed in seeds] + [
        (delta, seed) for delta in config.deltas for seed in seeds[: config.delta_seeds]
    ]
    for delta, seed in run.progress(cases, "regularisers and seeds"):
        case = build(config, config.dataset, seed, config.test, delta=delta)
        problem, w, metric, hessian = (
            case.problem,
            case.fitted.w,
            case.validation.mean_loss,
            case.fitted.hessian,
        )
        n, swept = problem.pairs.n, delta == config.delta
        draw = np.random.default_rng(step_seed(seed, "left out"))
        groups = [[int(one)] for one in draw.permutation(n)[: config.pairs]]
        groups += [
            draw.permutation(n)[: round(share * n)].tolist()
            for share in (config.group_shares if swept else [])
        ]
        roots = [case.fitted.without(group) for group in groups]
        gradients = {
            "exact": [problem.removal_gradient(w, group) for group in groups],
            "paper": [problem.removal_gradient(w, group, "paper") for group in groups],
            "positive": [problem.removal_gradient(w, group, parts="positive") for group in groups],
            "negative": [problem.removal_gradient(w, group, parts="negative") for group in groups],
        }
        gradients["wrong sign"] = [
            a - b for a, b in zip(gradients["positive"], gradients["negative"], strict=True)
        ]
        curvatures = {labels.HESSIAN: (0, case.fitted.solve)}
        if swept:
            curvatures |= {
                labels.GAUSS_NEWTON: (0, partial(cg, problem.objective().ggn(w))),
                labels.IDENTITY: (0, lambda b: identity(b / 1.0)),
            }
            for basis, label in labels.LOGRA.items():
                for rank in config.ranks:
                    # what `solver(..., "logra")` solves, with the Hessian that is at hand
                    columns = projection(problem, w, rank, seed, basis)
                    curvatures[f"{label} {rank}"] = (
                        columns.shape[1],
                        partial(galerkin, hessian.matmul, basis=columns),
                    )
        g, before = metric_gradient(metric, w), float(metric(w))
        reference = problem.scores(w, metric, case.fitted.solve)
        for curvature, (dimension, solve) in curvatures.items():
            common = {
                "seed": seed,
                "delta_ratio": delta,
                "curvature": curvature,
                "dimension": dimension or w.numel(),
            }
            correlation = spearman(problem.scores(w, metric, solve), reference)
            run.row(
                kind="scores",
                **common,
                score_correlation=correlation,
                gradient_norm=case.fitted.gradient_norm,
            )
            for variant in gradients if curvature == labels.HESSIAN else ("exact",):
                effects = solve(torch.stack(gradients[variant], 1))[0]
                for group, root, effect in zip(groups, roots, effects.T, strict=True):
                    truth = root.w - w
                    run.row(
                        kind="pair" if len(group) == 1 else "group",
                        **common,
                        variant=variant,
                        removed_share=len(group) / n,
                        removed=group[0],
                        parameter_error=float(relative_error(effect.cpu(), truth.cpu())),
                        parameter_cosine=float(cosine(effect.cpu(), truth.cpu())),
                        predicted_difference=float(g @ effect),
                        true_difference=float(metric(root.w)) - before,
                        gradient_norm=root.residual,
                    )
