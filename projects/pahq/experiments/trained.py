"""T1 on trained models: effects and circuits in low precision against those of fp32 on the same
model and prompts; T4: EAP in low precision.
"""

import numpy as np
import torch
from pydantic import Field, PositiveInt
from scipy.stats import spearmanr

from projects.pahq import attribution
from projects.pahq.data import Task
from projects.pahq.decoder import Decoder
from projects.pahq.engine import Engine
from projects.pahq.experiments.common import (
    engine_of,
    policy,
    prompts,
    reference,
    trained_model,
    variants,
)
from projects.pahq.graph import Mask
from projects.pahq.labels import (
    ALL,
    ATTRIBUTION,
    CIRCUIT,
    EFFECTS,
    FP32,
    NONE,
    PAHQ,
    PAHQ_BOTH,
    PAHQ_SENDER,
    RANDOM,
    RTN,
)
from projects.pahq.metrics import Kl
from projects.pahq.policy import Policy, Scope
from projects.pahq.quantise import Format, Scale
from projects.pahq.roc import jaccard
from projects.pahq.search import effects, search
from shared import experiment
from shared.seeding import step_seed


class Config(experiment.Config):
    tasks: list[str]
    """names of `data.SMALL`"""
    seeds: PositiveInt
    """models of each task"""
    prompts: PositiveInt
    """of a search"""
    held_out: PositiveInt
    """prompts by which circuits are judged"""
    formats: list[Format]
    """low formats of effects and of EAP"""
    circuit_format: Format
    """low format of searches"""
    threshold: float = Field(gt=0)
    """of searches, and the one whose sides effects are counted on, nats"""
    batch: PositiveInt
    """edges evaluated at once"""
    look_ahead: PositiveInt
    """removals tried at once in a search"""
    ablation_tasks: list[str]
    """tasks whose first model is taken for scopes, scales and who is high"""
    ablation_format: Format
    """low format of that"""


def run(config: Config, run: experiment.Run) -> None:
    cells = [(name, seed) for name in config.tasks for seed in range(config.seeds)]
    for name, seed in run.progress(cells, "models"):
        decoder = trained_model(run, name, seed).decoder()
        task = prompts(name, config.prompts, step_seed(config.seed, seed), "search")
        metric = Kl(reference(decoder, task))
        same = {"task": name, "seed": seed}
        exact = effects(engine_of(decoder, task), metric, batch=config.batch)
        for method, form in variants(config.formats, (RTN, PAHQ))[1:]:
            how = policy(method, form or "int8")
            _effects(config, run, decoder, task, metric, exact, how, method, same)
        if seed == 0 and name in config.ablation_tasks:
            _ablation(config, run, decoder, task, metric, exact, same)
        _circuits(config, run, decoder, task, metric, same)
        _attribution(config, run, decoder, task, same)


def _effects(
    config: Config,
    run: experiment.Run,
    decoder: Decoder,
    task: Task,
    metric: Kl,
    exact: np.ndarray,
    how: Policy,
    method: str,
    same: dict[str, object],
) -> None:
    """Every edge's effect on the whole graph, against fp32's."""
    engine = engine_of(decoder, task, how)
    with torch.no_grad():
        floor = float(metric(engine.logits()[None])[0])
    edges = engine.graph.full()
    found, true = effects(engine, metric, batch=config.batch)[edges], exact[edges]
    run.row(
        kind=EFFECTS,
        **same,
        method=method,
        format=how.format,
        scope=how.scope,
        scale=how.scale,
        edges=len(true),
        effect_error=float(np.sqrt(np.mean((found - true) ** 2))),
        effect_deviation=float(true.std()),
        rank_correlation=float(spearmanr(found, true).statistic),
        other_side=int(((found < config.threshold) != (true < config.threshold)).sum()),
        floor_nats=floor,
    )


def _ablation(
    config: Config,
    run: experiment.Run,
    decoder: Decoder,
    task: Task,
    metric: Kl,
    exact: np.ndarray,
    same: dict[str, object],
) -> None:
    """Which head is high, how weights are scaled, and what is low."""
    form = config.ablation_format
    cases: list[tuple[str, Format, Scope, Scale]] = [
        (PAHQ_SENDER, form, "qkv", "head"),
        (PAHQ_BOTH, form, "qkv", "head"),
        *((method, "int4", "qkv", "head") for method in (RTN, PAHQ)),
        *((method, "e4m3", "qkv", "none") for method in (RTN, PAHQ)),
        *((method, form, "qkv", "channel") for method in (RTN, PAHQ)),
        *((method, form, "linear", "head") for method in (RTN, PAHQ)),
    ]  # type: ignore[list-item]
    for method, low, scope, scale in cases:
        how = policy(method, low, scope=scope, scale=scale)
        _effects(config, run, decoder, task, metric, exact, how, method, same)


def _circuits(
    config: Config,
    run: experiment.Run,
    decoder: Decoder,
    task: Task,
    metric: Kl,
    same: dict[str, object],
) -> None:
    """Greedy circuits, judged in fp32 on held-out prompts."""
    held_out = prompts(str(same["task"]), config.held_out, int(str(same["seed"])), "held out")
    judge, reference_kl = engine_of(decoder, held_out), Kl(reference(decoder, held_out))
    full: Mask | None = None

    def row(method: str, mask: Mask, **more: object) -> None:
        assert full is not None
        with torch.no_grad():
            judge.set_mask(mask)
            logits = judge.logits()[None]
        run.row(
            kind=CIRCUIT,
            **same,
            method=method,
            format=None if method not in (RTN, PAHQ) else config.circuit_format,
            edges=int(mask.sum()),
            kl_nats=float(reference_kl(logits)[0]),
            task_accuracy=float(held_out.margin().accuracy(logits)[0]),
            jaccard_share=jaccard(mask, full),
            **more,
        )

    for method in (FP32, RTN, PAHQ):
        engine = engine_of(decoder, task, policy(method, config.circuit_format))
        found = search(engine, metric, config.threshold, look_ahead=config.look_ahead)
        full = found.mask if full is None else full
        row(method, found.mask, evaluations=found.evaluations, floor_nats=found.floor)
    assert full is not None
    edges = decoder.graph.full()
    draw = np.random.default_rng(step_seed(config.seed, "random", str(same)))
    row(RANDOM, attribution.top(draw.random(edges.shape), edges, int(full.sum())))
    row(NONE, np.zeros_like(edges))
    row(ALL, edges)


def _attribution(
    config: Config, run: experiment.Run, decoder: Decoder, task: Task, same: dict[str, object]
) -> None:
    """EAP of the task's own metric, in low precision and with a head high for each receiver."""

    def scores(how: Policy, by_receiver: bool) -> np.ndarray:
        engine: Engine = engine_of(decoder, task, how)
        make = attribution.eap_by_receiver if by_receiver else attribution.eap
        found: np.ndarray = make(engine, task.margin())[engine.graph.full()]
        return found

    exact = scores(Policy(), False)
    for form in config.formats:
        for method in (RTN, PAHQ):
            found = scores(policy(method, form), method == PAHQ)
            run.row(
                kind=ATTRIBUTION,
                **same,
                method=method,
                format=form,
                effect_error=float(np.sqrt(np.mean((found - exact) ** 2))),
                effect_deviation=float(exact.std()),
                rank_correlation=float(spearmanr(np.abs(found), np.abs(exact)).statistic),
            )
