"""Inference: a task's queries from its support, inductive or transductive.

Inductive: each query on its own, with the running statistics. Transductive: with the statistics of
the batch of support and queries, and perhaps label propagation among the queries. A row of a table
is one or the other, never a mix.
"""

from typing import Literal

import torch
from torch import Tensor

from projects.idp.align import check_finite
from projects.idp.codebook import class_codebooks
from projects.idp.norms import TaskNetwork
from projects.idp.ridge import ridge_logits
from shared.errors import UserError

Inference = Literal["inductive", "transductive"]


@torch.no_grad()
def embed(
    adapted: TaskNetwork, support: Tensor, query: Tensor, inference: Inference
) -> tuple[Tensor, Tensor]:
    """Cells of support and queries, [tasks, n, r, d] each; running statistics stay as they are."""
    transductive = inference == "transductive"
    adapted.set_momentum(0.0)
    adapted.use_batch(transductive)
    both = adapted(torch.cat([support, query], 1))
    adapted.use_batch(False)
    check_finite(both)
    return both[:, : support.shape[1]], both[:, support.shape[1] :]


def ridge_head(support: Tensor, query: Tensor, ways: int, most: int = 100) -> Tensor:
    """Logits [tasks, queries, ways] from cells [tasks, n, r, d], the support class after class; a
    class codebook has `most` rows at most.
    """
    return ridge_logits(query, class_codebooks(support, ways, most))


def propagate(
    scores: Tensor,
    features: Tensor,
    inference: Inference = "transductive",
    neighbours: int = 10,
    kept: float = 0.2,
    alpha: float = 0.5,
) -> Tensor:
    """Label propagation among the queries of each task: (I - alpha L)^-1 Y.

    L is the normalised graph of each query's nearest neighbours by pooled features, with Gaussian
    weights whose variance is the mean squared distance; Y keeps the top share of each class's
    scores, as probabilities.

    Args:
        scores: [tasks, q, ways], logits.
        features: [tasks, q, d].
        inference: must be "transductive": queries see one another.

    Returns:
        [tasks, q, ways]

    Raises:
        UserError: the inference is inductive.
    """
    if inference != "transductive":
        raise UserError("label propagation is transductive: queries see one another")
    q = scores.shape[1]
    squares = torch.cdist(features, features).square()
    near = squares + torch.diag(squares.new_full((q,), torch.inf))
    rows = near.topk(min(neighbours, q - 1), largest=False).indices
    linked = torch.zeros_like(squares, dtype=torch.bool).scatter_(-1, rows, True)
    linked = linked | linked.mT
    variance = squares.mean((1, 2), keepdim=True).clamp_min(1e-12)
    weights = torch.exp(-squares / (2 * variance)) * linked
    degree = weights.sum(-1).clamp_min(1e-12).rsqrt()
    graph = degree.unsqueeze(-1) * weights * degree.unsqueeze(-2)
    probabilities = scores.softmax(-1)
    top = probabilities.topk(max(1, round(kept * q)), dim=1).indices
    labels = torch.zeros_like(probabilities).scatter_(1, top, probabilities.gather(1, top))
    eye = torch.eye(q, dtype=scores.dtype, device=scores.device)
    return torch.linalg.solve(eye - alpha * graph, labels)
