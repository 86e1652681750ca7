"""The loss of a sample depends on that sample alone, or there is no bound on what the sample can
change.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy, pad

IGNORED = -100


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean next-token loss of each sample over its own tokens: [B].

    (The loss that a Hugging Face model computes from `labels` averages over all tokens of the
    batch: a sample's weight in it depends on how long the others are.)

    Args:
        logits: [B, T, vocabulary].
        labels: [B, T], the tokens themselves, -100 where no loss is taken. A sample without any has
            loss 0.
    """
    # not logits[:, :-1]: a slice of the largest tensor would be copied, twice
    targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return losses.sum(1) / (targets != IGNORED).sum(1).clamp(min=1).to(losses.dtype)


def finite_mean(losses: Tensor) -> float:
    """The mean of the losses that are finite, for showing; NaN when there is none. Not private."""
    finite = losses.detach()[losses.detach().isfinite()]
    return float(finite.mean()) if len(finite) else float("nan")
