"""What FlashDP is measured against, each as a trainer with one `step(ids)`: the same model, loss,
noise and optimizer.

    non-private           plain backward
    FlashDP, explicit     per-layer clipping (ours, with one backend or the other)
    Opacus, per layer     Opacus's hooks with per-parameter thresholds: all per-sample gradients
                          are kept until the step
    Opacus, ghost         Opacus's ghost clipping: flat, two backwards
    Opacus, FGC           Opacus's fast gradient clipping: flat, two backwards, per-sample
                          gradients of one layer at a time
    GhostClip, BK         ghost clipping and book-keeping (Bu et al., arXiv 2210.00038) on the
                          same layers as FlashDP: flat clipping

Flat clipping takes one norm over all layers. It is another algorithm with another result; it stands
in the speed tables because the paper compares with it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from projects.flashdp import backends, labels, layers
from projects.flashdp.clipper import embedding_rows
from projects.flashdp.factors import TINY
from projects.flashdp.losses import per_sample_loss
from projects.flashdp.private import make_private
from projects.flashdp.refusals import covered
from projects.flashdp.sampling import FixedSampling, PoissonSampling
from shared.seeding import generator

Logits = Callable[[nn.Module, Tensor], Tensor]


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a plain module or of a transformers model."""
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


class Trainer:
    """One optimizer step a call, on ids [B, T], without privacy."""

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        *,
        lr: float = 1e-4,
        clip: float = 1.0,
        sigma: float = 1.0,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.batch_size, self.clip, self.sigma, self.seed = (
            model.train(),
            batch_size,
            clip,
            sigma,
            seed,
        )
        self.autocast = autocast
        self.optimizer: Any = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=0.0, foreach=False
        )
        self.steps = 0

    def step(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns the losses of the samples. `labels` [B, T] are the ids themselves where not
        given.
        """
        losses = self.backward(ids, ids if labels is None else labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return losses

    def losses(self, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, self.autocast, enabled=self.autocast is not None):
            logits = logits_of(self.model, ids)
        return per_sample_loss(logits.float(), labels)

    def backward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Until the gradients that the optimizer will take are there, but for noise that is added
        at the step.
        """
        losses = self.losses(ids, labels)
        losses.mean().backward()
        return losses.detach()


class PerLayer(Trainer):
    """FlashDP, or explicit per-layer clipping, by the name of a backend."""

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        *,
        backend: str = "auto",
        groups: str = "layer",
        sampling: PoissonSampling | None = None,
        **options: Any,
    ):
        super().__init__(model, batch_size, **options)
        self.private = make_private(
            model,
            self.optimizer,
            sampling or FixedSampling(batch_size, batch_size),
            noise_multiplier=self.sigma,
            clip=self.clip,
            groups=groups,  # type: ignore[arg-type]
            loss_reduction="mean",
            backend=backend,
            noise_seed=self.seed,
        )


