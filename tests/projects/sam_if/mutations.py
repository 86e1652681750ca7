"""Mutations of SAM-IF, each of which must turn the tests red.

    python tests/projects/sam_if/mutations.py          # all; some minutes
    python tests/projects/sam_if/mutations.py term     # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

SAM, FIXED, ESTIMATORS, TRAJECTORY, SCORE, CLAIMS, TABLES, PROBLEMS, BASELINES = (
    f"projects/sam_if/{name}.py"
    for name in (
        "sam",
        "fixed_point",
        "estimators",
        "trajectory",
        "score",
        "claims",
        "tables",
        "data",
        "baselines",
    )
)

MUTATIONS = [
    # ---- the fixed point ----
    Mutation(
        FIXED,
        "        return v - (self.g * along if v.dim() == 1 else self.g.unsqueeze(1) * along)\n",
        "        return v\n",
        "the perturbation's length is taken to change with the gradient: no projection",
    ),
    Mutation(
        FIXED,
        "            moved = v + one.c * one.project(one.here(v)) if one.c else v\n",
        "            moved = v + one.c * one.project(one.there(v)) if one.c else v\n",
        "the perturbation is differentiated with the curvature of the perturbed point",
    ),
    Mutation(
        FIXED,
        "            inner = one.c * one.here(one.project(outer)) if one.c else"
        " torch.zeros_like(v)\n",
        "            inner = one.c * one.project(one.here(outer)) if one.c else"
        " torch.zeros_like(v)\n",
        "the transpose has its factors in the order of the matrix",
    ),
    Mutation(
        FIXED,
        "            total = total + one.share * one.there(moved)\n",
        "            total = total + one.there(moved)\n",
        "batches are added up and not averaged",
    ),
    Mutation(
        FIXED,
        "        whole = replace(self.objective, l2=0.0, centre=None)\n",
        "        whole = replace(self.objective, centre=None)\n",
        "the regulariser takes part in the perturbation",
    ),
    Mutation(
        FIXED,
        "    return order.split(size)\n",
        "    return order[: len(order) // size * size].split(size)\n",
        "a partition loses the last samples",
    ),
    # ---- the estimators ----
    Mutation(
        ESTIMATORS,
        '            own = [(self.at.w if self.kind == "if" else one.wt, s)]\n',
        "            own = [(self.at.w, s)]\n",
        "gradients of samples are taken at the unperturbed weights",
    ),
    Mutation(
        ESTIMATORS,
        "                own.append((self.at.w, one.c * one.project(one.there(s))))\n",
        "                own.append((one.wt, one.c * one.project(one.there(s))))\n",
        "the direct term is taken at the perturbed point",
    ),
    Mutation(
        ESTIMATORS,
        '            if self.kind == "sam_hif" and not self.drop_eq9_term and one.c:\n',
        "            if self.drop_eq9_term and one.c:\n",
        "the last term of equation 9 is left out unasked",
    ),
    Mutation(
        ESTIMATORS,
        "        return self.along(self.solve(metric_gradient(metric, self.at.w),"
        " transposed=True)[0])\n",
        "        return self.along(self.solve(metric_gradient(metric, self.at.w))[0])\n",
        "scores are solved with J and not with its transpose",
    ),
    Mutation(
        ESTIMATORS,
        '        options = {"damping": self.damping, "tol": self.tol}\n',
        '        options = {"damping": 0.0, "tol": self.tol}\n',
        "damping is ignored",
    ),
    Mutation(
        ESTIMATORS,
        "            places = torch.isin(wanted, one.rows.cpu()).nonzero().flatten()\n",
        "            places = torch.arange(len(wanted)) if len(one.rows) == objective.n else"
        " one.rows\n",
        "a chunk of the samples is scored as if it were all",
        ("score",),
    ),
    # ---- the run ----
    Mutation(
        TRAJECTORY,
        "            on_w, on_v = on_w + self.recipe.problem.objective.l2 * on_v,"
        " self.recipe.momentum * on_v\n",
        "            on_w, on_v = on_w, self.recipe.momentum * on_v\n",
        "SAM-GIF forgets that weights decay",
    ),
    Mutation(
        TRAJECTORY,
        "            yield step, self.recipe.perturbed(step, w, m), m\n",
        "            yield step, w, m\n",
        "SAM-GIF is TracIn",
    ),
    Mutation(
        TRAJECTORY,
        "        found.append(-d_w * m[piece].unsqueeze(1))\n",
        "        found.append(d_w * m[piece].unsqueeze(1))\n",
        "removal has the sign of up-weighting",
    ),
    Mutation(
        TRAJECTORY,
        "                w, velocity = vmap(advance)(w, velocity, m[:, step.rows])\n",
        "                w, velocity = vmap(advance)(w, velocity, m[:, : len(step.rows)])\n",
        "runs made together have the weights of other samples",
    ),
    # ---- the optimizer ----
    Mutation(
        SAM,
        '            one.add_(one.grad * (group["rho"] / (size + TINY)).to(one))\n',
        '            one.add_(one.grad * (group["rho"] / (one.grad.norm() + TINY)).to(one))\n',
        "each tensor is perturbed by rho",
        ("sam",),
    ),
    Mutation(
        SAM,
        "            one.track_running_stats = False  # in train mode it goes on normalising by the"
        " batch\n",
        "            pass\n",
        "the second pass updates running statistics",
        ("sam",),
    ),
    Mutation(
        SAM,
        "            one.copy_(before)\n",
        "            pass\n",
        "the step is taken from the perturbed weights",
        ("sam",),
    ),
    Mutation(
        SAM,
        "                share = one.grad / len(closures)\n",
        "                share = one.grad\n",
        "parts of a batch are added up",
        ("sam",),
    ),
    Mutation(
        SAM,
        "        self.base.load_state_dict(state_dict)\n"
        "        self.param_groups = self.base.param_groups\n",
        "        self.base.load_state_dict(state_dict)\n",
        "loading leaves the groups stale",
        ("sam",),
    ),
    # ---- what experiments are made of ----
    Mutation(
        PROBLEMS,
        "        grouped = x.reshape(x.shape[0], self.num_groups, -1)\n",
        "        grouped = x.reshape(1, self.num_groups, -1)\n",
        "a group is normalised over the batch",
        ("experiments",),
    ),
    Mutation(
        BASELINES,
        "    saved = {step: w for step, (_, w, _) in enumerate(recipe.states()) if step in places}"
        " | {total: recipe.train()}\n",
        "    saved = {step + 1: w for step, (_, w, _) in enumerate(recipe.states()) if step + 1 in"
        " places}\n",
        "checkpoints are a step old",
        ("experiments",),
    ),
    # ---- the command, tables and claims ----
    Mutation(
        SCORE,
        '        require_positive(at.plain if recipe.estimator == "if" else at.frozen, w,'
        " recipe.damping)\n",
        "        pass\n",
        "an indefinite Hessian is inverted",
        ("score",),
    ),
    Mutation(
        SCORE,
        "        return torch.stack(total).sum() / len(y_query)\n",
        "        return torch.stack(total).mean() / len(y_query)\n",
        "the metric depends on the chunks",
        ("score",),
    ),
    Mutation(
        SCORE,
        '            "recipe": recipe,\n',
        '            "recipe": recipe.model_dump(exclude={"rho"}),\n',
        "pieces of another rho are taken",
        ("score",),
    ),
    Mutation(
        SCORE,
        '            "model": known,\n',
        '            "model": w,\n',
        "pieces of another model with the same weights are taken",
        ("score",),
    ),
    Mutation(
        CLAIMS,
        "    gain = (found[NO_EDIT] - found[SAM_HIF])",
        "    gain = (1 - found[SAM_HIF])",
        "an edit need not be nearer to retraining than no edit",
        ("claims",),
    ),
    Mutation(
        CLAIMS,
        "    if seeds >= SEEDS and low > 0:",
        "    if low > 0:",
        "an interval of too few seeds decides",
        ("claims",),
    ),
    Mutation(
        CLAIMS,
        "    if seeds >= SEEDS and high < 0:",
        "    if seeds >= SEEDS and low <= 0:",
        "what is undecided fails",
        ("claims",),
    ),
    Mutation(
        TRAJECTORY,
        "        places = self._path if self.kept else self._walk(self.weights)",
        "        places = self._path[1:] if self.kept else self._walk(self.weights)",
        "a run that is kept is a step ahead",
    ),
    Mutation(
        CLAIMS,
        "    low = {name: one.low * (n if name.startswith(RETRAIN) else 1) for name, one in"
        " found.items()}\n",
        "    low = {name: one.low * n for name, one in found.items()}\n",
        "every competitor is charged n times",
        ("claims",),
    ),
    Mutation(
        "shared/statistics.py",
        "    half = float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) /"
        " np.sqrt(len(found)))\n",
        "    half = float(1.96 * found.std(ddof=1) / np.sqrt(len(found)))\n",
        "intervals of few seeds are too narrow",
        ("tables",),
    ),
]

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "sam_if", sys.argv[1:]))
