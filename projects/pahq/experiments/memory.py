"""T2, memory: bytes of weights by format, and of cached activations as counted and as computed.

Weights are random: bytes do not depend on them.
"""

import torch
from pydantic import PositiveInt

from projects.pahq.decoder import Decoder
from projects.pahq.engine import Engine
from projects.pahq.experiments.common import DeviceConfig
from projects.pahq.experiments.speed import Shape, batch, random_model
from projects.pahq.families import decoder_of
from projects.pahq.graph import Graph
from projects.pahq.metrics import Kl
from projects.pahq.policy import Policy, Projections
from projects.pahq.quantise import Format
from projects.pahq.scheduler import Uploaded
from shared import experiment, meters


class Config(DeviceConfig):
    shapes: dict[str, Shape]
    """by name"""
    prompts: PositiveInt
    """in a batch"""
    tokens: PositiveInt
    """of a prompt"""
    formats: list[Format]
    """low formats"""


def computed_bytes(graph: Graph, prompts: int, tokens: int, width: int) -> int:
    """Of cached activations by the shapes: c and o - c of each sender, the sums of both at each
    place of the stream, the clean embedding, and room for what a trial in the first layer reaches.
    """
    places = graph.layers * (2 if graph.mlp and not graph.parallel else 1) + 1
    reached = graph.senders - graph.heads  # one head of the first layer, and all but the embedding
    return 4 * (2 * (graph.senders + places) + 1 + reached) * prompts * tokens * width


def run(config: Config, run: experiment.Run) -> None:
    device = torch.device(config.device)
    for name, shape in run.progress(list(config.shapes.items()), "shapes"):
        decoder = decoder_of(random_model(shape, device))
        activations = {
            "activation_bytes": _counted(config, decoder, shape.vocabulary),
            "computed_bytes": computed_bytes(
                decoder.graph, config.prompts, config.tokens, decoder.width
            ),
        }
        policies = [
            Policy(),
            *(
                Policy(kind, form, scope)
                for form in config.formats
                for scope in ("qkv", "linear")
                for kind in ("rtn", "pahq-receiver")
            ),  # type: ignore[arg-type]
        ]
        for how in policies:
            weights = Projections(decoder, how).weight_bytes()
            slices = {"resident": weights["masters"] if how.follows_receiver else 0}
            if how.follows_receiver:
                for placement in ("on demand", "prefetched"):
                    prefetch = placement == "prefetched"
                    brought = Uploaded(decoder, torch.device("cpu"), prefetch, how.scope != "qkv")
                    slices[placement] = brought.room_bytes
            for placement, nbytes in slices.items():
                run.row(
                    shape=name,
                    policy=how.kind,
                    format=None if how.kind == "fp32" else how.format,
                    scope=None if how.kind == "fp32" else how.scope,
                    placement=placement,
                    low_bytes=weights["low"],
                    full_bytes=weights["fp32"],
                    slice_bytes=nbytes,
                    **activations,
                )


def _counted(config: Config, decoder: Decoder, vocabulary: int) -> int:
    """Bytes that an engine holds after a trial in the first layer, by the allocator."""
    data = batch(vocabulary, config.prompts, config.tokens, config.device, config.seed)

    def search() -> Engine:
        with torch.no_grad():
            engine = Engine(decoder, *data)
            engine.trial(0, [[0]], Kl(engine.logits()))
        return engine

    if config.device == "cpu":
        with meters.live_bytes() as meter:
            engine = search()
            with meter.phase("held"):
                torch.empty(1)
        del engine
        return meter.peak_bytes("held")
    before = torch.cuda.memory_allocated()
    engine = search()
    held = torch.cuda.memory_allocated() - before
    del engine
    return int(held)
