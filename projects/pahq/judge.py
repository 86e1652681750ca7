"""`evaluate`: what a circuit does, in full precision; `compare`: two circuits of a model."""

import argparse

import numpy as np
from rich.console import Console

from projects.pahq import roc
from projects.pahq.circuit import Circuit, load
from shared.errors import UserError


def evaluate(options: argparse.Namespace) -> int:
    """`python -m projects.pahq evaluate`. Returns the exit status."""
    import torch

    from projects.pahq.attribution import top
    from projects.pahq.discover import load as load_model
    from projects.pahq.engine import Engine
    from projects.pahq.metrics import Kl
    from shared import models
    from shared.commands.options import device_of

    if options.prompts < 1 or options.seed < 0:
        raise UserError("--prompts must be at least 1 and --seed at least 0")
    circuit = load(options.circuit)
    if models.fingerprint(models.local_model(options.model)) != circuit.about.get("model"):
        raise UserError(f"{options.circuit} is a circuit of another model than {options.model}")
    device = device_of(options.device)
    decoder, task = load_model(options.model, options.task, options.prompts, options.seed, device)
    margin = task.margin()
    ablation = circuit.about.get("ablation", "corrupted")
    with torch.no_grad():
        engine = Engine(decoder, task.clean, task.corrupted, task.positions, ablation=ablation)
        metric = Kl(engine.logits())
        edges = circuit.graph.full()
        noise = np.random.default_rng(0).random(edges.shape)
        random = top(noise, edges, int(circuit.mask.sum()))
        lines = []
        for name, mask in {
            "all edges": edges,
            "the circuit (faithfulness)": circuit.mask,
            "random edges, as many": random,
            "all but the circuit (completeness)": edges & ~circuit.mask,
            "all but random edges": edges & ~random,
            "no edges": np.zeros_like(edges),
        }.items():
            engine.set_mask(mask)
            logits = engine.logits()[None]
            lines.append(
                f"{name:36}{int(mask.sum()):>9}{float(metric(logits)[0]):>12.4f}"
                f"{-float(margin(logits)[0]):>11.3f}{float(margin.accuracy(logits)[0]):>11.1%}"
            )
    _say(f"{'':36}{'edges':>9}{'KL, nats':>12}{'margin':>11}{'accuracy':>11}", *lines)
    return 0


def compare(options: argparse.Namespace) -> int:
    """`python -m projects.pahq compare`. Returns the exit status."""
    first, second = load(options.first), load(options.second)
    if first.graph != second.graph or first.about.get("model") != second.about.get("model"):
        raise UserError(f"{options.first} and {options.second} are circuits of different models")
    both, edges = int((first.mask & second.mask).sum()), first.graph.full()
    sizes = int(first.mask.sum()), int(second.mask.sum())
    rates = roc.point(first.mask, second.mask, edges)
    points = [rates, *_ranked(first, second)]
    _say(
        f"edges                 {sizes[0]} and {sizes[1]}, {both} in both",
        f"agreement (Jaccard)   {roc.jaccard(first.mask, second.mask):.3f}",
        f"of the second's       {rates.true_positive:.1%} found",
        f"of all others         {rates.false_positive:.3%} kept as well",
        f"AUC by the effects    {roc.pessimistic_auc(points):.3f} (staircase),"
        f" {roc.trapezoid_auc(points):.3f} (straight)",
    )
    return 0


def _ranked(first: Circuit, second: Circuit) -> list[roc.Point]:
    """A point for each threshold on the effects that the first search measured."""
    scores = np.nan_to_num(np.abs(first.effects), nan=0.0)
    return roc.points_of_scores(scores, second.mask, first.graph.full())


def _say(*lines: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line, markup=False)
