"""What a search minimises. A metric takes logits [V, B, P, vocabulary] and gives one number for
each variant, [V].
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p_reference || p) in nats, [V], the mean over prompts and scored positions.

    Args:
        reference: logits [B, P, vocabulary] of the full model.
    """
    p = torch.log_softmax(reference, dim=-1)
    q = torch.log_softmax(logits, dim=-1)
    return (p.exp() * (p - q)).sum(-1).mean(dim=(-2, -1))


@dataclass(frozen=True)
class Kl:
    """`kl` to a fixed reference."""

    reference: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        return kl(self.reference, logits)


@dataclass(frozen=True)
class Margin:
    """Less of what the task asks for: minus the mean of right against wrong answers.

    Attributes:
        right, wrong: bool [B, P, vocabulary]: the tokens of the answers.
        kind: difference: logits, the mean of the right against the mean of the wrong (IOI);
            hardest: the right against the largest wrong one (docstring); probability: the summed
            probability of each (greater-than).
    """

    right: Tensor
    wrong: Tensor
    kind: str = "difference"

    def __call__(self, logits: Tensor) -> Tensor:
        return -self.margins(logits).mean(dim=(-2, -1))

    def margins(self, logits: Tensor) -> Tensor:
        """Of each prompt and scored position, [V, B, P]."""
        right, wrong = self.right, self.wrong
        if self.kind == "probability":
            p = logits.softmax(-1)
            return (p * right).sum(-1) - (p * wrong).sum(-1)
        mine = (logits * right).sum(-1) / right.sum(-1)
        if self.kind == "hardest":
            return mine - logits.masked_fill(~wrong, -torch.inf).amax(-1)
        return mine - (logits * wrong).sum(-1) / wrong.sum(-1)

    def accuracy(self, logits: Tensor) -> Tensor:
        """The share of prompts and positions whose right answers have the larger score, [V]."""
        return (self.margins(logits) > 0).float().mean(dim=(-2, -1))


@dataclass(frozen=True)
class SquaredDistance:
    """Mean squared distance of the logits to a fixed reference, for built circuits, whose outputs
    are no distributions (ACDC's choice for its compiled models).
    """

    reference: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        return ((logits - self.reference) ** 2).sum(-1).mean(dim=(-2, -1))
