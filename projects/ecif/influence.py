"""ECIF: the influence of an image-text pair on a contrastively trained model, as a positive and as
a negative.

The objective over m fixed batches is L(w) = (1/m) sum_b L_b(w) + (delta / 2m) |w - theta_0|^2,
which is the paper's sum over m. Deleting a group D takes G_D = (1/m) sum_b [Pos + Neg](D in b) away
from it, so that

    removal effect   theta_without_D - theta ~ H^-1 grad G_D              (minus the paper's
    positive-IF + negative-IF) score            IS = grad metric . H^-1 grad G_D
    (predicted change of the metric; below 0: harmful)

A sample of `shared.influence` is here a whole batch; scores of its pairs come from one forward-mode
pass along s = H^-1 grad metric.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev

from projects.ecif.loss import Mode, Parts, batch_losses, group_losses, removal_losses
from projects.ecif.pairs import Pairs
from projects.ecif.towers import Towers
from shared.errors import UserError
from shared.influence import products
from shared.influence.baselines import Metric, Solve, metric_gradient
from shared.influence.objective import Objective
from shared.influence.products import Data, chunks, note


@dataclass(frozen=True, eq=False)
class Contrastive:
    """A contrastive training problem.

    Attributes:
        towers: the model.
        pairs: what it is trained on, in fixed batches.
        delta: weight of the regulariser beside the sum of batch losses, as in the paper.
        centre: theta_0 [p], what it pulls to; None is 0, with which a scale-free cosine has no
            minimum.
        chunk: batches handled at once; None means all.
    """

    towers: Towers
    pairs: Pairs
    delta: float
    centre: Tensor | None = None
    chunk: int | None = None

    # ---- the problem -----------------------------------------------------------------------------

    def objective(self, batches: slice = slice(None)) -> Objective:
        """L(w) with its products; its n is the number of batches. The Gauss-Newton matrix takes S
        for the outputs.

        Of some `batches`, which are in random order: an estimate of the whole at their share of its
        cost.
        """

        def outputs(w: Tensor, data: Data) -> Tensor:
            return self.towers.logits(w, data[:-1])

        def losses(s: Tensor, data: Data) -> Tensor:
            return batch_losses(s, data[-1])

        data, l2 = tuple(part[batches] for part in self.pairs.data), self.delta / self.pairs.batches
        return Objective.of_outputs(outputs, losses, data, l2, centre=self.centre, chunk=self.chunk)

    def without(self, removed: Iterable[int]) -> "Contrastive":
        """The same problem without some pairs: the partition, m and theta_0 stay."""
        return Contrastive(
            self.towers, self.pairs.without(removed), self.delta, self.centre, self.chunk
        )

    def losses_of_layers(self, w: Tensor, rows: Tensor) -> Callable[[Tensor, Data], Tensor]:
        """(the entries `rows` of the parameters, some batches) -> the batches' losses, [b], with
        all else as in w.
        """

        def losses(part: Tensor, data: Data) -> Tensor:
            whole = w.detach().index_copy(0, rows, part)
            return batch_losses(self.towers.logits(whole, data[:-1]), data[-1])

        return losses

    def mean_loss(self, w: Tensor) -> Tensor:
        """The mean over pairs of the contrastive loss, without the regulariser: what a validation
        set is for.
        """
        totals = [
            batch_losses(self.towers.logits(w, piece[:-1]), piece[-1]).sum()
            for piece in chunks(self.pairs.data, self.chunk)
        ]
        return torch.stack(totals).sum() / self.pairs.present.sum()

    def mean_gradient(self, w: Tensor) -> Tensor:
        """grad mean_loss at w, [p]: with one chunk's graph at a time, where autodiff of `mean_loss`
        keeps all of them.
        """
        note("gradients")
        total = torch.zeros_like(w)
        for piece in chunks(self.pairs.data, self.chunk):

            def loss(at: Tensor, piece: Data = piece) -> Tensor:
                return batch_losses(self.towers.logits(at, piece[:-1]), piece[-1]).sum()

            total = total + grad(loss)(w)
        return total / self.pairs.present.sum()

    # ---- one removal -----------------------------------------------------------------------------

    def removal_gradient(
        self, w: Tensor, removed: Iterable[int], mode: Mode = "exact", parts: Parts = "both"
    ) -> Tensor:
        """grad G_D at w, [p]: what deleting the pairs takes from the objective's gradient."""
        gone = self.pairs.mask(removed)
        touched = gone.any(-1)
        data = tuple(part[touched] for part in (*self.pairs.data, gone))
        note("gradients")
        total = torch.zeros_like(w)
        for piece in chunks(data, self.chunk) if touched.any() else ():

            def taken(at: Tensor, piece: Data = piece) -> Tensor:
                return group_losses(
                    self.towers.logits(at, piece[:-2]), piece[-2], piece[-1], mode, parts
                ).sum()

            total = total + grad(taken)(w)
        return total / self.pairs.batches

    def removal_effect(
        self,
        w: Tensor,
        groups: Sequence[Iterable[int]],
        solve: Solve,
        mode: Mode = "exact",
        parts: Parts = "both",
    ) -> Tensor:
        """Predicted change of the parameters without each of the groups of pairs: columns of [p,
        groups].
        """
        if not groups:
            raise UserError("nothing to remove: give at least one group of pairs")
        return solve(
            torch.stack([self.removal_gradient(w, group, mode, parts) for group in groups], 1)
        )[0]

    # ---- every pair ------------------------------------------------------------------------------

    def scores_along(
        self,
        w: Tensor,
        s: Tensor,
        mode: Mode = "exact",
        parts: Parts = "both",
        batches: slice = slice(None),
    ) -> Tensor:
        """s . grad G_n of every place of the batches, [b, B], or for several s [p, q], [b, B, q]:
        one forward-mode pass each.
        """
        data = tuple(part[batches] for part in self.pairs.data)

        def taken(at: Tensor, piece: Data) -> Tensor:
            return removal_losses(self.towers.logits(at, piece[:-1]), piece[-1], mode, parts)

        return products.per_sample_dots(taken, w, data, s, self.chunk) / self.pairs.batches

    def scores(
        self, w: Tensor, metric: Metric, solve: Solve, mode: Mode = "exact", parts: Parts = "both"
    ) -> Tensor:
        """IS of every pair for a metric: its predicted change when the pair is removed, [n] or for
        q metrics [n, q].

        One solve and one forward-mode pass per metric. For a metric that is a loss, the most
        negative pairs are the most harmful.
        """
        return self.pairs.by_pair(
            self.scores_along(w, solve(metric_gradient(metric, w))[0], mode, parts)
        )

    def place_gradients(
        self, w: Tensor, mode: Mode = "exact", parts: Parts = "both", batches: slice = slice(None)
    ) -> Tensor:
        """grad G_n of every place of the batches, [b, B, p]: B backward passes a batch."""

        def one(batch: Data) -> Tensor:
            return jacrev(
                lambda at: removal_losses(
                    self.towers.logits(at, batch[:-1]), batch[-1], mode, parts
                )
            )(w)

        note("per_sample_gradients")
        data = tuple(part[batches] for part in self.pairs.data)
        return (
            torch.stack([one(tuple(part[b] for part in data)) for b in range(len(data[0]))])
            / self.pairs.batches
        )

    def pair_gradients(self, w: Tensor, mode: Mode = "exact", parts: Parts = "both") -> Tensor:
        """grad G_n of every pair, [n, p]."""
        return self.pairs.by_pair(self.place_gradients(w, mode, parts))

    def self_influence(
        self, w: Tensor, solve: Solve, mode: Mode = "exact", parts: Parts = "both"
    ) -> Tensor:
        """grad G_n . H^-1 grad G_n of every pair, [n]: how much what the pair is responsible for
        would rise without it.

        A right-hand side per pair: for solvers that factor once, or in a projection.
        """
        gradients = self.pair_gradients(w, mode, parts)
        return (gradients * solve(gradients.T)[0].T).sum(1)

    def relative_scores(
        self, w: Tensor, metric: Metric, solve: Solve, mode: Mode = "exact"
    ) -> "Relative":
        """The influence of every pair at a bounded change of the parameters, for tracing one query
        back.

        IS is led by pairs that move the parameters much, whatever the query. With a = H^-1 grad Pos
        and b = H^-1 grad Neg of a pair and g = grad metric, the largest first-order change of the
        metric that any combination of the two of length 1 can make is the length of the projection
        of g on their span. Where a and b are parallel, or one is 0, the span has one dimension, and
        none where both are 0. (The paper's proposition 5.3 was not at hand; this solves the problem
        that it states.)
        """
        return relative(*self.pair_effects(w, solve, mode), metric_gradient(metric, w))

    def pair_effects(self, w: Tensor, solve: Solve, mode: Mode = "exact") -> tuple[Tensor, Tensor]:
        """H^-1 grad Pos and H^-1 grad Neg of every pair, [n, p] each: the effects of its two
        parts.
        """
        gradients = (self.pair_gradients(w, mode, parts) for parts in ("positive", "negative"))
        positive, negative = (solve(one.T)[0].T for one in gradients)
        return positive, negative


