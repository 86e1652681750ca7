"""Mutations of meta-IF, each of which must turn the tests red.

    python tests/projects/meta_if/mutations.py            # all; some minutes on two cores
    python tests/projects/meta_if/mutations.py inner      # those whose reason contains the word

Exit status 1 when one survives, or when the text it replaces is no longer there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutating import Mutation, main

TOTAL, PROBLEMS, ESTIMATORS, TRAINING, EPISODES, BASELINES, SCORE, CLAIMS = (
    f"projects/meta_if/{name}.py"
    for name in (
        "total",
        "problems",
        "estimators",
        "training",
        "data",
        "baselines",
        "score",
        "claims",
    )
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
        "            return in_lam - pull(self._solve(in_theta, rows))[0]\n",
        "            return in_lam\n",
        "the products forget the second inner solve",
    ),
    Mutation(
        TOTAL,
        "return self._followed(self._bends(self._lagrangian, rows), rows)",
        "return self._followed(self._bends(self._outer, rows), rows)",
        "the third derivatives are left out of the exact product",
    ),
    Mutation(
        TOTAL,
        "in_lam, in_theta = bend((v, -self._solve(push(v)[0], rows)))",
        "in_lam, in_theta = bend((v, self._solve(push(v)[0], rows)))",
        "the task parameters move the wrong way in products",
    ),
    Mutation(
        TOTAL,
        "        return -self._solve(jvp(lambda lam: self._inner_slope",
        "        return self._solve(jvp(lambda lam: self._inner_slope",
        "the task parameters move the wrong way",
    ),
    Mutation(
        TOTAL,
        "        if curvature in self._products:\n            return self._products[curvature]\n",
        "        if self._products:\n            return next(iter(self._products.values()))\n",
        "the graph of one curvature is taken for another's",
    ),
    Mutation(
        TOTAL,
        "        if len(self.problem.chunks()) == 1:\n",
        "        if True:\n",
        "the graph of one chunk of tasks is taken for another's",
    ),
    Mutation(
        TOTAL,
        "return (weights.unsqueeze(1) * w * vmap(problem.sample_losses)(z, y)).sum()",
        "return (weights.unsqueeze(1) / w.shape[1] * vmap(problem.sample_losses)(z, y)).sum()",
        "Gauss-Newton ignores validation weights",
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
        ESTIMATORS,
        "    return at(tests.with_weights(l2=0.0), lam).gradient()\n",
        "    return at(tests, lam).gradient()\n",
        "the metric's gradient has the test tasks' regulariser in it",
    ),
    Mutation(
        ESTIMATORS,
        "return float(Composed(tests.with_weights(l2=0.0)).value(lam))",
        "return float(Composed(tests).value(lam))",
        "the metric has the test tasks' regulariser in it",
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
        "        for _ in range(order):\n",
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
        EPISODES,
        "x_val[shown] += patterns[tasks.y_val[shown]]",
        "x_val[shown] += patterns[tasks.y_val[shown] - 1]",
        "validation images show other labels than training images",
        ("experiments",),
    ),
    Mutation(
        EPISODES,
        "x_train[shown] += patterns[tasks.y_train[shown]]",
        "x_train += patterns[tasks.y_train]",
        "all tasks show their labels",
        ("experiments",),
    ),
    Mutation(
        CLAIMS,
        "if all(near) and all(better):",
        "if all(near):",
        "what is no nearer than no edit counts as near",
        ("claims",),
    ),
    Mutation(
        CLAIMS,
        "if wide[own].mean() <= NEAR and whole.low > 0",
        "if wide[own].mean() <= NEAR",
        "over all data sets no edit need not be beaten",
        ("claims",),
    ),
    Mutation(
        CLAIMS,
        "for other in (labels.ALL_TASKS, labels.RANDOM)",
        "for other in (labels.ALL_TASKS,)",
        "a removal need not help more than that of random tasks",
        ("claims",),
    ),
    Mutation(
        CLAIMS,
        "return mean.value > 0.9 and mean.low > 0.8 and gain.low > 0",
        "return mean.value > 0.9 and mean.low > 0.8",
        "a random order need not be beaten",
        ("claims",),
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
