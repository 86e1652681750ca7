"""Mutations of meta-IF, each of which must turn the tests red.

    python tests/projects/meta_if/mutations.py            # all; some minutes on two cores
    python tests/projects/meta_if/mutations.py inner      # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

TOTAL, PROBLEMS, ESTIMATORS, TRAINING, EPISODES, BASELINES, SCORE = (
    f"projects/meta_if/{name}.py"
    for name in ("total", "problems", "estimators", "training", "episodes", "baselines", "score")
)

MUTATIONS = [
    Mutation(
        TOTAL,
        "- (self._inner_slope(lam, theta, rows) * self.adjoint[rows]).sum(1)",
        "+ (self._inner_slope(lam, theta, rows) * self.adjoint[rows]).sum(1)",
        "the indirect part of the total gradient has the wrong sign",
    ),
    Mutation(
        TOTAL,
        "        in_lam, in_theta = jvp(slopes, (self.lam, self.theta[rows]), (v, self._follow(v,"
        " rows)))[1]\n        return in_lam - self._pull(self._solve(in_theta, rows), rows)\n\n   "
        " def _four_terms",
        "        in_lam, in_theta = jvp(slopes, (self.lam, self.theta[rows]), (v, self._follow(v,"
        " rows)))[1]\n        return in_lam\n\n    def _four_terms",
        "the exact product forgets the second inner solve",
    ),
    Mutation(
        TOTAL,
        "        slopes = grad(self._weighted(self._lagrangian, rows), argnums=(0, 1))\n",
        "        slopes = grad(self._weighted(self._outer, rows), argnums=(0, 1))\n",
        "the third derivatives are left out of the exact product",
    ),
    Mutation(
        TOTAL,
        "        return -self._solve(jvp(lambda lam: self._inner_slope",
        "        return self._solve(jvp(lambda lam: self._inner_slope",
        "the task parameters move the wrong way",
    ),
    Mutation(
        TOTAL,
        "return outer + sample - (s_a * bend).sum()",
        "return outer + sample",
        "instance-IF of training samples forgets the derivative of the inverse inner Hessian",
    ),
    Mutation(
        TOTAL,
        "            return along_dq + jvp(along_q, (self.lam, theta), (s, u))[1]\n",
        "            return jvp(along_q, (self.lam, theta), (s, u))[1]\n",
        "scores of training samples forget how the adjoint moves",
    ),
    Mutation(
        TOTAL,
        "            moved = (s, self._follow(s, rows))\n",
        "            moved = (s, 0 * self._follow(s, rows))\n",
        "scores of validation samples use direct gradients",
    ),
    Mutation(
        TOTAL,
        "        return direct - torch.stack([self._pull(self._solve(slope.unsqueeze(0), rows),"
        " rows) for slope in slopes])\n",
        "        return direct\n",
        "instance-IF of validation samples uses direct gradients, as the note prints it",
    ),
    Mutation(
        TOTAL,
        "(self.problem.task_weights * self.outer_slope.abs().sum(1)).sum()",
        "(self.problem.task_weights * self.outer_slope.norm(dim=1)).sum()",
        "Gamma takes another norm",
    ),
    Mutation(
        TOTAL,
        "            return -jvp(lambda lam: vmap(lambda task: slopes(lam, task))(data)",
        "            return jvp(lambda lam: vmap(lambda task: slopes(lam, task))(data)",
        "the unrolled training samples have the wrong sign",
    ),
    Mutation(
        ESTIMATORS,
        "    return _solve(state, -state.train_gradients(task, samples).T * weights",
        "    return _solve(state, state.train_gradients(task, samples).T * weights",
        "deleting a training sample is taken for adding it",
    ),
    Mutation(
        ESTIMATORS,
        "    return state.val_dots(s) * state.problem.task_weights.unsqueeze(1) *"
        " state.problem.data[5]\n",
        "    return state.val_dots(s) * state.problem.task_weights.unsqueeze(1)\n",
        "validation samples count as if the loss were their sum",
    ),
    Mutation(
        ESTIMATORS,
        "    return at(tests.with_weights(l2=0.0), lam).gradient()\n",
        "    state = at(tests.with_weights(l2=0.0), lam)\n    return getattr(state,"
        " 'direct_gradient', state.gradient)()\n",
        "the metric's gradient is the direct one",
    ),
    Mutation(
        PROBLEMS,
        "        return found + self.penalty_weight * torch.eye(",
        "        return found + 0.5 * self.penalty_weight * torch.eye(",
        "the inner Hessian has half its penalty",
    ),
    Mutation(
        PROBLEMS,
        "return (ones if self.weights is None else self.weights.to(ones)) / self.n",
        "return (ones if self.weights is None else self.weights.to(ones)) / (self.n if self.weights"
        " is None else self.weights.sum())",
        "weights of tasks are normalised a second time",
    ),
    Mutation(
        TRAINING,
        "        for _ in range(2):\n",
        "        for _ in range(1):\n",
        "the composed objective is right to first order alone",
    ),
    Mutation(
        EPISODES,
        'order = np.random.default_rng(step_seed(seed, "labels", k,'
        " number)).permutation(y.shape[1])",
        "order = np.arange(y.shape[1])",
        "spoiled tasks keep their labels",
        ("experiments",),
    ),
    Mutation(
        BASELINES,
        "    return -state.problem.outer_losses(state.lam, state.theta)\n",
        "    return state.problem.outer_losses(state.lam, state.theta)\n",
        "a high loss counts as helpful",
        ("experiments",),
    ),
    Mutation(
        SCORE,
        "    share = torch.full((len(rows),), len(rows) / problem.n, dtype=torch.float64)\n",
        "    share = None\n",
        "tasks scored in pieces count as if there were no others",
        ("command",),
    ),
    Mutation(
        SCORE,
        "    scoring.check_converged(state.gradient(), work.tol)\n",
        "",
        "weights that are no minimum are scored",
        ("command",),
    ),
    Mutation(
        SCORE,
        '        "recipe": recipe,\n',
        '        "recipe": recipe.model_dump(exclude={"damping"}),\n',
        "pieces of another damping are taken",
        ("command",),
    ),
    Mutation(
        SCORE,
        '        "model": known,\n',
        '        "model": options.model,\n',
        "pieces of other weights are taken",
        ("command",),
    ),
    Mutation(
        SCORE,
        '        "model": known,\n',
        '        "model": lam,\n',
        "pieces of another model with the same weights are taken",
        ("command",),
    ),
]


if __name__ == "__main__":
    sys.exit(main(MUTATIONS, "meta_if", sys.argv[1:]))
