"""Table "utility": training on WordNet's glosses at several epsilon, with FlashDP, explicit
per-layer clipping and flat clipping.

FlashDP and explicit clipping get the same batches and the same noise, so that their loss curves can
be laid on one another. Nothing is tuned by method or by epsilon: one learning rate, one bound.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from projects.flashdp import labels
from projects.flashdp.accounting import check_delta, noise_multiplier
from projects.flashdp.baselines import Flat, PerLayer, Trainer
from projects.flashdp.data import Glosses, glosses
from projects.flashdp.decoder import Decoder
from projects.flashdp.experiments import common
from projects.flashdp.losses import per_sample_loss
from projects.flashdp.sampling import PoissonSampling
from shared import experiment


class Config(experiment.Config):
    """Explicit and flat clipping run at `compared_epsilon` with the first seed alone."""

    epsilons: list[float] = Field(min_length=1)
    """what FlashDP may spend, in the order of the table"""
    compared_epsilon: float = Field(gt=0)
    """what the other private methods may spend"""
    delta: float = Field(gt=0, lt=1)
    """of all guarantees"""
    accountant: Literal["rdp", "prv", "pld"]
    """what computes epsilon"""
    seeds: int = Field(ge=1)
    """runs of FlashDP at each epsilon, and without privacy"""
    steps: int = Field(ge=2)
    """optimizer steps of a run"""
    batch_size: int = Field(ge=1)
    """records expected in a batch"""
    records: int | None = Field(ge=200)
    """glosses that are read, in the order of WordNet; null: all"""
    held_out: int = Field(ge=1)
    """of them, those that are held out"""
    vocabulary: int = Field(ge=300)
    """tokens of the tokenizer"""
    tokens: int = Field(ge=4)
    """tokens of a record at most, the rest is cut"""
    hidden: int = Field(ge=8)
    """width of the decoder"""
    layers: int = Field(ge=1)
    """blocks of the decoder"""
    lr: float = Field(gt=0)
    """learning rate of AdamW"""
    clip: float = Field(gt=0)
    """bound on a record's gradient, over all layers"""
    device: common.Device = "cpu"
    """where it runs"""


def run(config: Config, run: experiment.Run) -> None:
    data = glosses(config.vocabulary, config.records, config.held_out)
    sampling = PoissonSampling(len(data.train), config.batch_size)
    check_delta(config.delta, len(data.train))
    sigmas = {
        epsilon: noise_multiplier(
            epsilon, config.delta, sampling.sample_rate, config.steps, config.accountant
        )
        for epsilon in {*config.epsilons, config.compared_epsilon}
    }
    for seed in range(config.seeds):  # what no training at all gives, at an epsilon of 0
        untrained = trainer_of(labels.NON_PRIVATE, config, data, sampling, 0.0, seed).model
        run.row(
            kind="end",
            method=labels.UNTRAINED,
            target_epsilon=0.0,
            seed=seed,
            step=0,
            noise_scale=None,
            spent_epsilon=0.0,
            held_out_loss=held_out(untrained, data, config),
        )
    work: list[tuple[str, float, int]] = [
        (labels.NON_PRIVATE, math.inf, seed) for seed in range(config.seeds)
    ]
    work += [
        (labels.FLASHDP, epsilon, seed)
        for epsilon in config.epsilons
        for seed in range(config.seeds)
    ]
    work += [(method, config.compared_epsilon, 0) for method in (labels.FLAT_RUN, labels.EXPLICIT)]
    for method, epsilon, seed in run.progress(work, "runs"):
        sigma = sigmas.get(epsilon, 0.0)
        shown = {
            "method": method,
            "target_epsilon": epsilon if math.isfinite(epsilon) else None,
            "seed": seed,
        }
        one = trainer_of(method, config, data, sampling, sigma, seed)
        for step in range(config.steps):
            records = [data.train[i] for i in sampling.batch(1000 + seed, step)]
            ids, targets = (t.to(config.device) for t in Glosses.batch(records, config.tokens))
            losses = one.step(ids, targets)
            run.row(
                kind="step",
                **shown,
                step=step,
                records=len(records),
                train_loss=float(losses.double().mean()),
            )
        spent = (
            one.private.epsilon(config.delta, config.accountant)
            if isinstance(one, PerLayer)
            else None
        )
        run.row(
            kind="end",
            **shown,
            step=config.steps,
            noise_scale=sigma,
            spent_epsilon=spent,
            held_out_loss=held_out(one.model, data, config),
        )


def trainer_of(
    method: str, config: Config, data: Glosses, sampling: PoissonSampling, sigma: float, seed: int
) -> Trainer:
    """A trainer on a new model; the seed is that of the model and of the noise."""
    model = Decoder(
        data.vocabulary,
        config.hidden,
        config.layers,
        max(1, config.hidden // 64),
        config.tokens,
        seed,
    ).to(config.device)
    options: dict[str, Any] = {"lr": config.lr, "clip": config.clip, "sigma": sigma, "seed": seed}
    match method:
        case labels.NON_PRIVATE:
            return Trainer(model, config.batch_size, **options)
        case labels.FLAT_RUN:
            return Flat(model, config.batch_size, book_keeping=True, **options)
    return PerLayer(
        model,
        config.batch_size,
        backend="explicit" if method == labels.EXPLICIT else "auto",
        sampling=sampling,
        **options,
    )


@torch.no_grad()
def held_out(model: nn.Module, data: Glosses, config: Config) -> float:
    """Mean over the held-out records of each record's mean loss."""
    losses = []
    for start in range(0, len(data.held_out), 256):
        ids, targets = (
            t.to(config.device)
            for t in Glosses.batch(data.held_out[start : start + 256], config.tokens)
        )
        losses.append(per_sample_loss(model(ids), targets).double())
    return float(torch.cat(losses).mean())
