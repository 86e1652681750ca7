"""T3: bringing the full-precision slices of the head under test: uploads, waits, time.

One search for each placement of the masters; all must find the same circuit.
"""

import time

import torch
from pydantic import Field, PositiveInt

from projects.pahq.engine import Engine
from projects.pahq.experiments.common import RepeatsConfig
from projects.pahq.experiments.speed import Shape, batch, random_model
from projects.pahq.families import decoder_of
from projects.pahq.metrics import Kl
from projects.pahq.policy import Policy, Scope
from projects.pahq.quantise import Format
from projects.pahq.scheduler import PLACEMENTS, Uploaded, masters
from projects.pahq.search import search
from shared import experiment


class Config(RepeatsConfig):
    shape: Shape
    """of the model, with random weights"""
    prompts: PositiveInt
    """in a batch"""
    tokens: PositiveInt
    """of a prompt"""
    format: Format
    """low format"""
    scope: Scope
    """what is low"""
    threshold: float = Field(gt=0)
    """nats"""
    gain: float = Field(gt=0)
    """of the random weights"""
    look_ahead: PositiveInt
    """removals tried at once"""


def run(config: Config, run: experiment.Run) -> None:
    device = torch.device(config.device)
    decoder = decoder_of(random_model(config.shape, device, config.gain))
    data = batch(config.shape.vocabulary, config.prompts, config.tokens, config.device, config.seed)
    with torch.no_grad():
        reference = Engine(decoder, *data).logits()
    how = Policy("pahq-receiver", config.format, config.scope)
    graph = decoder.graph
    for repeat in run.progress(config.repeats, "rounds"):
        first = None
        for placement in PLACEMENTS:
            brought = masters(decoder, placement, device, config.scope != "qkv")
            engine = Engine(decoder, *data, how, masters=brought)
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            found = search(engine, Kl(reference), config.threshold, look_ahead=config.look_ahead)
            seconds = time.perf_counter() - start
            first = found.mask if first is None else first
            run.row(
                placement=placement,
                repeat=repeat,
                heads=graph.layers * graph.heads,
                evaluations=found.evaluations,
                uploads=brought.uploads,
                waits=brought.waits if isinstance(brought, Uploaded) else 0,
                uploaded_bytes=brought.uploaded_bytes,
                room_bytes=brought.room_bytes if isinstance(brought, Uploaded) else None,
                search_seconds=seconds,
                edges=int(found.mask.sum()),
                same_circuit=bool((found.mask == first).all()),
                peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
            )
