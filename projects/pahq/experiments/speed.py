"""T2, C6: what an evaluation costs, where the time goes, and what each saving is worth.

Rows by `kind`: precision (one evaluation of a pretrained model's shape by policy), layer (one
evaluation by the receiver's layer against the full patched forward, weighted by edges), step (the
ladder from plain ACDC to low precision), whole (a whole search against plain ACDC).
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from projects.pahq.baselines import Hooked, plain_search
from projects.pahq.decoder import Decoder
from projects.pahq.engine import Engine
from projects.pahq.experiments.common import RepeatsConfig, policy
from projects.pahq.families import decoder_of
from projects.pahq.labels import FP32, PAHQ, PLAIN, RTN
from projects.pahq.metrics import Kl, kl
from projects.pahq.policy import Policy
from projects.pahq.search import high_heads, search
from shared import experiment, meters, models

PRECISIONS = {
    "fp32": Policy(),
    "bf16, linear": Policy("rtn", "bf16", "linear"),
    "int8, qkv": Policy("rtn", "int8", "qkv"),
    "int8, attn": Policy("rtn", "int8", "attn"),
    "int8, linear": Policy("rtn", "int8", "linear"),
    "PAHQ, int8, qkv": Policy("pahq-receiver", "int8", "qkv"),
    "PAHQ, int8, linear": Policy("pahq-receiver", "int8", "linear"),
    "PAHQ, e4m3, qkv": Policy("pahq-receiver", "e4m3", "qkv"),
    "PAHQ, e4m3, linear": Policy("pahq-receiver", "e4m3", "linear"),
}


class Shape(experiment.Config):
    """A model with random weights: times and bytes do not depend on them."""

    family: str
    """gpt2 or llama"""
    layers: PositiveInt
    """in all"""
    hidden: PositiveInt
    """width"""
    heads: PositiveInt
    """of a layer"""
    vocabulary: PositiveInt
    """tokens"""


class Config(RepeatsConfig):
    model: str
    """of the rows `precision`: a catalogue entry, or random for the shape"""
    precisions: list[str]
    """names of PRECISIONS"""
    shape: Shape
    """of the rows `layer` and `step`"""
    small: Shape
    """of the rows `whole`"""
    prompts: PositiveInt
    """in a batch"""
    small_prompts: PositiveInt
    """in a batch of the rows `whole`"""
    tokens: PositiveInt
    """of a prompt"""
    layers: list[int]
    """receivers' layers that are timed, ends included; costs between them are interpolated"""
    edges: PositiveInt
    """evaluations of one receiver that a timing takes, as a search makes them"""
    threshold: float = Field(gt=0)
    """of the rows `whole`, nats"""
    gain: float = Field(gt=0)
    """of the weights of the rows `whole`"""


def run(config: Config, run: experiment.Run) -> None:
    device = torch.device(config.device)
    with torch.no_grad():
        shaped = decoder_of(random_model(config.shape, device))
        _by_layer(config, run, shaped)
        _steps(config, run, random_model(config.shape, device))
        _precisions(config, run, shaped if config.model == "random" else _pretrained(config))
    _whole(config, run, random_model(config.small, device, config.gain))


