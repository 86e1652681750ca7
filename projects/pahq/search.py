"""ACDC's greedy search: visit receivers from the output down, try each edge into them, and remove
it for good where the metric rises by less than a threshold.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch

from projects.pahq.engine import Engine, Metric, Trial
from projects.pahq.graph import Graph, Mask
from projects.pahq.policy import Head
from shared.errors import UserError

Order = Literal["normal", "reverse"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass
class Step:
    """One receiver's edges, decided.

    Attributes:
        senders, effects, kept: of each edge tested, in the order of testing: the change of the
            metric when it was removed, and whether it stayed. Edges of a receiver whose node has no
            path to the output are removed untested; `dead` counts them.
        metric: of the graph after the step.
    """

    receiver: int
    senders: list[int]
    effects: list[float]
    kept: list[bool]
    dead: int
    metric: float


@dataclass
class Found:
    """A search's result.

    Attributes:
        mask: bool [receivers, senders].
        effects: [receivers, senders]: of each edge tested; NaN of the others.
        floor: the metric of the whole graph before anything was removed and with no head high. With
            the full model in full precision as the reference it is 0, but for what low precision
            costs.
        evaluations: trials, of which look-ahead makes more than there are edges.
    """

    mask: Mask
    effects: np.ndarray
    floor: float
    evaluations: int = 0
    steps: list[Step] = field(default_factory=list)


def high_heads(graph: Graph, receiver: int) -> list[Head]:
    """The heads that own a receiver; none of the output's and the MLPs'."""
    heads = (graph.head_of(sender) for sender in graph.owners(receiver))
    return [head for head in heads if head is not None]


def candidates(mask: Mask, receiver: int, order: Order) -> list[int]:
    """The senders of a receiver's edges, in the order in which they are tested."""
    senders = np.flatnonzero(mask[receiver]).tolist()
    return senders if order == "normal" else senders[::-1]


def search(
    engine: Engine,
    metric: Metric,
    threshold: float,
    *,
    order: Order = "normal",
    absolute: bool = False,
    look_ahead: int = 1,
    fresh: bool = False,
    done: list[Step] | None = None,
    progress: Callable[[Step], None] = lambda step: None,
) -> Found:
    """Search from the engine's mask down (all edges, or the survivors of an attribution).

    Args:
        threshold: an edge is removed where the metric rises by less than this, strictly.
        order: of the senders of a receiver: normal from the embedding on, reverse from the last.
        absolute: compare the size of the change.
        look_ahead: removals tried at once; the result is that of one after the other. It pays where
            launches cost more than the work (on a GPU).
        fresh: compute the whole state anew at each receiver, so that it is a function of what is
            left to the bit, and a search that goes on after a kill ends as if it had not stopped.
        done: steps of a search that was interrupted, which are not tested again.
        progress: called after each step.

    Raises:
        UserError: the metric becomes NaN.
    """
    graph, mask = engine.graph, engine.mask.copy()
    with torch.no_grad():
        found = Found(mask, np.full(mask.shape, np.nan), _now(engine, metric))
        steps = list(done or [])
        if steps:
            _repeat(engine, mask, found, steps)
        rest = list(graph.search_order())[len(steps) :]
        for place, receiver in enumerate(rest):
            after = _next_head(engine, receiver, rest[place + 1 :])
            how = (threshold, order, absolute, look_ahead, fresh)
            now = found.steps[-1].metric if found.steps else found.floor
            step = _visit(engine, metric, receiver, after, now, *how)
            found.steps.append(step)
            _record(found, step)
            progress(step)
    found.mask = engine.mask.copy()
    found.evaluations = engine.evaluations
    return found


def _next_head(engine: Engine, receiver: int, rest: list[int]) -> Head | None:
    """The head that will be high after this receiver's, as far as the mask tells now: one that has
    edges and a path to the output.
    """
    if not engine.policy.follows_receiver:
        return None
    graph = engine.graph
    live, now = graph.live(engine.mask), set(graph.owners(receiver))
    for other in rest:
        owners = set(graph.owners(other)) - now
        heads = [h for h in map(graph.head_of, sorted(owners)) if h is not None]
        if heads and engine.mask[other].any() and live[list(owners)].any():
            return heads[0]
    return None


def _now(engine: Engine, metric: Metric) -> float:
    return _finite(float(metric(engine.logits()[None])[0]))


def _finite(value: float) -> float:
    if value != value:
        raise UserError("the metric is NaN: the model's logits are, or the task's metric divides 0")
    return value


