"""What a model was trained on: L(w) = (1/n) sum_i m_i l_i(w) + (l2/2) |w - centre|^2, gone through
in chunks.

A sample is whatever the losses make of a row of the data: an image, a task, a whole batch whose
pairs depend on one another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import grad

from shared.errors import UserError
from shared.influence import products
from shared.influence.products import Data, Losses, chunks, note
from shared.seeding import generator

Operator = Callable[[Tensor], Tensor]  # a matrix as its product: [p] -> [p] and [p, k] -> [p, k]


def class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each sample: logits [..., classes] and labels [...] -> [...].

    The same numbers as torch's, and curvature products through it take two thirds of the time: the
    derivative of torch's backward takes the exponentials anew, that of logsumexp's keeps them.
    """
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def class_curvature(logits: Tensor) -> Tensor:
    """The Hessian of each of `class_losses` in its logits, which is the same for every label:
    [..., classes] -> [..., classes, classes].
    """
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class Objective:
    """L(w) = (1/n) sum_i m_i l_i(w) + (l2/2) |w - centre|^2.

    Attributes:
        losses: (w [p], data of some samples) -> their losses, [samples].
        data: tensors whose first dimension is the n samples.
        l2: weight of the regulariser.
        weights: m [n]; None means 1 everywhere. A removed sample has 0, and n stays n.
        centre: where the regulariser pulls to, [p]; None means 0.
        chunk: samples handled at once; None means all.
        outputs, output_losses: the losses in two steps, for Gauss-Newton products
            (`Objective.of_outputs` sets all three).
    """

    losses: Losses
    data: Data
    l2: float = 0.0
    weights: Tensor | None = None
    centre: Tensor | None = None
    chunk: int | None = None
    outputs: Callable[[Tensor, Data], Tensor] | None = None
    output_losses: Callable[[Tensor, Data], Tensor] | None = None

    def __post_init__(self) -> None:
        sizes = {part.shape[0] for part in self.data}
        if len(sizes) != 1:
            raise UserError(
                f"the data's tensors hold {', '.join(map(str, sorted(sizes)))} samples; they must"
                " hold the same number"
            )
        if sizes == {0}:
            raise UserError("the data hold no samples")
        if self.weights is not None and self.weights.shape != (self.n,):
            raise UserError(
                f"there are {self.n} samples and weights of shape {tuple(self.weights.shape)}; give"
                " one weight per sample"
            )

    @classmethod
    def of_outputs(
        cls,
        outputs: Callable[[Tensor, Data], Tensor],
        output_losses: Callable[[Tensor, Data], Tensor],
        data: Data,
        l2: float = 0.0,
        weights: Tensor | None = None,
        centre: Tensor | None = None,
        chunk: int | None = None,
    ) -> "Objective":
        """An objective whose losses are output_losses(outputs(w, data), data), so that it has
        Gauss-Newton products too.
        """

        def losses(w: Tensor, part: Data) -> Tensor:
            return output_losses(outputs(w, part), part)

        return cls(losses, data, l2, weights, centre, chunk, outputs, output_losses)

    @property
    def n(self) -> int:
        """How many samples there are, removed ones included."""
        return self.data[0].shape[0]

    def __call__(self, w: Tensor) -> Tensor:
        """L(w), a scalar; all samples at once where it is differentiated."""
        total = sum((self._part(piece, w) for piece in self._pieces()), start=w.new_zeros(()))
        return total + self._regulariser(w)

    def sample_losses(self, w: Tensor) -> Tensor:
        """l_i(w) of every sample, unweighted, [n]. UserError when one is not finite."""
        with torch.no_grad():
            found = torch.cat([self.losses(w, piece) for piece in chunks(self.data, self.chunk)])
        bad = (~found.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"the loss of sample {bad[0]} is {found[bad[0]]:g} ({len(bad)} of {self.n} are not"
                " finite); look at the data"
            )
        return found

    def gradient(self, w: Tensor) -> Tensor:
        """grad L(w), [p]."""
        note("gradients")
        total = sum(
            (grad(partial(self._part, piece))(w) for piece in self._pieces()),
            start=torch.zeros_like(w),
        )
        return total + self.l2 * self._away(w)

    def hvp(self, w: Tensor, v: Tensor) -> Tensor:
        """Hessian of L at w times v: [p] -> [p], [p, k] -> [p, k]."""
        note("curvature_products", 1 if v.dim() == 1 else v.shape[1])
        total = self.l2 * v
        for piece in self._pieces():
            total = total + products.plain_hvp(partial(self._part, piece), w, v)
        return total

    def ggn_vp(self, w: Tensor, v: Tensor) -> Tensor:
        """Gauss-Newton matrix of L at w, regulariser included, times v: [p] -> [p], [p, k] -> [p,
        k].
        """
        note("curvature_products", 1 if v.dim() == 1 else v.shape[1])
        total = self.l2 * v
        for outputs, loss in self._steps():
            total = total + products.plain_ggn_vp(outputs, loss, w, v)
        return total

    def hessian(self, w: Tensor) -> Operator:
        """The Hessian at w as an operator, for the solvers. Its graph is kept between products,
        unless the data go in chunks.
        """
        if self.chunk is not None:
            return lambda v: self.hvp(w, v)
        (piece,) = self._pieces()
        return self._counted(products.prepared_hvp(partial(self._part, piece), w))

    def ggn(self, w: Tensor) -> Operator:
        """The Gauss-Newton matrix at w as an operator, for the solvers; as `hessian`."""
        if self.chunk is not None:
            return lambda v: self.ggn_vp(w, v)
        ((outputs, loss),) = self._steps()
        return self._counted(products.prepared_ggn_vp(outputs, loss, w))

    def _counted(self, product: Operator) -> Operator:
        def counted(v: Tensor) -> Tensor:
            note("curvature_products", 1 if v.dim() == 1 else v.shape[1])
            return self.l2 * v + product(v)

        return counted

    def _steps(self) -> list[tuple[products.Function, products.Function]]:
        """For each piece of the data its outputs as a function of w, and their weighted loss."""
        if self.outputs is None or self.output_losses is None:
            raise UserError(
                "Gauss-Newton products need the losses in two steps; make the objective with"
                " Objective.of_outputs"
            )
        outputs, output_losses = self.outputs, self.output_losses

        def of(data: Data, weights: Tensor | None) -> tuple[products.Function, products.Function]:
            return lambda at: outputs(at, data), lambda at: self._mean(
                output_losses(at, data), weights
            )

        return [of(data, weights) for data, weights in self._pieces()]

    def sampled_hessians(self, w: Tensor, batch: int, seed: int) -> Callable[[int], Operator]:
        """step -> the Hessian of L on a batch drawn for that step, without bias: what LiSSA
        takes.
        """

        def at_step(step: int) -> Operator:
            rows = torch.randint(self.n, (batch,), generator=generator(seed, "lissa", step)).to(
                self.data[0].device
            )
            weights = None if self.weights is None else self.weights[rows]
            part = Objective(
                self.losses,
                tuple(one[rows] for one in self.data),
                self.l2,
                weights,
                self.centre,
                self.chunk,
            )
            return part.hessian(w)

        return at_step

    def sample_gradients(self, w: Tensor, rows: Tensor | None = None) -> Tensor:
        """grad l_i(w), unweighted, of the samples `rows` (all by default): [rows, p]."""
        data = self.data if rows is None else tuple(part[rows] for part in self.data)
        return products.per_sample_gradients(self.losses, w, data, self.chunk)

    def sample_dots(self, w: Tensor, directions: Tensor) -> Tensor:
        """grad l_i(w) . v, unweighted, of every sample by forward mode: [n] for [p], [n, k] for [p,
        k].
        """
        return products.per_sample_dots(self.losses, w, self.data, directions, self.chunk)

    def removal_weights(self, w: Tensor) -> Tensor:
        """What removing sample i takes from the coefficient of l_i, m_i / n: [n], of the dtype of
        w.
        """
        weights = w.new_ones(self.n) if self.weights is None else self.weights.to(w)
        return weights / self.n

    def _pieces(self) -> list[tuple[Data, Tensor | None]]:
        data = list(chunks(self.data, self.chunk))
        weights: list[Tensor | None] = [None] * len(data)
        if self.weights is not None:
            weights = [piece[0] for piece in chunks((self.weights,), self.chunk)]
        return list(zip(data, weights, strict=True))

    def _part(self, piece: tuple[Data, Tensor | None], w: Tensor) -> Tensor:
        return self._mean(self.losses(w, piece[0]), piece[1])

    def _mean(self, losses: Tensor, weights: Tensor | None) -> Tensor:
        return (losses if weights is None else losses * weights).sum() / self.n

    def _away(self, w: Tensor) -> Tensor:
        return w if self.centre is None else w - self.centre

    def _regulariser(self, w: Tensor) -> Tensor:
        return self.l2 / 2 * self._away(w).square().sum()
