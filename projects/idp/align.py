"""Fast domain alignment: a few steps on a task's BatchNorm affine parameters, led by its proxies.

Many tasks at once; each has its own parameters, statistics, pseudo tasks and Adam moments, so that
the result is that of one task at a time.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projects.idp.codebook import class_codebooks
from projects.idp.norms import Scope, TaskNetwork
from projects.idp.pseudo import pseudo_queries
from projects.idp.ridge import min_max, reconstruct, ridge_logits
from shared.errors import UserError
from shared.seeding import generator


class Losses(NamedTuple):
    """Weights of the three losses; at 0 a term is not computed.

    Attributes:
        target: cross-entropy of the pseudo queries.
        proxy: cross-entropy of their proxies.
        agreement: KL divergence of the class probabilities of the pseudo queries from those of
            their proxies.
    """

    target: float = 1.0
    proxy: float = 1.0
    agreement: float = 1.0


IDP = Losses()
FINE_TUNING = Losses(1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Alignment:
    """How a task is adapted.

    Attributes:
        steps: of Adam; 0 leaves the source network as it is.
        rate: of Adam.
        pseudo: pseudo queries of each class in a step.
        losses: weights of the three losses.
        scope: which BatchNorm layers are trained.
        lam: multiplier of the ridge penalty of the proxies.
        released: classify against random class codebooks, as the released code's loop does.
    """

    steps: int = 20
    rate: float = 1e-3
    pseudo: int = 15
    losses: Losses = IDP
    scope: Scope = "all"
    lam: float = 1.0
    released: bool = False


def momentum(step: int) -> float:
    """Of the running statistics in a step: 0.1 / (1 + e^step), some 9 % in all."""
    return 0.1 / (1 + math.exp(step))


def align(
    network: nn.Module,
    support: Tensor,
    ways: int,
    codebook: Tensor,
    scale: float,
    how: Alignment,
    seeds: list[int],
) -> TaskNetwork:
    """Adapt copies of a source network to tasks.

    Args:
        network: with `spatial_map`; it is left as it is.
        support: [tasks, ways * shots, channels, h, w] from 0 to 1, class after class.
        codebook: U [n, d] of the source; of no use where no loss takes proxies.
        scale: of the min-max scaled logits, learned with the source.
        seeds: of the tasks, which decide their pseudo queries.

    Returns:
        the adapted copies; their running statistics are in use.

    Raises:
        UserError: the network has no BatchNorm, another width than the codebook, or gives values
            that are not finite.
    """
    tasks = len(support)
    adapted = TaskNetwork(network, tasks, how.scope)
    if how.steps == 0:
        return adapted
    labels = torch.arange(ways, device=support.device).repeat_interleave(how.pseudo)
    labels = labels.expand(tasks, -1)
    adam = torch.optim.Adam(adapted.trained(), lr=how.rate)
    adapted.use_batch(True)
    for step in range(how.steps):
        adapted.set_momentum(momentum(step))
        queries = pseudo_queries(support, ways, how.pseudo, seeds, step)
        cells = adapted(torch.cat([support, queries], 1))
        check_finite(cells)
        if how.losses.proxy or how.losses.agreement:
            check_width(cells, codebook)
        n = support.shape[1]
        books = class_codebooks(cells[:, :n], ways)
        if how.released:
            books = random_like(books, seeds)
        loss = task_losses(cells[:, n:], labels, books, codebook, scale, how).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    adapted.use_batch(False)
    return adapted.requires_grad_(False)


def task_losses(
    cells: Tensor, labels: Tensor, books: Tensor, codebook: Tensor, scale: float, how: Alignment
) -> Tensor:
    """The loss of each task, [tasks].

    Args:
        cells: of the pseudo queries, [tasks, q, r, d].
        labels: [tasks, q].
        books: the class codebooks, [tasks, ways, n, d].
    """
    target, proxy, agreement = how.losses
    total = cells.new_zeros(len(cells))
    logits = scale * min_max(ridge_logits(cells, books))
    if target:
        total = total + target * _cross_entropy(logits, labels)
    if proxy or agreement:
        proxies = reconstruct(cells, codebook, how.lam)
        of_proxies = scale * min_max(ridge_logits(proxies, books))
        if proxy:
            total = total + proxy * _cross_entropy(of_proxies, labels)
        if agreement:
            kl = F.kl_div(
                logits.log_softmax(-1),
                of_proxies.log_softmax(-1),
                log_target=True,
                reduction="none",
            )
            total = total + agreement * kl.sum(-1).mean(-1)
    return total


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the images of each task, [tasks]."""
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(-1)


def random_like(books: Tensor, seeds: list[int]) -> Tensor:
    """Class codebooks of noise, [tasks, ways, n, d], the same in every step."""
    drawn = [torch.randn(books.shape[1:], generator=generator(seed, "released")) for seed in seeds]
    return torch.stack(drawn).to(books)


def check_finite(cells: Tensor) -> None:
    """UserError where cells are not finite."""
    if not cells.isfinite().all():
        raise UserError(
            "the network gives features that are not finite; look at the images and the weights"
        )


def check_width(cells: Tensor, codebook: Tensor) -> None:
    """UserError where cells are not as wide as the codebook."""
    if cells.shape[-1] != codebook.shape[-1]:
        raise UserError(
            f"the network's map has {cells.shape[-1]} channels and the codebook is of width"
            f" {codebook.shape[-1]}; take the codebook that was made with this network"
        )
