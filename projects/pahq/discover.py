"""`discover`: search the circuit of a task in the user's model, into a folder.

A line of `log.jsonl` is a receiver whose edges have all been tried. A run that goes on repeats the
lines and tries the rest; at each receiver the whole state is computed anew from the edges that are
left, so that it ends as if it had never stopped.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from projects.pahq import attribution
from projects.pahq.circuit import FILES, Circuit
from projects.pahq.command import Discovery, Work
from projects.pahq.data import Task
from projects.pahq.decoder import Decoder
from projects.pahq.engine import Engine, Metric, check
from projects.pahq.families import decoder_of
from projects.pahq.graph import Mask
from projects.pahq.metrics import Kl
from projects.pahq.policy import Policy
from projects.pahq.scheduler import masters
from projects.pahq.search import Found, Step, search
from projects.pahq.tasks import load_task
from shared import models
from shared.commands.folder import begin, begun, locked
from shared.commands.key import digest
from shared.commands.log import Log
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import Stopped, stop_signals
from shared.errors import UserError


def discover(options: argparse.Namespace) -> int:
    """`python -m projects.pahq discover`. Returns the exit status."""
    recipe, work = Discovery.from_options(options), Work.from_options(options)
    check_masters(recipe, work)
    device = device_of(work.device)
    if work.threads:
        torch.set_num_threads(work.threads)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    folder = models.local_model(options.model)
    path: Path = options.out / "log.jsonl"
    with locked(options.out, path.name, early=("run.json", *FILES)):
        decoder, task = load(options.model, options.task, recipe.prompts, recipe.seed, device)
        about = {
            "model": models.fingerprint(folder),
            "task": digest({"tokens": [task.clean, task.corrupted, task.right, task.wrong]}),
            **recipe.record(),
        }
        begin(options.out / "run.json", about, begun(path))
        found, start = _search(recipe, work, decoder, task, path, console)
        below = recipe.metric == "kl" and recipe.threshold < found.floor
        Circuit(
            decoder.graph,
            found.mask,
            found.effects,
            {
                **about,
                "family": decoder.family,
                "searched_edges": int(start.sum()),
                "kept_edges": int(found.mask.sum()),
                "evaluations": found.evaluations,
                "floor": found.floor,
                "threshold_below_floor": below,
                "metric_at_end": found.steps[-1].metric,
            },
        ).save(options.out)
    console.print(
        f"{options.out}: {int(found.mask.sum())} of {decoder.graph.edges} edges;"
        f" {recipe.metric} {found.steps[-1].metric:.4g}, of the whole graph {found.floor:.4g}"
    )
    return 0


def check_masters(recipe: Discovery, work: Work) -> None:
    """UserError where the head that is high is not known ahead."""
    if work.masters != "resident" and recipe.policy != "pahq-receiver":
        raise UserError(
            f"--masters {work.masters} brings the head of the receiver; it goes with --policy"
            " pahq-receiver"
        )


def load(
    model: str, task: str, prompts: int, seed: int, device: torch.device
) -> tuple[Decoder, Task]:
    """The user's model, proved to be what the engine computes, and prompts. UserError as of what
    it calls.
    """
    network, tokenizer = models.load_causal_lm(model)
    network = network.requires_grad_(False).to(device)
    decoder = decoder_of(network)
    found = load_task(task, tokenizer, network.config.vocab_size, prompts, seed).to(device)
    models.check_length(network, found.clean.shape[1], "a prompt's length")
    for tokens in (found.clean, found.corrupted):
        check(decoder, tokens)
    return decoder, found


def _metric(recipe: Discovery, decoder: Decoder, task: Task, engine: Engine) -> Metric:
    if recipe.metric == "task":
        return task.margin()
    with torch.no_grad():
        if recipe.reference == "same":
            return Kl(engine.logits())
        return Kl(Engine(decoder, task.clean, task.corrupted, task.positions).logits())


def _start(recipe: Discovery, decoder: Decoder, task: Task) -> Mask:
    """The edges to search among."""
    edges = decoder.graph.full()
    if recipe.start is None:
        return edges
    engine = Engine(decoder, task.clean, task.corrupted, task.positions, ablation=recipe.ablation)
    scores = attribution.eap_ig(engine, task.margin(), recipe.steps)
    return decoder.graph.without_dead(attribution.top(scores, edges, recipe.start))


def _search(
    recipe: Discovery,
    work: Work,
    decoder: Decoder,
    task: Task,
    path: Path,
    console: Console,
) -> tuple[Found, Mask]:
    policy = Policy(recipe.policy, recipe.format, recipe.scope, recipe.scale)
    start = _start(recipe, decoder, task)
    brought = masters(decoder, work.masters, decoder.device, recipe.scope != "qkv")
    engine = Engine(
        decoder, task.clean, task.corrupted, task.positions, policy, recipe.ablation, brought
    )
    metric = _metric(recipe, decoder, task, engine)
    with torch.no_grad():
        floor = float(metric(engine.logits()[None])[0])
    if recipe.metric == "kl" and recipe.threshold < floor:
        console.print(
            f"--threshold {recipe.threshold:g} is below {floor:.3g}, what low precision alone costs"
            " the whole graph: effects of that size mean nothing (recorded)"
        )
    engine.set_mask(start)
    with Log(path) as log, stop_signals() as stop:
        steps = [Step(**line) for line in log.lines]
        tried = sum(len(step.senders) + step.dead for step in steps)
        kept = sum(sum(step.kept) for step in steps)
        if steps:
            console.print(f"going on: {tried} of {int(start.sum())} edges are decided")
        with Progress(console, tried, int(start.sum())) as bar:
            found = search(
                engine,
                metric,
                recipe.threshold,
                order=recipe.order,
                absolute=recipe.absolute,
                look_ahead=work.look_ahead,
                fresh=True,
                done=steps,
                progress=_Watch(log, bar, stop, tried, kept),
            )
    found.floor = floor
    return found, start


class _Watch:
    """Called after each receiver: writes its line, shows how far the search is, and stops it."""

    def __init__(self, log: Log, bar: Progress, stop: list[int], tried: int, kept: int) -> None:
        self.log, self.bar, self.stop, self.tried, self.kept = log, bar, stop, tried, kept

    def __call__(self, step: Step) -> None:
        self.log.write(asdict(step))
        new = len(step.senders) + step.dead
        self.tried, self.kept = self.tried + new, self.kept + sum(step.kept)
        if new:
            self.bar.step(self.tried, 0, None, f"{self.kept} kept")
        if self.stop:
            raise Stopped(
                f"stopped after {self.tried} edges; the same command goes on", self.stop[0]
            )
