"""Stage 1, the networks, the graph head, style, the targets, and the peer's methods."""

import numpy as np
import pytest
import torch
from idp_problems import network, normal, uniform
from torch import nn
from torch.nn import functional as F

from projects.idp import data
from projects.idp.backbone import Normalised
from projects.idp.baselines import nearest_mean, peer_scores, peers
from projects.idp.gnn import GraphHead, graph_scores, train_graph_head
from projects.idp.network import DensePrototypes, ResidualNet
from projects.idp.norms import TaskNetwork
from projects.idp.source import Source, Training
from projects.idp.style import content, gram_distance, moments_distance, style
from shared.errors import UserError
from shared.vision.backbones import backbone
from shared.vision.episodes import sample_episodes
from shared.vision.images import synthetic


def training(seed=0, **other):
    images = synthetic(60, classes=3, size=12, seed=2)
    how = {"rows": 2, "epochs": 3, "batch": 20, "rate": 0.05, "weight_decay": 1e-4, "seed": seed}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = ResidualNet(3, 4, 3, [5, 6])
    return Training(body, images.images(), images.labels, 3, **{**how, **other})


def test_training_learns_and_does_the_same_again():
    one, other = training(), training()
    first = [one.epoch(n) for n in (1, 2, 3)]
    assert first == [other.epoch(n) for n in (1, 2, 3)]
    assert first[-1][0] < first[0][0]
    assert one.optimiser.param_groups[0]["lr"] == pytest.approx(0.05 * 0.1)  # after 2 of 3 epochs
    assert not one.network.training


def test_a_loss_that_is_not_finite_ends_the_training():
    one = training()
    with torch.no_grad():
        one.head.scale.fill_(torch.nan)
    with pytest.raises(UserError, match="the loss is nan in epoch 1"):
        one.epoch(1)
    with pytest.raises(UserError, match="the loss is nan in epoch 1"):  # in the ridge's solve
        training(weight_decay=1e25).epoch(1)


def test_a_source_is_the_same_from_its_tensors():
    one = training()
    one.epoch(1)
    source = one.source()
    again = Source.of_tensors(source.tensors())
    images = uniform(2, 3, 12, 12)
    assert torch.equal(source.network(images), again.network(images))
    assert torch.equal(source.means, again.means)
    assert source.scale == again.scale


def test_dense_prototypes_score_by_scaled_residuals():
    head = DensePrototypes(4, 2, 5)
    with torch.no_grad():
        head.scale.fill_(3.0)
    cells = normal(6, 3, 5, dtype=torch.float32)
    found = head(cells)
    for image in range(6):
        raw = []
        for v in head.rows.detach():
            h = v.T @ torch.linalg.inv(v @ v.T + 2 / 5 * torch.eye(2)) @ v
            raw.append(float(-(cells[image] - cells[image] @ h).square().sum(1).mean()))
        low, high = min(raw), max(raw)
        wanted = [3 * (value - low) / (high - low) for value in raw]
        assert found[image].tolist() == pytest.approx(wanted, abs=1e-4)
    assert float(found.detach().max()) == pytest.approx(3.0)


def test_the_papers_network_makes_a_map_of_5_by_5():
    body = ResidualNet(3, 64, 7, [64, 128, 256, 512]).eval()
    with torch.no_grad():
        assert body.spatial_map(uniform(1, 3, 160, 160)).shape == (1, 512, 5, 5)
    assert ResidualNet.of_weights(body.state_dict()).width == 512


@pytest.mark.parametrize("name", ["efficientnet", "resnet", "residual"])
def test_networks_of_others_give_their_own_numbers_with_task_norms(name):
    """In eval mode, and in train mode those of each task's own batch."""
    if name == "residual":
        body = backbone("residual-4-6", (3, 16, 16), seed=0)
    else:
        model = {"efficientnet": "timm:tf_efficientnet_lite0", "resnet": "timm:resnet18"}[name]
        body = backbone(model, (3, 32, 32), seed=0)
    adapted = TaskNetwork(body, 2)
    images = uniform(2, 3, 3, 32, 32, seed=4)
    with torch.no_grad():
        for batch in (False, True):
            adapted.use_batch(batch)
            found = adapted(images)
            body.eval()
            for module in body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train(batch)
                    module.momentum = 0.0
            for task in range(2):
                own = body.spatial_map(images[task]).flatten(2).mT
                assert torch.allclose(found[task], own, rtol=1e-3, atol=1e-3 * float(own.std()))


