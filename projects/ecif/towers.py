"""Two towers as a function of a flat vector of their trainable parameters: w, a batch's inputs ->
its logits S.

`TwoTower` has frozen features below and linear heads that are trained; `Clip` is a CLIP of
transformers, as a rule with LoRA adapters. Both end in the smoothed cosine over a learnable
temperature.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from projects.ecif.loss import logits
from shared.errors import UserError
from shared.influence.params import Parameters
from shared.seeding import generator

# of red, green and blue, as CLIP's own image processor has them
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class Towers(Protocol):
    """What the influence functions need of a model."""

    parameters: Parameters

    def logits(self, w: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """S [..., B, B] of batches whose inputs are [..., B, ...], text i against image j."""
        ...


def linear_layers(whole: Parameters) -> tuple[Parameters, Tensor]:
    """The trained parameters without the temperature, and where they lie in w, [rows]."""
    names = [name for name in whole.names if not name.endswith(("log_tau", "logit_scale"))]
    layers = Parameters.of(whole.model, names, whole.dtype)
    rows = torch.cat(
        [torch.arange(whole.slices[name].start, whole.slices[name].stop) for name in layers.names]
    )
    return layers, rows.to(next(whole.model.parameters()).device)


class Heads(nn.Module):
    """A linear head per modality and log tau: features [..., t] and [..., v] to embeddings [...,
    d].

    They begin as random near-isometries drawn from `seed`, with log tau at log(1 / scale): the
    theta_0 that the regulariser pulls towards.
    """

    def __init__(self, text_size: int, image_size: int, size: int, seed: int = 0, tau: float = 0.2):
        super().__init__()
        self.text, self.image = (
            nn.Linear(text_size, size, bias=False),
            nn.Linear(image_size, size, bias=False),
        )
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau)))
        with torch.no_grad():
            for name, head in (("text", self.text), ("image", self.image)):
                head.weight.copy_(
                    torch.randn(head.weight.shape, generator=generator(seed, "head", name))
                    / size**0.5
                )

    def forward(self, texts: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.text(texts), self.image(images), self.log_tau


class TwoTower:
    """Heads on frozen features. Inputs of a batch: text features [..., B, t] and image features
    [..., B, v].

    Args:
        heads: what is trained.
        epsilon: of the smoothed cosine; 0 makes it the plain one, with which a regulariser toward 0
            has no minimum.
        dtype: to compute in.
    """

    def __init__(self, heads: Heads, epsilon: float = 1.0, dtype: torch.dtype = torch.float64):
        if epsilon < 0:
            raise UserError(f"the smoothing of the cosine is not below 0: {epsilon:g}")
        self.parameters, self.epsilon = Parameters.of(heads, dtype=dtype), epsilon

    def embed(self, w: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of texts and of images before normalisation, [..., B, d], and log tau."""
        texts, images = inputs
        return self.parameters.call(w, texts, images)

    def logits(self, w: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        texts, images, log_tau = self.embed(w, inputs)
        return logits(texts, images, log_tau, self.epsilon)


class Clip:
    """A CLIP model of transformers. Inputs of a batch: token ids and attention mask [..., B, T],
    pixels [..., B, 3, H, W].

    Pixels are as the model takes them, or uint8, which are normalised here: a quarter of the memory
    for a data set.

    Args:
        model: a `CLIPModel`, or one with adapters of peft.
        select: the trainable parameters, as in `Parameters.of`; its logit scale is -log tau. By
            default LoRA adapters and the logit scale.
        epsilon: of the smoothed cosine; CLIP's own is 0, and embeddings are of length 1 or more.
    """

    def __init__(
        self,
        model: Any,
        select: tuple[str, ...] = ("*lora_*", "*logit_scale"),
        epsilon: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        self.parameters, self.epsilon = Parameters.of(model.eval(), select, dtype), epsilon

    def embed(self, w: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Projected embeddings of texts and of images, [..., B, d], and log tau. CLIP's own output
        is of unit length.
        """
        ids, mask, pixels = inputs
        # equal captions go through the text tower once
        captions, which = (
            torch.stack([ids, mask.to(ids)], -1).flatten(0, -3).unique(dim=0, return_inverse=True)
        )
        options = {
            "input_ids": captions[..., 0],
            "attention_mask": captions[..., 1],
            "pixel_values": self.normalise(pixels.flatten(0, -4), w.dtype),
        }
        out = self.parameters.call(w, **options)
        size = out.text_embeds.shape[-1]
        return (
            out.text_embeds[which].view(*ids.shape[:-1], size),
            out.image_embeds.view(*pixels.shape[:-3], size),
            -self._logit_scale(w),
        )

    @staticmethod
    def normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels in `dtype`: uint8 [..., 3, H, W] by the means and deviations of CLIP's training
        pictures, others as they are.
        """
        if pixels.dtype != torch.uint8:
            return pixels.to(dtype)
        mean, deviation = (
            torch.tensor(one, dtype=dtype, device=pixels.device).view(3, 1, 1)
            for one in (CLIP_MEAN, CLIP_DEVIATION)
        )
        return (pixels.to(dtype) / 255 - mean) / deviation

    def _logit_scale(self, w: Tensor) -> Tensor:
        named = {**self.parameters.fixed, **self.parameters.unflatten(w)}
        return next(value for name, value in named.items() if name.endswith("logit_scale"))

    def logits(self, w: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        texts, images, log_tau = self.embed(w, inputs)
        return logits(texts, images, log_tau, self.epsilon)
