"""Data attribution: what would a model be, had it been trained without some of its data?

Everything works on a flat vector of parameters `w` [p] and pure functions of it.

    parameters = Parameters.of(model.eval())
    objective = Objective.of_outputs(
        lambda w, data: parameters.call(w, data[0]),
        lambda z, data: class_losses(z, data[1]),
        (x, y), l2=1e-3, chunk=1000,
    )
    w = parameters.flat()
    metric = lambda w: cross_entropy(parameters.call(w, x_test), y_test)
    scores = influence(objective, w, metric, partial(cg, objective.hessian(w)))          # [n]

| module | what |
| --- | --- |
| `params` | a model as a function of a flat vector |
| `products` | gradients, Hessian and Gauss-Newton products, directional derivatives; counts |
| `objective` | weighted mean of sample losses plus l2, chunked over data: value and products |
| `solvers` | x with A x = b from products with A alone, each with its true residual |
| `ekfac` | the EK-FAC approximation of a second moment of gradients, and its inverse |
| `baselines` | influence, TracIn, TRAK, gradient dot product, loss, chance, in one convention |
| `peers` | the same scores from dattri, kronfluence and captum |
| `retrain` | what the scores predict, found by retraining; shares no code with the estimators |
| `evaluate` `noise` | agreement with the truth; labels and captions corrupted on purpose |
| `scoring` | what a `score` command needs: checks, chunks that survive a kill, a file of scores |

One convention of signs and scale, everywhere:

* The objective is L(w) = (1/n) sum_i m_i l_i(w) + regulariser, with m_i = 1. **Up-weighting**
  sample k by delta adds delta l_k(w).
* **Removal** of k is m_k = 0, that is delta = -1/n: the 1/n of the others stays, nothing is divided
  by n - 1.
* `removal_effect(k)` predicts w_without_k - w. For a minimiser with Hessian H it is + H^-1 grad
  l_k(w) / n.
* `score(k, metric)` predicts metric(w_without_k) - metric(w) = grad metric . removal_effect(k). For
  a metric that is a loss a **positive score means a helpful sample**: without it the loss rises.
  `harm = -score`.
"""