def test_a_normalised_backbone_gets_what_it_was_trained_on():
    made = Normalised.named("residual-4-6", 16)
    images = uniform(2, 3, 16, 16)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    spread = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(
        made.spatial_map(images), made.body.spatial_map((images - mean) / spread), atol=1e-6
    )
    with pytest.raises(UserError, match="no spatial map"):
        Normalised.named("mlp-8", 16)


# ---- the graph head ------------------------------------------------------------------------------


def by_loops(head, support, query, guess):
    """One query's scores from a graph of class means and itself, node by node."""
    ways = guess.shape[-1]
    means = support.view(ways, -1, support.shape[-1]).mean(1)
    nodes = torch.cat([means, query[None]])
    said = torch.cat([torch.eye(ways), guess[None]])
    x = torch.cat([head.project(nodes), said], 1)
    for layer, update in [*zip(head.layers, head.updates, strict=True), (head.last, None)]:
        rows = []
        for i in range(len(x)):
            others = [j for j in range(len(x)) if j != i]
            logits = torch.stack([layer.edges((x[i] - x[j]).abs()[None])[0, 0] for j in others])
            weights = logits.softmax(0)
            rows.append(torch.cat([x[i], sum(w * x[j] for w, j in zip(weights, others))]))  # noqa: B905
        mixed = torch.stack(rows)
        x = mixed if update is None else torch.cat([x, update(mixed)], 1)
    return head.out(x)[-1]


def test_the_graph_head_is_message_passing_on_one_graph_a_query():
    torch.manual_seed(0)
    head = GraphHead(6, 3, size=4, hidden=5).eval()
    support, query = normal(2, 6, 6, dtype=torch.float32), normal(2, 4, 6, dtype=torch.float32)
    guess = normal(2, 4, 3, dtype=torch.float32).softmax(-1)
    with torch.no_grad():
        found = head(support, query, guess)
        for task in range(2):
            for n in range(4):
                wanted = by_loops(head, support[task], query[task, n], guess[task, n])
                assert torch.allclose(found[task, n], wanted, atol=1e-5)


def test_the_graph_head_learns_its_tasks_and_is_inductive_unless_told():
    cells = F.one_hot(torch.arange(40) % 4, 4).float()[:, None] + 0.3 * uniform(40, 2, 4)
    labels = torch.arange(40) % 4
    episodes = sample_episodes(labels, 60, 3, 2, 3, 0)
    torch.manual_seed(0)
    head = train_graph_head(GraphHead(4, 3, 8, 8), cells, episodes, 3, 5.0, 1e-2, 4)
    test = sample_episodes(labels, 10, 3, 2, 3, 1)
    support, query = cells[test.support], cells[test.query]
    with torch.no_grad():
        scores = graph_scores(head, support, query, 3, 5.0)
        assert float((scores.argmax(-1) == test.y_query).float().mean()) > 0.9
        alone = graph_scores(head, support[:1], query[:1, :1], 3, 5.0)
        assert torch.allclose(alone[0, 0], scores[0, 0], atol=1e-5)
        batch = graph_scores(head, support, query, 3, 5.0, batch=True)
        assert not torch.allclose(batch, scores, atol=1e-3)
        assert torch.equal(graph_scores(head, support, query, 3, 5.0), scores)  # nothing moved


# ---- style and content ---------------------------------------------------------------------------


