"""The small models that the other experiments take circuits of, trained in place.

They are trained through their own dense forward; only searches go through the patched one.
"""

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt

from projects.pahq.data import SMALL, targets
from projects.pahq.experiments.common import empty_model, prompts, tensors_name
from projects.pahq.tiny import TinyDecoder
from shared import experiment
from shared.seeding import step_seed


class Config(experiment.Config):
    tasks: list[str]
    """names of `data.SMALL`"""
    seeds: PositiveInt
    """models of each task"""
    steps: PositiveInt
    """of training"""
    batch: PositiveInt
    """prompts of a step"""
    noise: float = Field(ge=0, lt=1)
    """share of training answers that are random tokens: without it a small model becomes certain,
    and the effects of edges smaller than what float32 can tell"""
    lr: float = Field(gt=0)
    """the highest learning rate of the one cycle"""


def run(config: Config, run: experiment.Run) -> None:
    cells = [(name, seed) for name in config.tasks for seed in range(config.seeds)]
    for name, seed in run.progress(cells, "models"):
        model, loss = train(name, config, step_seed(config.seed, name, seed))
        held_out = prompts(name, 128, seed, "held out")
        with torch.no_grad():
            index = held_out.positions[..., None].expand(-1, -1, SMALL[name].vocabulary)
            logits = model(held_out.clean).gather(1, index)
        run.save_tensors(tensors_name(name, seed), model.state_dict())
        run.row(
            task=name,
            seed=seed,
            layers=SMALL[name].layers,
            edges=model.decoder().graph.edges,
            train_loss=loss,
            task_accuracy=float(held_out.margin().accuracy(logits[None])[0]),
        )


def train(name: str, config: Config, seed: int) -> tuple[TinyDecoder, float]:
    """A model and its last loss."""
    small = SMALL[name]
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = empty_model(small)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.steps, pct_start=0.1
    )
    loss = torch.zeros(())
    for _ in range(config.steps):
        task = small.make(config.batch, draw)
        index = task.positions[..., None].expand(-1, -1, small.vocabulary)
        logits = model(task.clean).gather(1, index)
        answers = targets(task, draw)
        random = torch.randint(small.vocabulary, answers.shape, generator=draw)
        answers = answers.where(torch.rand(answers.shape, generator=draw) >= config.noise, random)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False), loss.item()
