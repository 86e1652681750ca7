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
from projects.flashdp.losses import per_sample_loss
from projects.flashdp.sampling import PoissonSampling
from shared import experiment


class Config(experiment.Config):
    """`epsilons` are FlashDP's; explicit and flat clipping run at `compared_epsilon`, and without
    privacy there is one more run.
    """

    epsilons: list[float] = [8.0, 3.0, 1.0]
    compared_epsilon: float = Field(default=3.0, gt=0)
    delta: float = Field(default=1e-6, gt=0, lt=1)
    accountant: Literal["rdp", "prv", "pld"] = "pld"
    seeds: int = Field(default=3, ge=1)
    steps: int = Field(default=100, ge=2)
    batch_size: int = Field(default=64, ge=1)
    records: int | None = Field(default=None, ge=200)
    vocabulary: int = Field(default=1024, ge=300)
    tokens: int = Field(default=24, ge=4)
    hidden: int = Field(default=128, ge=8)
    layers: int = Field(default=2, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    clip: float = Field(default=1.0, gt=0)
    device: Literal["cpu", "cuda"] = "cpu"


def run(config: Config, run: experiment.Run) -> None:
    data = glosses(config.vocabulary, config.records)
    sampling = PoissonSampling(len(data.train), config.batch_size)
    check_delta(config.delta, len(data.train))
    sigmas = {
        epsilon: noise_multiplier(
            epsilon, config.delta, sampling.sample_rate, config.steps, config.accountant
        )
        for epsilon in {*config.epsilons, config.compared_epsilon}
    }
    work: list[tuple[str, float, int]] = [
        (labels.NON_PRIVATE, math.inf, seed) for seed in range(config.seeds)
    ]
    work += [
        (labels.FLASHDP, epsilon, seed)
        for epsilon in config.epsilons
        for seed in range(config.seeds)
    ]
    work += [(labels.FLAT_RUN, config.compared_epsilon, seed) for seed in range(config.seeds)]
    work += [(labels.EXPLICIT, config.compared_epsilon, 0)]
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