def random_model(shape: Shape, device: torch.device, gain: float = 1.0) -> Any:
    """A model of a shape with random weights, `gain` times as large as they are drawn: as they
    are, hardly an edge has an effect, and a search is over at once.
    """
    config = models.causal_lm_config(
        shape.family, shape.layers, shape.hidden, shape.heads, shape.vocabulary, positions=1024
    )  # type: ignore[arg-type]
    model = models.random_causal_lm(config, device=str(device)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter *= gain
    return model


def _pretrained(config: Config) -> Decoder:
    model, _ = models.load_causal_lm(config.model)
    return decoder_of(model.requires_grad_(False).to(config.device))


def batch(
    decoder_or_vocabulary: int, prompts: int, tokens: int, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random clean and corrupted tokens [B, T], and the last position."""
    draw = torch.Generator().manual_seed(seed)
    both = torch.randint(decoder_or_vocabulary, (2, prompts, tokens), generator=draw).to(device)
    return both[0], both[1], torch.full((prompts, 1), tokens - 1, device=device)


def _engine(config: Config, decoder: Decoder, how: Policy | None = None) -> Engine:
    vocabulary = decoder.matrices["unembed"].weight.shape[0]
    data = batch(vocabulary, config.prompts, config.tokens, config.device, config.seed)
    return Engine(decoder, *data, how)


def _clock(config: Config) -> Callable[[], float]:
    """On a CPU seconds of the processor: one thread, whatever else the machine does."""
    return time.process_time if config.device == "cpu" else time.perf_counter


def _evaluate(engine: Engine, metric: Kl, receiver: int, edges: int) -> Callable[[], None]:
    """Some evaluations of one receiver, without what is done once for it."""

    def evaluate() -> None:
        for sender in range(edges):
            engine.trial(receiver, [[sender]], metric)

    return evaluate


# ---- one evaluation by precision -----------------------------------------------------------------


def _precisions(config: Config, run: experiment.Run, decoder: Decoder) -> None:
    graph = decoder.graph
    layers = [graph.layers // 4, graph.layers // 2, 3 * graph.layers // 4]
    engines = {name: _engine(config, decoder, PRECISIONS[name]) for name in config.precisions}
    metric = Kl(engines["fp32"].logits())
    found: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    for layer in run.progress(layers, "precisions"):
        receiver = graph.q(layer, 0)
        for engine in engines.values():
            if engine.policy.follows_receiver:
                engine.select(high_heads(graph, receiver))
        timings = meters.interleave(
            {
                name: _evaluate(engine, metric, receiver, config.edges)
                for name, engine in engines.items()
            },
            config.repeats,
            clock=_clock(config),
        )
        for name, timing in timings.items():
            found[name].append(np.array(timing.seconds) / config.edges)
    for name, parts in found.items():
        for number, seconds in enumerate(np.mean(parts, axis=0)):
            run.row(
                kind="precision",
                model=config.model,
                variant=name,
                repeat=number,
                evaluation_seconds=float(seconds),
            )


# ---- one evaluation by the receiver's layer ------------------------------------------------------


def _by_layer(config: Config, run: experiment.Run, decoder: Decoder) -> None:
    engine = _engine(config, decoder)
    graph, metric = engine.graph, Kl(engine.logits())
    variants: dict[str, Callable[[], object]] = {"full": lambda: _full(engine, metric)}
    for layer in config.layers:
        kinds = {"attention": graph.q(layer, 0), "mlp": graph.mlp_receiver(layer)}
        for kind, receiver in kinds.items():
            variants[f"{kind} {layer}"] = _evaluate(engine, metric, receiver, 1)
    variants["out"] = _evaluate(engine, metric, graph.out, 1)
    timings = meters.interleave(
        variants,
        config.repeats,
        clock=_clock(config),
        progress=lambda total: run.progress(total, "layers"),
    )
    full = np.array(timings["full"].seconds)
    mean = np.zeros_like(full)
    for kind in ("attention", "mlp"):
        times = np.array([timings[f"{kind} {layer}"].seconds for layer in config.layers])
        for layer in range(graph.layers):
            first = graph.first_reader(layer)
            readers = (
                [graph.mlp_receiver(layer)]
                if kind == "mlp"
                else range(first, first + graph.heads + 2 * graph.kv_heads)
            )
            weight = int(graph.visible[list(readers)].sum()) / graph.edges
            cost = [np.interp(layer, config.layers, column) for column in times.T]
            mean += weight * np.array(cost)
    mean += graph.visible[graph.out] / graph.edges * np.array(timings["out"].seconds)
    for number, (one, whole) in enumerate(zip(mean, full, strict=True)):
        run.row(
            kind="layer",
            variant="mean over edges",
            repeat=number,
            edges=graph.edges,
            evaluation_seconds=float(one),
            full_seconds=float(whole),
        )


def _full(engine: Engine, metric: Kl) -> Tensor:
    """A full patched forward and the metric at the last position."""
    engine.set_mask(engine.graph.full())
    return metric(engine.logits()[None])


# ---- from plain ACDC to low precision ------------------------------------------------------------


def _steps(config: Config, run: experiment.Run, model: Any) -> None:
    decoder = decoder_of(model)
    engine = _engine(config, decoder)
    graph = engine.graph
    clean, corrupted, _ = batch(
        config.shape.vocabulary, config.prompts, config.tokens, config.device, config.seed
    )
    every = torch.arange(config.tokens, device=config.device).expand(config.prompts, -1)
    all_positions = Engine(decoder, clean, corrupted, every)
    metric = Kl(engine.logits())
    hooked = Hooked(model)
    edges = hooked.full()
    c = hooked.run(corrupted, edges, None).written
    middle = graph.q(2 * graph.layers // 3, 0)  # of the mean edge of this graph

    def plain() -> Tensor:
        return kl(metric.reference, hooked.run(clean, edges, c).logits[:, -1:])

    def shared() -> None:
        _full(all_positions, Kl(all_positions.logits()))

    def restart() -> None:
        all_positions.trial(middle, [[0]], _last_of(metric))

    low = _engine(config, decoder, PRECISIONS["int8, linear"])
    high = _engine(config, decoder, PRECISIONS["PAHQ, int8, qkv"])
    high.select(high_heads(graph, middle))
    ladder: dict[str, Callable[[], object]] = {
        "plain: whole model, an input for each receiver": plain,
        "equal inputs computed once": shared,
        "from the receiver's layer on": restart,
        "unembed the last position": _evaluate(engine, metric, middle, 1),
        "PAHQ: Q, K, V in int8": _evaluate(high, metric, middle, 1),
        "all linear layers in int8": _evaluate(low, metric, middle, 1),
    }
    for timing in (engine, high, low):
        timing.trial(middle, [[0]], metric)
    timings = meters.interleave(
        ladder,
        config.repeats,
        clock=_clock(config),
        progress=lambda total: run.progress(total, "steps"),
    )
    for place, (name, seconds) in enumerate(timings.items()):
        for number, one in enumerate(seconds.seconds):
            run.row(kind="step", variant=name, place=place, repeat=number, evaluation_seconds=one)


def _last_of(metric: Kl) -> Callable[[Tensor], Tensor]:
    return lambda logits: metric(logits[:, :, -1:])


# ---- a whole search ------------------------------------------------------------------------------


def _whole(config: Config, run: experiment.Run, model: Any) -> None:
    decoder = decoder_of(model)
    clean, corrupted, last = batch(
        config.small.vocabulary, config.small_prompts, config.tokens, config.device, config.seed
    )
    start_engine = Engine(decoder, clean, corrupted, last)
    with torch.no_grad():
        reference = start_engine.logits()
    order = list(decoder.graph.search_order())

    def plain() -> tuple[np.ndarray, int]:
        return plain_search(
            model,
            clean,
            corrupted,
            lambda x: float(kl(reference, x[:, -1:])),
            config.threshold,
            order,
        )

    def ours(method: str) -> tuple[np.ndarray, int]:
        engine = Engine(decoder, clean, corrupted, last, policy(method))
        found = search(engine, Kl(reference), config.threshold)
        return found.mask, found.evaluations

    masks: dict[str, np.ndarray] = {}
    for name, go in {
        FP32: lambda: ours(FP32),
        PLAIN: plain,
        RTN: lambda: ours(RTN),
        PAHQ: lambda: ours(PAHQ),
    }.items():
        clock = _clock(config)
        start = clock()
        mask, evaluations = go()
        seconds = clock() - start
        masks[name] = mask
        run.row(
            kind="whole",
            variant=name,
            edges=int(mask.sum()),
            of_edges=decoder.graph.edges,
            evaluations=evaluations,
            search_seconds=seconds,
            same_as_plain=bool((mask == masks.get(PLAIN, mask)).all()) if PLAIN in masks else None,
        )
    run.row(
        kind="whole",
        variant="agreement",
        edges=int((masks[FP32] != masks[PLAIN]).sum()),
        of_edges=decoder.graph.edges,
    )
