"""What removing samples does to a model trained with SAM, from its final weights alone.

| kind | matrix A | right-hand side r_k | in the paper |
| --- | --- | --- | --- |
| `if` | H + l2 I | grad l_k(w) | the baseline that knows nothing of SAM |
| `sam_if` | Ht + l2 I | grad l_k(wt) | theorem 4.3: the perturbation frozen (Danskin) |
| `sam_hif` | J | grad l_k(wt) + c Ht P grad l_k(w) | theorem 4.5: the perturbation differentiated |

Signs and scale are those of `shared.influence`: the effect of removal is + A^-1 r_k m_k / n, and a
score is its product with the metric's gradient, so that a positive score of a loss is a helpful
sample. Symbols are those of `fixed_point`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from projects.sam_if.fixed_point import Curvature, Linearised, SAMProblem
from shared.errors import UserError
from shared.influence import solvers
from shared.influence.baselines import Metric, metric_gradient
from shared.influence.retrain import check_removed
from shared.influence.solvers import Solved

Kind = Literal["if", "sam_if", "sam_hif"]
Carriers = list[list[tuple[Tensor, Tensor]]]
KINDS: tuple[Kind, ...] = ("if", "sam_if", "sam_hif")
Solver = Literal["auto", "cg", "gcr", "gmres", "lsmr", "dense"]


@dataclass(frozen=True, eq=False)
class Estimator:
    """One of the estimators at the weights of a `Linearised` problem.

    Attributes:
        damping: added to the matrix; for curvature that is not positive.
        solver: "auto" is cg for the symmetric matrices and gcr for J; both solve for all queries
            together. Any of them is refused when the true residual is above `tol`.
        tol: relative residual.
        drop_eq9_term: leave out c Ht P grad l_k(w), the last term of the paper's equation 9 as its
            reviews tell of it; cheaper by a forward-mode pass, and far worse than leaving out both
            derivatives (see the ablation).
        drop_matrix_term: leave out c Ht P H; for the ablation.
    """

    at: Linearised
    kind: Kind = "sam_hif"
    damping: float = 0.0
    solver: Solver = "auto"
    tol: float = 1e-8
    drop_eq9_term: bool = False
    drop_matrix_term: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"there is no estimator '{self.kind}'; there are {', '.join(KINDS)}")
        if not 0 <= self.damping < float("inf"):
            raise UserError(f"damping must be a number of at least 0, not {self.damping:g}")

    # ---- the matrix ------------------------------------------------------------------------------

    @property
    def symmetric(self) -> bool:
        """Whether A is known to be: J is not, but where rho is 0 or its own term is left out."""
        return self.kind != "sam_hif" or self.drop_matrix_term or not self.at.problem.rho

    def matrix(self, v: Tensor) -> Tensor:
        """A v, without damping: [p] or [p, k]."""
        if self.kind == "if":
            return self.at.plain(v)
        return (
            self.at.frozen(v)
            if self.kind == "sam_if" or self.drop_matrix_term
            else self.at.jacobian(v)
        )

    def transposed(self, v: Tensor) -> Tensor:
        """A^T v."""
        return self.matrix(v) if self.symmetric else self.at.jacobian_transposed(v)

    def solve(self, b: Tensor, *, transposed: bool = False) -> Solved:
        """(A + damping I)^-1 b, or that of the transpose, with the true residual."""
        a, a_t = (self.transposed, self.matrix) if transposed else (self.matrix, self.transposed)
        name = ("cg" if self.symmetric else "gcr") if self.solver == "auto" else self.solver
        options = {"damping": self.damping, "tol": self.tol}
        match name:
            case "cg":
                return solvers.cg(a, b, **options)
            case "gcr":
                return solvers.gcr(a, b, **options)
            case "gmres":
                return solvers.gmres(a, b, **options)
            case "lsmr":
                return solvers.lsmr(a, b, transpose=a_t, **options)
            case "dense":
                return solvers.dense(a, b, **options)
        raise UserError(f"there is no solver '{name}'; there are cg, gcr, gmres, lsmr, dense")

    # ---- scores: one solve per query -------------------------------------------------------------

    def scores(self, metric: Metric) -> Tensor:
        """Predicted change of the metric when each sample is removed: [n], or [n, q] for a metric
        [q].

        One solve with the transpose, then two forward-mode passes and a curvature product (one pass
        for the other two kinds), whatever n.
        """
        return self.along(self.solve(metric_gradient(metric, self.at.w), transposed=True)[0])

    def along(self, s: Tensor) -> Tensor:
        """s . r_k m_k / n of every sample for s = A^-T grad metric, [p] or [p, q]."""
        return self.score_samples(self.carriers(s))

    def carriers(self, s: Tensor) -> Carriers:
        """s . r_k as derivatives of l_k: for each batch the points and the directions in which its
        samples' losses are differentiated.

        s . c Ht P grad l_k(w) is (c P Ht s) . grad l_k(w), so that all samples share one curvature
        product.
        """
        found: Carriers = []
        for one in self.at.pieces:
            own = [(self.at.w if self.kind == "if" else one.wt, s)]
            if self.kind == "sam_hif" and not self.drop_eq9_term and one.c:
                own.append((self.at.w, one.c * one.project(one.there(s))))
            found.append(own)
        return found

    def score_samples(self, carriers: Carriers, rows: slice | None = None) -> Tensor:
        """Scores of a range of the samples (all by default) from `carriers`: [rows] or
        [rows, q].
        """
        objective = self.at.problem.objective
        wanted = torch.arange(objective.n)[rows or slice(None)]
        out = self.at.w.new_zeros(len(wanted), *carriers[0][0][1].shape[1:])
        for one, own in zip(self.at.pieces, carriers, strict=True):
            places = torch.isin(wanted, one.rows.cpu()).nonzero().flatten()
            if len(places):
                # nothing is copied where one batch holds all samples, in order
                whole = len(places) == objective.n
                part = replace(
                    objective,
                    data=(
                        objective.data
                        if whole
                        else tuple(x[wanted[places]] for x in objective.data)
                    ),
                    weights=None,
                )
                out[places] = sum(
                    (part.sample_dots(at, v) for at, v in own), start=torch.zeros_like(out[places])
                )
        weights = objective.removal_weights(self.at.w)[wanted]
        return out * (weights if out.dim() == 1 else weights.unsqueeze(1))

    # ---- changes of the parameters ---------------------------------------------------------------

    def right_hand_side(self, weights: Tensor) -> Tensor:
        """sum_k weights_k r_k: [n] -> [p], several sets as columns [n, k] -> [p, k]."""
        if self.kind == "if":
            return self.at.plain_sums(weights)
        total = self.at.frozen_sums(weights)
        if self.kind == "sam_hif" and not self.drop_eq9_term and self.at.problem.rho:
            total = total + self.at.direct_sums(weights)
        return total

    def removal_effects(self, samples: Sequence[int]) -> Tensor:
        """Predicted w_without_k - w for each of the samples: columns of [p, samples]."""
        ids = check_removed(samples, self.at.problem.objective.n)
        weights = self.at.w.new_zeros(self.at.problem.objective.n, len(ids))
        weights[ids, torch.arange(len(ids))] = self.at.problem.objective.removal_weights(self.at.w)[
            ids
        ]
        return self.solve(self.right_hand_side(weights))[0]

    def removal_effect(self, samples: Sequence[int]) -> Tensor:
        """Predicted w_without_all_of_them - w, [p]: to first order effects add. One solve: model
        editing.
        """
        return self.joint_effects([samples])[:, 0]

    def joint_effects(self, sets: Sequence[Sequence[int]]) -> Tensor:
        """The same for several sets of samples: columns of [p, sets]."""
        objective, sides = self.at.problem.objective, []
        for samples in sets:
            ids = check_removed(samples, objective.n)
            weights = self.at.w.new_zeros(objective.n)
            weights[ids] = objective.removal_weights(self.at.w)[ids]
            sides.append(self.right_hand_side(weights))
        return self.solve(torch.stack(sides, 1))[0]


def estimate(
    problem: SAMProblem,
    w: Tensor,
    metric: Metric,
    kind: Kind = "sam_hif",
    *,
    curvature: Curvature = "hessian",
    damping: float = 0.0,
) -> Tensor:
    """Scores of all samples for a metric in one call; see `Estimator`."""
    return Estimator(problem.at(w, curvature), kind, damping).scores(metric)


influence = partial(estimate, kind="if")
sam_if = partial(estimate, kind="sam_if")
sam_hif = partial(estimate, kind="sam_hif")
