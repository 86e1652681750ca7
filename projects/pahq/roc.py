"""How well a ranking or a series of circuits finds the edges of a known one.

A series of circuits gives points (false positive rate, true positive rate) with (0, 0) and (1, 1)
added. Two areas: pessimistic, a staircase that rises only where a point is reached (as ACDC's code
has it; it never credits a circuit that nobody found), and trapezoid, straight between points.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from projects.pahq.graph import Mask


class Point(NamedTuple):
    """Rates of one circuit."""

    false_positive: float
    true_positive: float


def point(found: Mask, true: Mask, edges: Mask) -> Point:
    """Of a circuit against the true one, over all edges."""
    right, wrong = true & edges, edges & ~true
    return Point(
        float((found & wrong).sum() / max(wrong.sum(), 1)),
        float((found & right).sum() / max(right.sum(), 1)),
    )


def curve(points: Iterable[Point]) -> list[Point]:
    """The upper envelope that goes up with the false positive rate, from (0, 0) to (1, 1): a point
    below an earlier one is no choice for anybody.
    """
    best: list[Point] = []
    for each in sorted([Point(0.0, 0.0), *points, Point(1.0, 1.0)]):
        if best and best[-1].false_positive == each.false_positive:
            best[-1] = each
        elif not best or each.true_positive >= best[-1].true_positive:
            best.append(each)
    return best


def pessimistic_auc(points: Iterable[Point]) -> float:
    """The area under the staircase: between two points the height of the left one."""
    return _area(curve(points), lambda left, right: left)


def trapezoid_auc(points: Iterable[Point]) -> float:
    """The area under straight lines."""
    return _area(curve(points), lambda left, right: (left + right) / 2)


def _area(points: list[Point], height: Callable[[float, float], float]) -> float:
    return float(
        sum(
            (b.false_positive - a.false_positive) * height(a.true_positive, b.true_positive)
            for a, b in pairwise(points)
        )
    )


def points_of_scores(scores: np.ndarray, true: Mask, edges: Mask) -> list[Point]:
    """A point for each threshold on the size of the scores."""
    size = np.abs(np.where(edges, scores, 0.0))
    levels = np.unique(size[edges])[::-1]
    return [point((size >= level) & edges, true, edges) for level in levels]


def node_points(circuits: Iterable[Mask], true: Mask, edges: Mask) -> list[Point]:
    """The same over senders: one is in a circuit where an edge leads out of it."""
    nodes = edges.any(axis=0)
    return [point(found.any(axis=0), true.any(axis=0), nodes) for found in circuits]


def jaccard(one: Mask, other: Mask) -> float:
    """Edges in both over edges in either; 1 for two empty circuits."""
    either = (one | other).sum()
    return float((one & other).sum() / either) if either else 1.0