def _record(found: Found, step: Step) -> None:
    found.effects[step.receiver, step.senders] = step.effects


def _repeat(engine: Engine, mask: Mask, found: Found, steps: list[Step]) -> None:
    for step in steps:
        mask[step.receiver] = False
        kept = [s for s, stays in zip(step.senders, step.kept, strict=True) if stays]
        mask[step.receiver, kept] = True
        found.steps.append(step)
        _record(found, step)
    engine.set_mask(mask)


def _visit(
    engine: Engine,
    metric: Metric,
    receiver: int,
    after: Head | None,
    now: float,
    threshold: float,
    order: Order,
    absolute: bool,
    look_ahead: int,
    fresh: bool,
) -> Step:
    """Decide the edges of one receiver; `now` is the metric before."""
    graph = engine.graph
    senders = candidates(engine.mask, receiver, order)
    owners = graph.owners(receiver)
    if owners and not graph.live(engine.mask)[list(owners)].any():
        engine.mask[receiver] = False
        return Step(receiver, [], [], [], len(senders), now)
    if not senders:
        return Step(receiver, [], [], [], 0, now)
    heads = high_heads(graph, receiver)
    own = heads if engine.policy.follows_receiver else []
    engine.projections.masters.use(own[0] if own else None, after)
    if fresh:
        engine.refresh(own)
    else:
        engine.select(own)
    step = Step(receiver, [], [], [], 0, _now(engine, metric))
    for sender, effect, kept, now in _decide(
        engine, metric, receiver, senders, own, step.metric, threshold, absolute, look_ahead
    ):
        step.senders.append(sender)
        step.effects.append(effect)
        step.kept.append(kept)
        step.metric = now
    return step


def _decide(
    engine: Engine,
    metric: Metric,
    receiver: int,
    senders: list[int],
    own: list[Head],
    now: float,
    threshold: float,
    absolute: bool,
    look_ahead: int,
) -> Iterator[tuple[int, float, bool, float]]:
    """Sender, effect, whether it stays, and the metric after it, of each edge in turn.

    In a batch, variant j removes the first j + 1 of the edges left. Each stands for the removal of
    its last edge as long as all before it were removed; from the first that stays on, the others
    are tried again.
    """
    by_sender = engine.policy.follows_sender
    size = 1 if by_sender else look_ahead
    while senders:
        batch = senders[:size]
        if by_sender:
            head = engine.graph.head_of(batch[0])
            engine.select([*own, head] if head else own)
            now = _now(engine, metric)
        trial = engine.trial(receiver, [batch[: j + 1] for j in range(len(batch))], metric)
        gone = 0
        for sender, value in zip(batch, trial.metric.tolist(), strict=True):
            effect = _finite(value) - now
            senders = senders[1:]
            if (abs(effect) if absolute else effect) < threshold:
                gone, now = gone + 1, value
                yield sender, effect, False, now
            else:
                yield sender, effect, True, now
                break
        if gone:
            engine.remove(receiver, batch[:gone], trial, gone - 1)


def effects(
    engine: Engine,
    metric: Metric,
    edges: list[tuple[int, int]] | None = None,
    batch: int = 1,
) -> np.ndarray:
    """The change of the metric when an edge is removed from the engine's mask and nothing else,
    [receivers, senders]; NaN where not asked.

    Args:
        edges: (receiver, sender) pairs; all edges of the mask where None.
        batch: edges of a receiver that are evaluated at once. A policy that follows senders takes
            one after the other.
    """
    graph = engine.graph
    by_sender = engine.policy.follows_sender
    result = np.full(engine.mask.shape, np.nan)
    wanted: dict[int, list[int]] = {}
    for receiver, sender in edges or np.argwhere(engine.mask).tolist():
        wanted.setdefault(receiver, []).append(sender)
    with torch.no_grad():
        for receiver in graph.search_order():
            own = high_heads(graph, receiver) if engine.policy.follows_receiver else []
            senders = wanted.get(receiver, [])
            size = 1 if by_sender else batch
            for some in (senders[at : at + size] for at in range(0, len(senders), size)):
                head = graph.head_of(some[0]) if by_sender else None
                engine.select([*own, head] if head else own)
                now = _now(engine, metric)
                trial: Trial = engine.trial(receiver, [[sender] for sender in some], metric)
                result[receiver, some] = trial.metric.cpu().numpy() - now
    return result
