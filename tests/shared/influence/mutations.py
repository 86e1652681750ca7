"""Mutations of shared/influence, each of which must turn the tests red.

    python tests/shared/influence/mutations.py          # all; some minutes on two cores
    python tests/shared/influence/mutations.py cg       # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

PARAMS, PRODUCTS, OBJECTIVE, SOLVERS, EKFAC, BASELINES, RETRAIN, EVALUATE, NOISE, SCORING = (
    f"shared/influence/{name}.py"
    for name in (
        "params",
        "products",
        "objective",
        "solvers",
        "ekfac",
        "baselines",
        "retrain",
        "evaluate",
        "noise",
        "scoring",
    )
)

MUTATIONS = [
    Mutation(
        PARAMS,
        "if not float((whole - again).abs().max()) <= slack:",
        "if not float((whole - again).abs().max()) >= 0:",
        "functional dropout passes",
        ("params",),
    ),
    Mutation(
        PARAMS,
        "if not float((whole[:half] - part).abs().max()) <= slack:",
        "if not float((whole[:half] - part).abs().max()) >= 0:",
        "functional batch norm in training mode passes",
        ("params",),
    ),
    Mutation(
        PARAMS,
        "if id(other) not in first:",
        "if name not in chosen:",
        "the other name of a tied parameter is fixed",
        ("params",),
    ),
    Mutation(
        PARAMS,
        "_BatchNorm) and (module.training or module.running_mean is None)",
        "_BatchNorm) and module.training",
        "batch norm without statistics passes",
        ("params",),
    ),
    Mutation(
        PARAMS,
        "kept = other.detach().clone()",
        "kept = other.detach()",
        "later changes of the model change the function",
        ("params",),
    ),
    Mutation(
        PARAMS,
        "own_statistics or isinstance(module, nn.LayerNorm)",
        "own_statistics",
        "layer norm passes for third derivatives",
        ("params",),
    ),
    Mutation(
        PRODUCTS,
        "        return pull(jvp(bend, (at,), (moved,))[1])[0]",
        "        return pull(moved)[0]",
        "the Gauss-Newton matrix forgets the Hessian of the loss",
        ("products",),
    ),
    Mutation(
        PRODUCTS,
        '    note("forward_mode", _columns(directions))',
        '    note("forward_mode")',
        "k directions count as one pass",
        ("products",),
    ),
    Mutation(
        PRODUCTS,
        "    size = chunk or max(samples, 1)",
        "    size = min(chunk or samples, samples - 1)",
        "the last sample is its own chunk",
        ("products",),
    ),
    Mutation(
        OBJECTIVE,
        "    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)",
        "    return torch.diag_embed(p)",
        "the curvature of a softmax is its diagonal",
        ("products",),
    ),
    Mutation(
        SOLVERS,
        "        x = torch.linalg.lu_solve(factors, pivots, columns)",
        "        x = torch.linalg.lu_solve(factors, pivots, columns, adjoint=True)",
        "a matrix factored once is solved as its transpose",
        ("solvers",),
    ),
    Mutation(
        OBJECTIVE,
        ".sum() / self.n",
        ".sum() / len(losses)",
        "a chunk is divided by its own size",
        ("products",),
    ),
    Mutation(
        OBJECTIVE,
        "        total = self.l2 * v\n        for piece in",
        "        total = 0 * v\n        for piece in",
        "hvp forgets the regulariser",
        ("products",),
    ),
    Mutation(
        OBJECTIVE,
        "return total + self.l2 * self._away(w)",
        "return total + self.l2 * w",
        "the regulariser's gradient ignores its centre",
        ("products",),
    ),
    Mutation(
        OBJECTIVE,
        "        return weights / self.n",
        "        return weights / weights.sum()",
        "removal is normalised anew",
        ("baselines",),
    ),
    Mutation(
        SOLVERS,
        "        if (active_K & (bend_K <= 0)).any():",
        "        if (active_K & (bend_K.abs() <= 0)).any():",
        "cg goes on through negative curvature",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "        active_K = r_PK.norm(dim=0) > aim * size_K",
        "        active_K = r_PK.norm(dim=0) > aim * size_K.max()",
        "cg measures small right-hand sides by the largest",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "            if not (r_PK.norm(dim=0) > aim * size_K).any():",
        "            if True:",
        "cg does not start again from the true residual",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "        if checked and not open_K.any():",
        "        if not open_K.any():",
        "gcr believes the residual that it updates",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "        d_PK = r_PK[:, open_K] if fell else q_PM[:, -1:]",
        "        d_PK = r_PK[:, open_K]",
        "gcr stops where no residual falls",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "        share_KK = ad_PK.T @ r_PK",
        "        share_KK = (ad_PK.T @ r_PK) * (torch.arange(len(open_K)) < 1)",
        "gcr's right-hand sides do not share the space",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "        kept = values_K > rounding",
        "        kept = values_K > 0",
        "gcr keeps directions that are rounding",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "relative_residual(operator, x, b) if residual is None else residual",
        "0.0 if residual is None else residual",
        "no solver checks its residual",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "    if radius >= 1:",
        "    if radius >= 2:",
        "a series that diverges is summed",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "    gram_NN.diagonal().add_(n * damping)",
        "    gram_NN.diagonal().add_(damping)",
        "woodbury damps n times too little",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "product(basis)\n",
        "operator(basis)\n",
        "galerkin forgets the damping",
        ("solvers",),
    ),
    Mutation(
        SOLVERS,
        "    if smallest <= 0:",
        "    if smallest < -1:",
        "an indefinite Hessian passes",
        ("solvers",),
    ),
    Mutation(
        EKFAC,
        "lambdas[name] += rotated.square().sum(0)",
        "lambdas[name] += ((g_NTO @ u_s).square().sum((0, 1))[:, None] * (a_NTI @"
        " u_a).square().mean((0, 1)))",
        "EK-FAC is K-FAC: the eigenvalues are products",
        ("ekfac",),
    ),
    Mutation(
        EKFAC,
        '"nto,nti->noi", g_NTO',
        '"nto,nti->noi", g_NTO.abs()',
        "EK-FAC loses the signs of the gradients",
        ("ekfac",),
    ),
    Mutation(
        EKFAC,
        "        return self.u_s_OO @ matrix @ self.u_a_II.T",
        "        return self.u_s_OO @ matrix @ self.u_a_II",
        "EK-FAC does not rotate back",
        ("ekfac",),
    ),
    Mutation(
        EKFAC,
        "layer.padding, layer.stride)",
        "layer.padding)",
        "patches ignore the stride",
        ("ekfac",),
    ),
    Mutation(
        BASELINES,
        "    return scores_along(objective, w, solve(",
        "    return -scores_along(objective, w, solve(",
        "influence has the other sign",
        ("baselines",),
    ),
    Mutation(
        BASELINES,
        "    return solve(objective.sample_gradients(w, rows).T * objective",
        "    return -solve(objective.sample_gradients(w, rows).T * objective",
        "the removal effect has the other sign",
        ("baselines",),
    ),
    Mutation(
        BASELINES,
        "    return -regression * (",
        "    return regression * (",
        "TRAK predicts presence, not removal",
        ("baselines",),
    ),
    Mutation(
        BASELINES,
        "torch.where(is_own, -math.inf, logits)",
        "logits",
        "the margin is a log-probability",
        ("baselines",),
    ),
    Mutation(
        RETRAIN,
        "    weights = torch.ones(n, dtype=torch.float64)\n",
        "    weights = torch.full((n,), n / max(1, n - len(ids)), dtype=torch.float64)\n",
        "retraining normalises anew",
        ("retrain",),
    ),
    Mutation(
        RETRAIN,
        '{"config": config, "n": n, "removed": sorted(removed)}',
        '{"n": n, "removed": sorted(removed)}',
        "the cache ignores the config",
        ("retrain",),
    ),
    Mutation(
        RETRAIN,
        "    if residual > tol:\n        if not polish",
        "    if residual > 1:\n        if not polish",
        "minimise stops early",
        ("retrain",),
    ),
    Mutation(
        RETRAIN,
        "            gradient = torch.linalg.solve_triangular(factor, gradient.unsqueeze(1),"
        " upper=False).squeeze(1)\n",
        "            pass\n",
        "the slope is in other coordinates than the steps",
        ("retrain",),
    ),
    Mutation(
        EVALUATE,
        "    return (~mask)",
        "    return mask",
        "subsets are predicted by what they keep",
        ("evaluate",),
    ),
    Mutation(
        EVALUATE,
        "    return np.argsort(-np.asarray(harm",
        "    return np.argsort(np.asarray(harm",
        "the least harmful come first",
        ("evaluate",),
    ),
    Mutation(
        NOISE,
        "draw.integers(1, classes,",
        "draw.integers(0, classes,",
        "some flipped labels stay",
        ("evaluate",),
    ),
    Mutation(
        NOISE,
        "    while unchanged:",
        "    while unchanged and False:",
        "some captions are exchanged for equal ones",
        ("evaluate",),
    ),
    Mutation(
        SCORING,
        "    if norm > tol:",
        "    if norm > 1e9:",
        "an untrained model is scored",
        ("scoring",),
    ),
]


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "influence", sys.argv[1:], under="shared"))
