"""The symmetric contrastive loss of a batch, and what it loses with a pair: as its positive, and as
a negative of every other pair.

Everything is a function of the logits S [..., B, B] of batches: S_ij = cos(text_i, image_j) / tau.
With p = softmax over a row of S (a text's images) and q = softmax over a column (an image's texts),
a batch's loss is sum_n (-log p_nn - log q_nn). `present` [..., B] says which pairs are there: an
absent pair is neither a positive nor a negative.

Without the pairs D the loss falls by (the paper's section on the positive and the negative part;
the exact form is derived here)

    sum_{i in D} Pos_i + Neg(D),     Pos_i = -log p_ii - log q_ii,
    exact:   Neg(D) = -sum_{k not in D} [log(1 - sum_{i in D} p_ki) + log(1 - sum_{i in D} q_ik)]
    paper:   Neg(D) =  sum_{k not in D}  sum_{i in D} (p_ki + q_ik)

The paper's device adds log(zeta) to row and column n of S: zeta = 1 is the batch, zeta -> 0 the
batch in which n is nobody's negative. `paper` is the derivative at zeta = 1 and the first order of
`exact`.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from shared.errors import UserError

Mode = Literal["exact", "paper"]
Parts = Literal["both", "positive", "negative"]
# a logit whose softmax is 0, and whose derivatives are too (those of -inf are not numbers)
ABSENT = -1e30


def normalise(x: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(|x|^2 + epsilon) along the last dimension: of length below 1, and smooth where an
    embedding passes through 0.
    """
    return x * (x.square().sum(-1, keepdim=True) + epsilon).rsqrt()


def logits(texts: Tensor, images: Tensor, log_tau: Tensor, epsilon: float) -> Tensor:
    """S [..., B, B] of embeddings [..., B, d]: cosine (smoothed by `epsilon`) over the
    temperature.
    """
    return normalise(texts, epsilon) @ normalise(images, epsilon).mT * torch.exp(-log_tau)


def pair_losses(s: Tensor, present: Tensor) -> Tensor:
    """Pos_n = -log p_nn - log q_nn of every pair, text to image and image to text, [..., B]; 0 of
    an absent one.
    """
    # logsumexp less a logit: its second derivatives take less than log_softmax's
    masked = _masked(s, present)
    both = masked.logsumexp(-1) + masked.logsumexp(-2) - 2 * masked.diagonal(dim1=-2, dim2=-1)
    return torch.where(present, both, 0.0)


def batch_losses(s: Tensor, present: Tensor) -> Tensor:
    """The loss of each batch, [...]."""
    return pair_losses(s, present).sum(-1)


def negative_losses(s: Tensor, present: Tensor, mode: Mode = "exact") -> Tensor:
    """Neg_n of every pair alone, [..., B]: what the other pairs' softmaxes owe to it; 0 of an
    absent one.
    """
    check_mode(mode)
    masked = _masked(s, present)
    terms = (lambda x: -_log_others(x)) if mode == "exact" else (lambda x: x.softmax(-1))
    both = terms(masked) + terms(masked.mT)  # [k, n]: in text k's images, in image k's texts
    others = (
        present.unsqueeze(-1)
        & present.unsqueeze(-2)
        & ~torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    )
    return torch.where(others, both, 0.0).sum(-2)


def removal_losses(
    s: Tensor, present: Tensor, mode: Mode = "exact", parts: Parts = "both"
) -> Tensor:
    """What a batch loses with each of its pairs alone, [..., B]: Pos + Neg, or one of the two."""
    check_mode(mode, parts)
    found = torch.zeros_like(s[..., 0])
    if parts != "negative":
        found = found + pair_losses(s, present)
    if parts != "positive":
        found = found + negative_losses(s, present, mode)
    return found


def group_losses(
    s: Tensor, present: Tensor, removed: Tensor, mode: Mode = "exact", parts: Parts = "both"
) -> Tensor:
    """What a batch loses with all of `removed` [..., B] (bool) at once, [...]. In mode `exact` with
    both parts: exactly that.

    Not the sum over single pairs: that would count the rows of pairs that go themselves.
    """
    check_mode(mode, parts)
    removed = removed & present
    kept = present & ~removed
    found = torch.zeros_like(s[..., 0, 0])
    if parts != "negative":
        found = found + torch.where(removed, pair_losses(s, present), 0.0).sum(-1)
    if parts != "positive":
        for x in (_masked(s, present), _masked(s, present).mT):
            if mode == "exact":
                # log(1 - sum over the removed)
                left = x.masked_fill(~kept.unsqueeze(-2), ABSENT).logsumexp(-1) - x.logsumexp(-1)
                terms = -left
            else:
                terms = torch.where(removed.unsqueeze(-2), x.softmax(-1), 0.0).sum(-1)
            found = found + torch.where(kept, terms, 0.0).sum(-1)
    return found


def check_mode(mode: str, parts: str = "both") -> None:
    """UserError for a word that is none."""
    for word, known in ((mode, Mode), (parts, Parts)):
        if word not in get_args(known):
            raise UserError(f"'{word}' is none of {', '.join(get_args(known))}")


def _masked(s: Tensor, present: Tensor) -> Tensor:
    return s.masked_fill(~(present.unsqueeze(-1) & present.unsqueeze(-2)), ABSENT)


def _log_others(x: Tensor) -> Tensor:
    """log(1 - softmax(x)) along the last dimension, without loss of digits where one entry has
    nearly all of the softmax.
    """
    top = torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.argmax(-1, keepdim=True), True)
    rest = x.masked_fill(top, ABSENT).logsumexp(-1, keepdim=True) - x.logsumexp(-1, keepdim=True)
    small = x.softmax(-1).masked_fill(top, 0.0)  # at most a half
    return torch.where(top, rest, torch.log1p(-small))
