"""The optional graph head: class scores by message passing between a query and the classes.

For each query a small graph: a node for each class (the mean of its support) and one for the query.
A node is a projected pooled feature beside a vector of the ways: one-hot for a class, the softmax
of the ridge logits for the query. After the few-shot GNN of Garcia and Bruna (2018), which the
released code uses with a node for each support image; the class means here make a head that was
trained with five shots usable with one, and small.
"""

import torch
from torch import Tensor, nn

from projects.idp.classify import ridge_head
from projects.idp.ridge import min_max
from shared.vision.episodes import Episodes

SLOPE = 0.01


class PerNode(nn.Sequential):
    """Linear, BatchNorm over all leading dimensions, LeakyReLU."""

    def __init__(self, size: int, width: int):
        super().__init__(nn.Linear(size, width), nn.BatchNorm1d(width), nn.LeakyReLU(SLOPE))

    def forward(self, x: Tensor) -> Tensor:
        linear, norm, activation = self
        y = linear(x)
        return activation(norm(y.flatten(0, -2)).view(y.shape))


class GraphLayer(nn.Module):
    """Weights of the edges from |x_i - x_j|, then x beside its neighbours' weighted mean."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.edges = nn.Sequential(PerNode(size, hidden), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[graphs, nodes, size] -> [graphs, nodes, 2 size]."""
        logits = self.edges((x.unsqueeze(1) - x.unsqueeze(2)).abs()).squeeze(-1)
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        weights = logits.masked_fill(itself, -torch.inf).softmax(-1)
        return torch.cat([x, weights @ x], -1)


class GraphHead(nn.Module):
    """Scores of queries.

    Args:
        width: of pooled features.
        ways: classes of a task.
        size: of a projected feature.
        hidden: of the edges' network and of a layer's new features.
    """

    def __init__(self, width: int, ways: int, size: int = 32, hidden: int = 32, layers: int = 2):
        super().__init__()
        self.project = PerNode(width, size)
        self.layers, self.updates = nn.ModuleList(), nn.ModuleList()
        size += ways
        for _ in range(layers):
            self.layers.append(GraphLayer(size, hidden))
            self.updates.append(PerNode(2 * size, hidden))
            size += hidden
        self.last = GraphLayer(size, hidden)
        self.out = nn.Linear(2 * size, ways)

    def forward(self, support: Tensor, query: Tensor, guess: Tensor) -> Tensor:
        """Message passing on a graph for each query.

        Args:
            support: pooled features [tasks, ways * shots, d], class after class.
            query: [tasks, q, d].
            guess: softmax of the ridge logits, [tasks, q, ways].

        Returns:
            [tasks, q, ways]
        """
        tasks, q, ways = guess.shape
        means = support.unflatten(1, (ways, -1)).mean(2)
        features = torch.cat([means.unsqueeze(1).expand(-1, q, -1, -1), query.unsqueeze(2)], 2)
        own = torch.eye(ways, dtype=guess.dtype, device=guess.device).expand(tasks, q, -1, -1)
        said = torch.cat([own, guess.unsqueeze(2)], 2)
        x = torch.cat([self.project(features), said], -1).flatten(0, 1)
        for layer, update in zip(self.layers, self.updates, strict=True):
            x = torch.cat([x, update(layer(x))], -1)
        return self.out(self.last(x))[:, -1].view(tasks, q, ways)


def guesses(logits: Tensor, scale: float) -> Tensor:
    """What the head is told of each query: the softmax of its scaled ridge logits."""
    return (scale * min_max(logits)).softmax(-1)


def graph_scores(
    head: GraphHead, support: Tensor, query: Tensor, ways: int, scale: float, batch: bool = False
) -> Tensor:
    """Scores [tasks, q, ways] from cells [tasks, n, r, d].

    Args:
        batch: normalise in the head with the statistics of these queries, as the released tester
            does, which is transductive; else with the running ones of the training.
    """
    guess = guesses(ridge_head(support, query, ways), scale)
    norms = [module for module in head.modules() if isinstance(module, nn.BatchNorm1d)]
    before = [(norm.training, norm.momentum) for norm in norms]
    if batch:
        for norm in norms:
            norm.training, norm.momentum = True, 0.0
    scores = head(support.mean(2), query.mean(2), guess)
    for norm, (training, momentum) in zip(norms, before, strict=True):
        norm.training, norm.momentum = training, momentum
    return scores


def train_graph_head(
    head: GraphHead,
    cells: Tensor,
    episodes: Episodes,
    ways: int,
    scale: float,
    rate: float,
    batch: int,
) -> GraphHead:
    """Meta-train on tasks of the source's base classes, with the network frozen, by Adam.

    Args:
        cells: of the base images, [n, r, d].
        batch: tasks of a step.
    """
    adam = torch.optim.Adam(head.parameters(), lr=rate)
    head.train()
    for part in torch.arange(len(episodes.support)).split(batch):
        support, query = cells[episodes.support[part]], cells[episodes.query[part]]
        scores = graph_scores(head, support, query, ways, scale)
        loss = nn.functional.cross_entropy(scores.mT, episodes.y_query[part].to(scores.device))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return head.eval()