def test_style_and_content_by_numpy():
    cells, proxies = normal(5, 3, 4, seed=1), normal(5, 3, 4, seed=2)
    x, p = cells.numpy().reshape(-1, 4), proxies.numpy().reshape(-1, 4)
    kept = content(cells, proxies)
    assert kept.error == pytest.approx(((p - x) ** 2).sum() / (x**2).sum())
    assert kept.centred == pytest.approx(((p - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(p, axis=1)
    assert kept.cosine == pytest.approx(((x * p).sum(1) / lengths).mean())
    a, b = style(cells), style(proxies)
    moments = [np.concatenate([v.mean(0), v.std(0, ddof=1)]) for v in (x, p)]
    assert moments_distance(a, b) == pytest.approx(np.linalg.norm(moments[0] - moments[1]))
    grams = [v.T @ v / 15 for v in (x, p)]
    assert gram_distance(a, b) == pytest.approx(np.linalg.norm(grams[0] - grams[1]) / 4)
    assert moments_distance(a, a) == gram_distance(a, a) == 0


# ---- what it is compared with --------------------------------------------------------------------


def test_nearest_means_are_the_peers_prototypical_networks():
    methods = pytest.importorskip("easyfsl.methods")
    support, query = normal(2, 6, 4, seed=3), normal(2, 5, 4, seed=4)
    labels = torch.arange(3).repeat_interleave(2)
    found = nearest_mean(support, query, 3)
    for task in range(2):
        own = methods.PrototypicalNetworks(nn.Identity())
        own.process_support_set(support[task], labels)
        assert torch.allclose(found[task], own(query[task]), atol=1e-9)


def test_every_peer_classifies_what_is_easy():
    pytest.importorskip("easyfsl")
    centres = 4 * torch.eye(3)
    labels = torch.arange(3).repeat_interleave(4)
    support = centres[labels] + 0.1 * uniform(12, 3, seed=5)
    query = centres[labels] + 0.1 * uniform(12, 3, seed=6)
    found = peers(torch.full((3,), 0.5), 3, 0.01)
    for name, peer in found.items():
        assert peer_scores(peer, support, labels, query).argmax(1).equal(labels), name
    transductive = {name for name, peer in found.items() if peer.is_transductive()}
    from projects.idp.labels import METHODS

    assert transductive == {n for n in found if METHODS[n].inference == "transductive"}


# ---- data ----------------------------------------------------------------------------------------


def test_targets_are_rgb_of_one_size_and_capped():
    pool = data.target("synthetic", 7, 20, 0, [])
    assert pool.pixels.shape == (56, 3, 20, 20)
    assert pool.labels.bincount().tolist() == [7] * 8
    with pytest.raises(UserError, match="no target 'cub-x'"):
        data.target("cub-x", 7, 20, 0, [])


def test_classes_of_the_source_are_disjoint(monkeypatch):
    monkeypatch.setattr(data, "quickdraw_classes", lambda: [str(n) for n in range(30)])
    parts = data.source_classes(10, 5, 8, 0)
    assert [len(part) for part in parts] == [10, 5, 8]
    assert len({name for part in parts for name in part}) == 23
    assert parts != data.source_classes(10, 5, 8, 1)


def test_tiles_do_not_overlap_and_cover_their_photograph(monkeypatch):
    photo = np.arange(64 * 5 * 64 * 5, dtype=np.uint32).reshape(320, 320) % 251
    photos = {"one": photo.astype(np.uint8), "small": np.zeros((70, 70, 3), np.uint8)}
    monkeypatch.setattr(data.loaders, "photos", lambda: photos)
    pool = data._photos([])
    assert pool.classes == ("one",)  # the other has one tile, too few for a task
    assert pool.pixels.shape == (25, 3, 64, 64)
    assert torch.equal(pool.pixels[7, 0], torch.from_numpy(photos["one"][64:128, 128:192]))


def test_support_and_queries_of_a_task_are_disjoint_and_its_classes_differ():
    labels = torch.arange(40) % 8
    tasks = sample_episodes(labels, 20, 5, 2, 3, 0)
    for support, query in zip(tasks.support, tasks.query, strict=True):
        assert not set(support.tolist()) & set(query.tolist())
        assert len(labels[support].unique()) == 5


def test_the_fixture_network_has_statistics_of_its_own():
    for module in network().modules():
        if isinstance(module, nn.BatchNorm2d):
            assert float((module.running_var - 1).abs().max()) > 1e-3