class Relative(NamedTuple):
    """Relative influence of every pair, [n] each, or for q queries [n, q].

    Attributes:
        span: length of the projection of the metric's gradient on the span of the pair's two
            effects: not negative, for tracing back.
        signed: IS over the length of the removal effect: its sign is that of IS.
    """

    span: Tensor
    signed: Tensor


def relative(a: Tensor, b: Tensor, g: Tensor, tolerance: float = 1e-9) -> Relative:
    """Relative influence of effects a and b [n, p] on the gradient g [p] of a query, or on those of
    q queries [p, q]; `tolerance` is the sine below which a and b count as parallel.
    """
    floor = torch.finfo(a.dtype).tiny
    along_a = _unit(a, floor)
    b_left = b - (b * along_a).sum(1, keepdim=True) * along_a
    independent = b_left.norm(dim=1, keepdim=True) > tolerance * b.norm(dim=1, keepdim=True)
    along_b = torch.where(independent, _unit(b_left, floor), 0.0)
    span = ((along_a @ g).square() + (along_b @ g).square()).sqrt()
    return Relative(span, _unit(a + b, floor) @ g)


def _unit(rows: Tensor, floor: float) -> Tensor:
    """Rows of length 1; 0 stays 0."""
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length > floor, rows / length.clamp(min=floor), 0.0)