class OpacusPerLayer(Trainer):
    """Opacus 1.x, hooks, one threshold a parameter."""

    def __init__(self, model: nn.Module, batch_size: int, **options: Any):
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPPerLayerOptimizer

        super().__init__(model, batch_size, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = GradSampleModule(model, loss_reduction="mean")
        count = sum(p.requires_grad for p in model.parameters())
        self.optimizer = DPPerLayerOptimizer(
            self.optimizer,
            noise_multiplier=self.sigma,
            max_grad_norm=[self.clip / count**0.5] * count,
            expected_batch_size=batch_size,
            loss_reduction="mean",
            generator=generator(self.seed, "opacus"),
        )

    def backward(self, ids: Tensor, labels: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # torch's word about backward hooks on inputs without a gradient
            warnings.simplefilter("ignore")
            return super().backward(ids, labels)


class OpacusFlat(Trainer):
    """Opacus 1.x, ghost clipping or fast gradient clipping: two backwards, one threshold."""

    def __init__(self, model: nn.Module, batch_size: int, *, ghost: bool, **options: Any):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping

        super().__init__(model, batch_size, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = GradSampleModuleFastGradientClipping(
                model, loss_reduction="mean", max_grad_norm=self.clip, use_ghost_clipping=ghost
            )
        self.optimizer = DPOptimizerFastGradientClipping(
            self.optimizer,
            noise_multiplier=self.sigma,
            max_grad_norm=self.clip,
            expected_batch_size=batch_size,
            loss_reduction="mean",
            generator=generator(self.seed, "opacus"),
        )

    def backward(self, ids: Tensor, labels: Tensor) -> Tensor:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = self.losses(ids, labels)
            DPTensorFastGradientClipping(self.model, self.optimizer, losses, "mean").backward()
        return losses.detach()


class Flat(Trainer):
    """Flat clipping on FlashDP's layers: `book_keeping` in one backward, otherwise
    GhostClip's two.
    """

    def __init__(self, model: nn.Module, batch_size: int, *, book_keeping: bool, **options: Any):
        super().__init__(model, batch_size, **options)
        self.clipper = _BookKeeping() if book_keeping else _Ghost()
        flow = layers.Flow(self.clipper)
        flow.checked = False
        for name, (layer, private) in covered(model).items():
            layers.privatise(layer, private, name, flow, flattened=False)

    def backward(self, ids: Tensor, labels: Tensor) -> Tensor:
        losses = self.losses(ids, labels)
        self.clipper.run(losses, self.clip)
        noise = generator(self.seed, "noise", self.steps, device=str(ids.device))
        for parameter in self.model.parameters():
            parameter.grad.add_(
                torch.empty_like(parameter).normal_(0, self.sigma * self.clip, generator=noise)
            ).div_(self.batch_size)
        return losses.detach()


class _BookKeeping:
    """Each layer's factors are kept until all norms are known; then one weighted product a
    layer.
    """

    def __init__(self) -> None:
        self.squares: list[Tensor] = []
        self.book: list[Callable[[Tensor], None]] = []

    def run(self, losses: Tensor, clip: float) -> None:
        losses.sum().backward()
        factors = _flat_factors(self.squares, clip)
        self.squares.clear()
        while self.book:
            self.book.pop()(factors)

    def matrix(
        self,
        layer: layers.Private,
        left: Tensor,
        right: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        g: Tensor,
    ) -> None:
        if weight is not None:
            self.squares.append(backends.gram_square_norms(left, right)[0])
            self.book.append(
                lambda c: _add(
                    weight, (left * c[:, None, None]).flatten(0, 1).T @ right.flatten(0, 1)
                )
            )
        if bias is not None:
            self.vectors(layer, {"bias": g.sum(1)})

    def embedding(self, layer: layers.Private, ids: Tensor, g: Tensor, weight: Tensor) -> None:
        token, owner, rows, squares = embedding_rows(ids, g, weight)
        self.squares.append(squares)
        self.book.append(
            lambda c: _add(
                weight, torch.zeros_like(weight).index_add_(0, token, rows * c[owner, None])
            )
        )

    def vectors(self, layer: layers.Private, gradients: Mapping[str, Tensor]) -> None:
        for key, gradient in gradients.items():
            parameter = getattr(layer, key)
            self.squares.append(gradient.flatten(1).square().sum(1))
            self.book.append(
                lambda c, p=parameter, s=gradient: _add(p, (c @ s.flatten(1)).view_as(p))
            )


class _Ghost:
    """A backward for the norms, and one of the weighted losses for the gradient."""

    def __init__(self) -> None:
        self.squares: list[Tensor] | None = None

    def run(self, losses: Tensor, clip: float) -> None:
        self.squares = []
        losses.sum().backward(retain_graph=True)
        factors = _flat_factors(self.squares, clip)
        self.squares = None
        (factors * losses).sum().backward()

    def matrix(
        self,
        layer: layers.Private,
        left: Tensor,
        right: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        g: Tensor,
    ) -> None:
        if self.squares is None:
            if weight is not None:
                _add(weight, left.flatten(0, 1).T @ right.flatten(0, 1))
        elif weight is not None:
            self.squares.append(backends.gram_square_norms(left, right)[0])
        if bias is not None:
            self.vectors(layer, {"bias": g.sum(1)})

    def embedding(self, layer: layers.Private, ids: Tensor, g: Tensor, weight: Tensor) -> None:
        if self.squares is None:
            _add(weight, torch.zeros_like(weight).index_add_(0, ids.flatten(), g.flatten(0, 1)))
        else:
            self.squares.append(embedding_rows(ids, g, weight)[3])

    def vectors(self, layer: layers.Private, gradients: Mapping[str, Tensor]) -> None:
        for key, gradient in gradients.items():
            if self.squares is None:
                _add(getattr(layer, key), gradient.sum(0))
            else:
                self.squares.append(gradient.flatten(1).square().sum(1))


def _flat_factors(squares: Sequence[Tensor], clip: float) -> Tensor:
    return (clip / (torch.stack(list(squares)).sum(0).sqrt() + TINY)).clamp(max=1)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def trainer(method: str, model: nn.Module, batch_size: int, **options: Any) -> Trainer:
    """A trainer by its name in `labels.METHODS`. It takes `model` over."""
    match method:
        case labels.NON_PRIVATE:
            return Trainer(model, batch_size, **options)
        case labels.EXPLICIT:
            return PerLayer(model, batch_size, backend="explicit", **options)
        case labels.FLASHDP:
            return PerLayer(model, batch_size, **options)
        case labels.OPACUS:
            return OpacusPerLayer(model, batch_size, **options)
        case labels.OPACUS_GHOST | labels.OPACUS_FGC:
            return OpacusFlat(model, batch_size, ghost=method == labels.OPACUS_GHOST, **options)
        case labels.GHOST_CLIP | labels.BOOK_KEEPING:
            return Flat(model, batch_size, book_keeping=method == labels.BOOK_KEEPING, **options)
    raise ValueError(f"no method '{method}'")
