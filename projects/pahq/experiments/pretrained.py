"""T1 on a pretrained model: the strongest edges by EAP-IG, then ACDC on them, in full and in low
precision. Nobody knows its true circuits, so no AUC is given: circuits are judged by what they do.
"""

import time
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt

from projects.pahq import attribution
from projects.pahq.data import Task
from projects.pahq.decoder import Decoder
from projects.pahq.engine import check
from projects.pahq.experiments.common import DeviceConfig, engine_of, policy, prompts, reference
from projects.pahq.families import decoder_of
from projects.pahq.graph import Mask
from projects.pahq.labels import ALL, EAP_IG, FP32, NONE, PAHQ, RANDOM, RTN, circuit_array
from projects.pahq.metrics import Kl
from projects.pahq.policy import Scope
from projects.pahq.quantise import Format
from projects.pahq.roc import jaccard
from projects.pahq.search import search
from projects.pahq.tasks import load_task
from shared import experiment, models
from shared.seeding import step_seed


class Config(DeviceConfig):
    model: str
    """a catalogue entry, a folder or a hub id; or a task of `models`, whose first model is taken"""
    tasks: list[str]
    """names of `tasks.TASKS`"""
    prompts: PositiveInt
    """of a search; as many others judge the circuit"""
    sizes: list[PositiveInt]
    """edges kept by EAP-IG"""
    start: PositiveInt
    """edges of EAP-IG that the greedy search starts from"""
    searched: list[str]
    """tasks that are searched; of the others EAP-IG's circuits are judged"""
    steps: PositiveInt
    """of EAP-IG"""
    format: Format
    """low format"""
    scopes: list[Scope]
    """what is low"""
    threshold: float = Field(gt=0)
    """nats"""


def run(config: Config, run: experiment.Run) -> None:
    torch.manual_seed(config.seed)
    for name in run.progress(config.tasks, "tasks"):
        decoder, task, held_out = _load(config, run, name)
        check(decoder, task.clean)
        _task(config, run, name, decoder, task, held_out)


def _load(config: Config, run: experiment.Run, name: str) -> tuple[Decoder, Task, Task]:
    """The model, and prompts of a task for the search and for the judgement."""
    seeds = [step_seed(config.seed, name, what) for what in ("search", "held out")]
    if config.model == "small":
        from projects.pahq.experiments.common import trained_model

        decoder = trained_model(run, name, 0).decoder()
        search_task, held_out = (prompts(name, config.prompts, seed, "") for seed in seeds)
        return decoder, search_task, held_out
    model, tokenizer = _loaded(config.model)
    device = torch.device(config.device)
    decoder = decoder_of(model.to(device))
    size = model.config.vocab_size
    search_task, held_out = (
        load_task(name, tokenizer, size, config.prompts, seed).to(device) for seed in seeds
    )
    return decoder, search_task, held_out


def edges_array(mask: Mask, effects: np.ndarray) -> np.ndarray:
    """Receiver, sender and effect of each edge, [n, 3]."""
    places = np.argwhere(mask)
    return np.column_stack([places, effects[mask]])


_MODELS: dict[str, tuple[Any, Any]] = {}


def _loaded(name: str) -> tuple[Any, Any]:
    if name not in _MODELS:
        model, tokenizer = models.load_causal_lm(name)
        _MODELS[name] = model.requires_grad_(False), tokenizer
    return _MODELS[name]


def _task(
    config: Config,
    run: experiment.Run,
    name: str,
    decoder: Decoder,
    task: Task,
    held_out: Task,
) -> None:
    metric = Kl(reference(decoder, task))
    judge = engine_of(decoder, held_out)
    with torch.no_grad():
        judge_kl = Kl(judge.logits())
    graph = decoder.graph
    edges = graph.full()

    def row(method: str, mask: Mask, **more: object) -> None:
        with torch.no_grad():
            judge.set_mask(mask)
            logits = judge.logits()[None]
        run.row(
            task=name,
            method=method,
            edges=int(mask.sum()),
            of_edges=graph.edges,
            layers=graph.layers,
            heads=graph.heads,
            kv_heads=graph.kv_heads,
            mlp=graph.mlp,
            kl_nats=float(judge_kl(logits)[0]),
            margin_difference=-float(held_out.margin()(logits)[0]),
            task_accuracy=float(held_out.margin().accuracy(logits)[0]),
            **more,
        )

    engine = engine_of(decoder, task)
    start = time.process_time()
    scores = attribution.eap_ig(engine, task.margin(), config.steps)
    seconds = time.process_time() - start
    row(ALL, edges)
    row(NONE, np.zeros_like(edges))
    draw = np.random.default_rng(step_seed(config.seed, name, "random"))
    noise = draw.random(edges.shape)
    for size in config.sizes:
        row(EAP_IG, attribution.top(scores, edges, size), search_seconds=seconds)
        row(RANDOM, attribution.top(noise, edges, size))
    if name not in config.searched:
        return
    survivors = graph.without_dead(attribution.top(scores, edges, config.start))
    full: Mask | None = None
    cases = [(FP32, None), *((m, s) for s in config.scopes for m in (RTN, PAHQ))]
    for method, scope in cases:
        how = policy(method, config.format, **({"scope": scope} if scope else {}))
        engine = engine_of(decoder, task, how)
        engine.set_mask(survivors)
        start = time.process_time()
        found = search(engine, metric, config.threshold)
        seconds = time.process_time() - start
        full = found.mask if full is None else full
        if method == PAHQ:
            run.array(circuit_array(name, str(scope)), edges_array(found.mask, found.effects))
        row(
            method,
            found.mask,
            format=config.format if scope else None,
            scope=scope,
            search_seconds=seconds,
            evaluations=found.evaluations,
            evaluation_seconds=seconds / max(found.evaluations, 1),
            floor_nats=found.floor,
            jaccard_share=jaccard(found.mask, full),
        )
