"""MeZO-SGD (Malladi et al., arXiv 2305.17333), as published: the reference that ZO2 must equal to
the last bit.

Every parameter is in memory, z is drawn anew four times a step, and nothing is clever. It shares no
code with the engine. Each expression is that of the authors' trainer, so that every rounding is:

- perturbation: `theta + scale * z * eps`, with scale 1, -2 and 1;
- projected gradient: `((loss_plus - loss_minus) / (2 * eps)).item()`, in the dtype of the losses;
- update: `theta - lr * (g * z + weight_decay * theta)`, and `theta - lr * (g * z)` for parameters
  that do not decay.

Ours are: a loss that is not finite leaves no update (there it makes every weight NaN), and a step
may average micro-batches.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]

# parts of the names of parameters that weight decay leaves alone, as published
NO_DECAY = ("bias", "layer_norm", "layernorm")


def model_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss a Hugging Face model computes from its own labels."""
    return model(**batch).loss


class MeZO:
    """Zeroth-order SGD on the trainable ones of `parameters` (default: all of the model's, in
    registration order).

    The noise of a step is drawn in the order of `parameters`. `loss(model, batch)` returns a
    scalar. `lr` may be a function of the step number.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
        lr: float | Callable[[int], float] = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        no_decay: Sequence[str] = NO_DECAY,
        loss: Loss = model_loss,
    ):
        named = model.named_parameters() if parameters is None else parameters
        self.parameters = [(name, p) for name, p in named if p.requires_grad]
        self.model, self.lr, self.eps, self.weight_decay, self.no_decay, self.loss = (
            model,
            lr,
            eps,
            weight_decay,
            no_decay,
            loss,
        )
        self.steps = 0

    def perturb(self, seed: int, scale: float) -> None:
        """theta = theta + scale * z * eps, with the z of `seed`."""
        generators = self._generators(seed)
        for _, theta in self.parameters:
            z = torch.normal(
                0.0,
                1.0,
                theta.shape,
                generator=generators[theta.device],
                device=theta.device,
                dtype=theta.dtype,
            )
            theta.data = theta.data + scale * z * self.eps

    @torch.no_grad()
    def step(self, batch: Any, seed: int) -> tuple[float, float]:
        """One step on `batch` (a list: its micro-batches, averaged); returns the loss at theta +
        eps z and the projected gradient.

        A loss that is not finite leaves the parameters without an update.
        """
        self.model.eval()
        micro_batches = batch if isinstance(batch, list) else [batch]
        self.perturb(seed, +1)
        plus = self._mean_loss(micro_batches)
        self.perturb(seed, -2)
        minus = self._mean_loss(micro_batches)
        self.perturb(seed, +1)
        g = ((plus - minus) / (2 * self.eps)).item()
        lr = self.lr(self.steps) if callable(self.lr) else self.lr
        self.steps += 1
        if g - g == 0:  # neither NaN nor infinite
            generators = self._generators(seed)
            for name, theta in self.parameters:
                z = torch.normal(
                    0.0,
                    1.0,
                    theta.shape,
                    generator=generators[theta.device],
                    device=theta.device,
                    dtype=theta.dtype,
                )
                if any(part in name for part in self.no_decay):
                    theta.data = theta.data - lr * (g * z)
                else:
                    theta.data = theta.data - lr * (g * z + self.weight_decay * theta.data)
        return plus.item(), g

    def _mean_loss(self, micro_batches: list[Any]) -> Tensor:
        """A scalar in the dtype of the losses; the mean is formed in float64."""
        losses = [self.loss(self.model, batch) for batch in micro_batches]
        mean = sum(loss.item() for loss in losses) / len(losses)
        return torch.tensor(mean, dtype=losses[0].dtype, device=losses[0].device)

    def _generators(self, seed: int) -> dict[torch.device, torch.Generator]:
        devices = {theta.device for _, theta in self.parameters}
        return {device: torch.Generator(device).manual_seed(seed) for device in devices}
