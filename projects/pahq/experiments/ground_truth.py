"""T1, F1: how well each method finds the edges of circuits that were built, and so are known."""

from collections.abc import Callable

import numpy as np
import torch
from pydantic import PositiveInt

from projects.pahq import attribution, built, roc
from projects.pahq.baselines import Released
from projects.pahq.built import Built
from projects.pahq.engine import Engine
from projects.pahq.experiments.common import GridConfig, policy, variants
from projects.pahq.graph import Mask
from projects.pahq.labels import (
    AREA,
    EAP,
    EAP_IG,
    HISP,
    PAHQ,
    POINT,
    RANDOM,
    RELEASED,
    RTN,
    SP,
)
from projects.pahq.metrics import SquaredDistance
from projects.pahq.policy import Policy
from projects.pahq.quantise import Format
from projects.pahq.search import search
from shared import experiment
from shared.seeding import step_seed


class Config(GridConfig):
    circuits: list[str]
    """names of `built.NAMES`"""
    seeds: PositiveInt
    """rotations and prompts of each circuit"""
    prompts: PositiveInt
    """of a search"""
    formats: list[Format]
    """low formats"""
    look_ahead: PositiveInt
    """removals tried at once in a search"""
    probes: list[float]
    """weights of the number of nodes in subnetwork probing"""


def run(config: Config, run: experiment.Run) -> None:
    cells = [(name, seed) for name in config.circuits for seed in range(config.seeds)]
    for name, seed in run.progress(cells, "circuits"):
        circuit = built.build(name, step_seed(config.seed, name, seed), config.prompts)
        _searches(config, run, circuit, seed)
        _rankings(config, run, circuit, seed)


def _engine(circuit: Built, how: Policy, kind: type[Engine] = Engine) -> Engine:
    decoder = circuit.model.decoder()
    return kind(decoder, circuit.clean, circuit.corrupted, circuit.positions, how, ablation="zero")


def _metric(circuit: Built) -> SquaredDistance:
    with torch.no_grad():
        return SquaredDistance(_engine(circuit, Policy()).logits())


def _searches(config: Config, run: experiment.Run, circuit: Built, seed: int) -> None:
    metric = _metric(circuit)
    grid = np.geomspace(config.lowest, config.highest, config.thresholds)
    edges = circuit.model.decoder().graph.full()
    for method, form in [*variants(config.formats, (RTN, PAHQ)), (RELEASED, "e4m3")]:
        how = (
            Policy("pahq-receiver", "e4m3", scale="none")
            if method == RELEASED
            else policy(method, form or "int8")
        )
        kind = Released if method == RELEASED else Engine
        found, floor = [], 0.0
        for threshold in grid:
            ahead = 1 if kind is Released else config.look_ahead
            result = search(_engine(circuit, how, kind), metric, float(threshold), look_ahead=ahead)
            found.append(result.mask)
            floor = result.floor
        exact = sum(bool((mask == circuit.true).all()) for mask in found)
        _areas(
            run, circuit, seed, method, form, edges, found,
            exact_thresholds=exact,
            thresholds=len(grid),
            false_edges=int((found[0] & ~circuit.true).sum()),
            missed_edges=int((circuit.true & ~found[0]).sum()),
            floor_loss=floor,
        )  # fmt: skip


def _rankings(config: Config, run: experiment.Run, circuit: Built, seed: int) -> None:
    """Methods that give a score and no circuit: a circuit for each threshold on it."""
    metric, engine = _metric(circuit), _engine(circuit, Policy())
    graph = engine.graph
    # the metric's gradient is zero at the clean run, where the distance is
    task = _Norm()
    draw = np.random.default_rng(step_seed(config.seed, "random", seed))
    scorers: dict[str, Callable[[], np.ndarray]] = {
        EAP: lambda: attribution.eap(engine, task),
        EAP_IG: lambda: attribution.eap_ig(engine, metric),
        HISP: lambda: attribution.edges_of_nodes(graph, attribution.hisp(engine, task)),
        SP: lambda: attribution.edges_of_nodes(
            graph, attribution.probe_path(engine, metric, config.probes)
        ),
        RANDOM: lambda: draw.random(graph.full().shape),
    }
    for method, scorer in scorers.items():
        scores, edges = np.abs(scorer()), graph.full()
        levels = np.unique(scores[edges])[::-1]
        found = [(scores >= level) & edges for level in levels]
        _areas(run, circuit, seed, method, None, edges, found)


class _Norm:
    """Minus the squared length of the logits: a metric with a gradient at the clean run."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return -(logits**2).sum(-1).mean(dim=(-2, -1))


def _areas(
    run: experiment.Run,
    circuit: Built,
    seed: int,
    method: str,
    form: Format | None,
    edges: Mask,
    found: list[Mask],
    **more: object,
) -> None:
    points = [roc.point(mask, circuit.true, edges) for mask in found]
    nodes = roc.node_points(found, circuit.true, edges)
    same = {"circuit": circuit.name, "seed": seed, "method": method, "format": form}
    run.row(
        kind=AREA,
        **same,
        edges=int(edges.sum()),
        true_edges=int(circuit.true.sum()),
        pessimistic_auc=roc.pessimistic_auc(points),
        trapezoid_auc=roc.trapezoid_auc(points),
        node_auc=roc.pessimistic_auc(nodes),
        **more,
    )
    if seed == 0:
        for each in roc.curve(points):
            run.row(
                kind=POINT,
                **same,
                false_positive_rate=each.false_positive,
                true_positive_rate=each.true_positive,
            )
