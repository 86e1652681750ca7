"""Scores of all edges from a few backward passes, and what is compared with the greedy search:
EAP (Syed et al. 2023), EAP-IG (Hanna et al. 2024), HISP (Michel et al. 2019, as ACDC runs it) and
subnetwork probing (Cao et al. 2021, as ACDC runs it).

All go through `dense`, a differentiable forward that takes a real-valued mask: the derivative of a
metric by an edge's entry is the receiver's gradient times o_s - c_s.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from projects.pahq.engine import Engine, Metric
from projects.pahq.graph import Graph, Mask
from projects.pahq.policy import Head
from projects.pahq.search import high_heads

# of a sender's o - c [n, B, T, D] and its number: what goes on through the graph
Tap = Callable[[int, Tensor], Tensor]
# receivers, and zeros [n, B, T, D] that are added to their inputs
Nudges = list[tuple[list[int], Tensor]]


def dense(
    engine: Engine,
    mask: Tensor | None = None,
    *,
    embedding: Tensor | None = None,
    tap: Tap | None = None,
    nudges: Nudges | None = None,
) -> Tensor:
    """Logits at the scored positions [B, P, vocabulary], with gradients.

    Args:
        mask: real-valued, [receivers, senders]; entries where there is no edge are not looked at.
            None: all edges, which needs no sums by receiver.
        embedding: the output [B, T, D] of the embedding, the clean one where None.
        tap: called with the number of the first of some senders and their o - c.
        nudges: filled with zeros that are added to the inputs of receivers, to be differentiated.
    """
    graph, corrupted = engine.graph, engine.corrupted
    clean = engine.clean_embedding if embedding is None else embedding
    chunks: list[tuple[int, Tensor]] = []
    stream: Tensor | None = None

    def put(sender: int, delta: Tensor) -> None:
        nonlocal stream
        delta = tap(sender, delta) if tap else delta
        if mask is None:
            stream = delta.sum(0) if stream is None else stream + delta.sum(0)
        else:
            chunks.append((sender, delta))

    def inputs(receivers: list[int]) -> Tensor:
        x = engine.base(receivers[0])
        if mask is None:
            assert stream is not None
            x = (x + stream).expand(len(receivers), *x.shape)
        else:
            rows = mask[receivers]
            for sender, delta in chunks:
                weights = rows[:, sender : sender + len(delta)]
                x = x + (weights @ delta.flatten(1)).unflatten(1, delta.shape[1:])
        if nudges is None:
            return x
        zeros = x.new_zeros(x.shape).requires_grad_()
        nudges.append((receivers, zeros))
        return x + zeros

    put(0, (clean - corrupted[0])[None])
    for layer in range(graph.layers):
        first = graph.first_reader(layer)
        attention = list(range(first, first + graph.heads + 2 * graph.kv_heads))
        x = inputs(attention)
        late = [graph.mlp_receiver(layer)] if graph.mlp else []
        early = inputs(late) if late and graph.parallel else None
        by_head = engine.run_heads(layer, range(graph.heads), x, range(len(attention)))
        written = torch.stack(list(by_head))
        head = graph.head(layer, 0)
        put(head, written - corrupted[head : head + graph.heads])
        if late:
            read = inputs(late) if early is None else early
            sender = graph.mlp_sender(layer)
            put(sender, engine.run_mlp(layer, read[0])[None] - corrupted[sender : sender + 1])
    return engine.unembed(inputs([graph.out])[0], 1)[0]


def gradients(engine: Engine, metric: Metric, embedding: Tensor | None = None) -> Tensor:
    """The metric's gradient by the input of every receiver with all edges present, [R, B, T, D].

    Args:
        embedding: as `dense` takes it.
    """
    nudges: Nudges = []
    with torch.enable_grad():
        value = metric(dense(engine, embedding=embedding, nudges=nudges)[None])[0]
        found = torch.autograd.grad(value, [zeros for _, zeros in nudges])
    result = engine.deltas.new_empty(engine.graph.receivers, *engine.deltas.shape[1:])
    for (receivers, _), gradient in zip(nudges, found, strict=True):
        result[receivers] = gradient
    return result


def _scores(engine: Engine, gradient: Tensor) -> np.ndarray:
    """-(o_s - c_s) . dL/d in(r) of every edge."""
    products = gradient.flatten(1) @ engine.deltas.flatten(1).T
    return -products.cpu().numpy() * engine.graph.full()


def eap(engine: Engine, metric: Metric) -> np.ndarray:
    """The first-order estimate of each edge's effect, [receivers, senders]: the change of the
    metric if the edge were removed from the whole graph, in which the engine must be. One forward
    and one backward pass.

    At the clean run the gradient of the KL to the clean run is zero, so this needs another metric.
    """
    return _scores(engine, gradients(engine, metric))


def eap_ig(engine: Engine, metric: Metric, steps: int = 5) -> np.ndarray:
    """As `eap`, with the gradient averaged over inputs between the corrupted and the clean one,
    at (k - 1/2) / steps of the way.
    """
    start, end = engine.corrupted[0], engine.clean_embedding
    total = torch.zeros((), device=end.device)
    for step in range(steps):
        share = (step + 0.5) / steps
        total = total + gradients(engine, metric, start + share * (end - start))
    return _scores(engine, total / steps)


def hisp(engine: Engine, metric: Metric) -> np.ndarray:
    """The importance of each node, [senders]: the mean over prompts of |o . dL/do|."""
    found: list[tuple[int, Tensor]] = []

    def tap(sender: int, delta: Tensor) -> Tensor:
        delta = delta if delta.requires_grad else delta.requires_grad_()
        found.append((sender, delta))
        return delta

    with torch.enable_grad():
        value = metric(dense(engine, tap=tap)[None])[0]
        each_gradient = torch.autograd.grad(value, [delta for _, delta in found])
    scores = np.zeros(engine.graph.senders)
    for (sender, delta), gradient in zip(found, each_gradient, strict=True):
        output = delta.detach() + engine.corrupted[sender : sender + len(delta)]
        each = (output * gradient).sum(dim=(-2, -1)).abs().mean(-1)
        scores[sender : sender + len(delta)] = each.cpu().numpy()
    return scores


def edges_of_nodes(graph: Graph, scores: np.ndarray) -> np.ndarray:
    """The score of an edge where nodes are ranked, [receivers, senders]: the lower of its two ends,
    since it is in the circuit once both are. The output is always in, the embedding is a node.
    """
    result = np.zeros((graph.receivers, graph.senders))
    for receiver in range(graph.receivers):
        owners = graph.owners(receiver)
        end = max((scores[owner] for owner in owners), default=np.inf)
        result[receiver] = np.minimum(scores, end)
    return np.where(graph.full(), result, 0.0)


def top(scores: np.ndarray, edges: Mask, count: int) -> Mask:
    """The `count` edges of the largest size of score; the first ones of equals."""
    size = np.where(edges, np.abs(scores), -np.inf).ravel()
    chosen = np.argsort(-size, kind="stable")[: min(count, int(edges.sum()))]
    mask = np.zeros(edges.size, dtype=bool)
    mask[chosen] = True
    return mask.reshape(edges.shape)


def eap_by_receiver(engine: Engine, metric: Metric) -> np.ndarray:
    """EAP under a policy that follows receivers: a backward pass for each head, which is high in
    it, and one with none for the other receivers. (Ours: one pass for all edges, as EAP has it,
    leaves "the investigated head" undefined.) Gradients pass straight through rounding.
    """
    graph = engine.graph
    scores = np.zeros(engine.mask.shape)
    rows: dict[tuple[Head, ...], list[int]] = {}
    for receiver in range(graph.receivers):
        rows.setdefault(tuple(high_heads(graph, receiver)), []).append(receiver)
    for heads, receivers in rows.items():
        engine.select(heads)
        scores[receivers] = eap(engine, metric)[receivers]
    return scores


@dataclass(frozen=True)
class Probe:
    """Settings of subnetwork probing: hard-concrete masks on nodes (Louizos et al. 2018)."""

    steps: int = 100
    lr: float = 0.1
    seed: int = 0
    beta: float = 2 / 3
    low: float = -0.1
    high: float = 1.1


def probe(engine: Engine, metric: Metric, weight: float, settings: Probe | None = None) -> Tensor:
    """The probability that each node stays, [senders], trained on metric + weight * expected share
    of nodes. The embedding always stays.
    """
    settings = settings or Probe()
    graph = engine.graph
    draw = torch.Generator(engine.deltas.device).manual_seed(settings.seed)
    logits = torch.full((graph.senders,), 2.0, device=engine.deltas.device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], settings.lr)
    edges = torch.from_numpy(engine.mask).to(engine.deltas)
    shift = settings.beta * np.log(-settings.low / settings.high)
    for _ in range(settings.steps):
        u = torch.rand(logits.shape, generator=draw, device=logits.device).clamp(1e-6, 1 - 1e-6)
        noisy = torch.sigmoid((u.logit() + logits) / settings.beta)
        gates = (noisy * (settings.high - settings.low) + settings.low).clamp(0, 1)
        gates = torch.cat([torch.ones_like(gates[:1]), gates[1:]])
        with torch.enable_grad():
            value = metric(dense(engine, edges * gates)[None])[0]
            stays = torch.sigmoid(logits - shift)
            loss = value + weight * stays[1:].mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    kept = torch.sigmoid(logits - shift).detach()
    kept[0] = 1.0
    return kept


def probe_path(
    engine: Engine, metric: Metric, weights: Iterable[float], settings: Probe | None = None
) -> np.ndarray:
    """The score of each node from probes of rising weights, [senders]: the mean probability of
    staying, by which nodes leave in the order in which the weights drive them out.
    """
    kept = [probe(engine, metric, weight, settings) for weight in weights]
    return torch.stack(kept).mean(0).cpu().numpy().astype(float)
