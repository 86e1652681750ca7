"""Inference, label propagation and the codebook."""

import numpy as np
import pytest
import torch
from idp_problems import network, normal, tasks

from projects.idp.classify import embed, propagate, ridge_head
from projects.idp.codebook import build, cells_of, class_codebooks, class_means, cluster
from projects.idp.norms import TaskNetwork
from shared.commands.key import digest
from shared.errors import UserError


def test_inductive_predictions_do_not_depend_on_the_batch_and_transductive_ones_do():
    support, query = tasks(queries=3)
    adapted = TaskNetwork(network(), 3)

    def scores(part, inference):
        return ridge_head(*embed(adapted, support, query[:, part], inference), 3)

    whole = scores(slice(None), "inductive")
    for n in range(query.shape[1]):
        alone = scores(slice(n, n + 1), "inductive")
        assert torch.allclose(alone[:, 0], whole[:, n], atol=1e-6)
    together, alone = (scores(p, "transductive") for p in (slice(None), slice(0, 1)))
    assert float((together[:, 0] - alone[:, 0]).abs().max()) > 1e-3


def test_embedding_moves_no_statistics():
    support, query = tasks()
    adapted = TaskNetwork(network(), 3)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    embed(adapted, support, query, "transductive")
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert not any(norm.training for norm in adapted.norms.values())


def test_permuting_the_ways_permutes_the_logits():
    support, query = normal(2, 6, 4, 7, seed=1), normal(2, 5, 4, 7, seed=2)
    logits = ridge_head(support, query, 3)
    ways = support.unflatten(1, (3, 2))[:, [2, 0, 1]].flatten(1, 2)
    assert torch.allclose(ridge_head(ways, query, 3), logits[..., [2, 0, 1]], atol=1e-12)
    within = support.unflatten(1, (3, 2)).flip(2).flatten(1, 2)
    assert torch.allclose(ridge_head(within, query, 3), logits, atol=1e-12)


def naive_propagation(scores, features, neighbours, kept, alpha):
    """Of one task, by loops over float64 arrays."""
    q, ways = scores.shape
    squares = np.array([[np.sum((a - b) ** 2) for b in features] for a in features])
    weights = np.zeros((q, q))
    for i in range(q):
        others = sorted((j for j in range(q) if j != i), key=lambda j: squares[i, j])
        for j in others[:neighbours]:
            weights[i, j] = weights[j, i] = np.exp(-squares[i, j] / (2 * squares.mean()))
    degree = weights.sum(1)
    graph = weights / np.sqrt(np.outer(degree, degree))
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    y = np.zeros_like(probabilities)
    for label in range(ways):
        top = np.argsort(-probabilities[:, label])[: max(1, round(kept * q))]
        y[top, label] = probabilities[top, label]
    return np.linalg.inv(np.eye(q) - alpha * graph) @ y


@pytest.mark.parametrize(("q", "neighbours"), [(13, 3), (5, 10)])
def test_label_propagation_is_that_of_a_loop(q, neighbours):
    scores, features = normal(2, q, 3, seed=3), normal(2, q, 4, seed=4)
    found = propagate(scores, features, neighbours=neighbours, kept=0.3, alpha=0.6)
    for n in range(2):
        wanted = naive_propagation(
            scores[n].numpy(), features[n].numpy(), min(neighbours, q - 1), 0.3, 0.6
        )
        assert np.allclose(found[n].numpy(), wanted, atol=1e-10)


def test_label_propagation_is_refused_where_inference_is_inductive():
    with pytest.raises(UserError, match="transductive"):
        propagate(normal(1, 4, 2), normal(1, 4, 3), "inductive")


def test_class_means_are_those_of_a_loop():
    cells, labels = normal(7, 4, 3, seed=5), torch.tensor([0, 2, 0, 2, 2, 1, 0])
    found = class_means(cells, labels, 3)
    for label in range(3):
        assert torch.allclose(found[label], cells[labels == label].mean(0))


def test_cells_are_places_of_the_map():
    maps = normal(2, 3, 2, 4, seed=6)
    cells = cells_of(maps)
    assert cells.shape == (2, 8, 3)
    assert torch.equal(cells[1, 5], maps[1, :, 1, 1])


def test_clusters_are_means_of_what_is_nearest_to_them():
    rows = torch.cat([normal(20, 3, seed=n) * 0.1 + 10 * n for n in range(4)])
    centres = cluster(rows, 4, 0)
    nearest = torch.cdist(rows, centres).argmin(1)
    assert sorted(nearest.bincount().tolist()) == [20] * 4
    for n in range(4):
        assert torch.allclose(centres[n], rows[nearest == n].mean(0))


def test_few_or_repeated_rows_are_no_trouble():
    rows = normal(3, 5, seed=7)
    assert torch.equal(cluster(rows, 3, 0), rows)
    assert cluster(rows.repeat(4, 1), 7, 0).shape == (3, 5)


def test_a_class_codebook_is_clustered_only_where_it_is_too_long():
    cells = normal(2, 4, 3, 5, seed=8)
    assert torch.equal(class_codebooks(cells, 2, 6), cells.unflatten(1, (2, 2)).flatten(2, 3))
    short = class_codebooks(cells, 2, 4)
    assert short.shape == (2, 2, 4, 5)
    assert torch.equal(short[1, 0], cluster(cells[1, :2].flatten(0, 1), 4, 0))


@pytest.mark.parametrize("kind", ["clustered", "learned", "random"])
def test_a_codebook_depends_on_the_source_and_its_seed_alone(kind):
    means, learned = normal(6, 4, 5, seed=9), normal(6, 2, 5, seed=10)
    one = build(kind, 3, means, learned, 0)
    normal(100)  # whatever else is drawn or looked at
    assert digest({"u": one}) == digest({"u": build(kind, 3, means, learned, 0)})
    assert one.shape == (3, 5)
    other = build(kind, 3, means + 1, learned + 1, 0)
    assert digest({"u": one}) != digest({"u": other})
