"""Private fine-tuning of a causal language model, a step at a time: what a step computes.

It knows nothing of folders, checkpoint files, messages or when to stop; the command does.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from projects.flashdp.losses import finite_mean, per_sample_loss
from projects.flashdp.private import DPModel, make_private, untie
from projects.flashdp.recipe import Recipe
from projects.flashdp.sampling import PoissonSampling, micro_batches
from shared.corpus import Batch, Corpus
from shared.errors import UserError
from shared.models import add_lora, load_pretrained
from shared.seeding import step_seed

ACCOUNTING_SHARE = 0.02  # of the time may go into computing epsilon


class FineTuning:
    """A model on its way, and the private optimizer that moves it.

    Args:
        folder: of the model that the run begins with.
        corpus: its records are drawn by `sampling`.
        noise_multiplier: σ, calibrated for the recipe.
        key: 32 secret bytes; the batch and the noise of each step follow from them.
        data: a digest of the corpus.

    Attributes:
        untied_parameters: how many parameters untying has added.
        dropped: samples left out, wholly or in some layers, because their gradient was not finite.
        lost: the latest batches in a row without a finite loss.

    Raises:
        UserError: a model that cannot be loaded, adapted, or made private.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        corpus: Corpus,
        sampling: PoissonSampling,
        noise_multiplier: float,
        key: bytes,
        data: bytes,
        device: torch.device,
    ):
        self.recipe, self.corpus, self.sampling, self.device = recipe, corpus, sampling, device
        self.untied_parameters = self.dropped = self.lost = 0
        self.model = self._model(folder).to(device)
        self.trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer]
        self.optimizer = optimizer(
            [p for _, p in self.trainable], lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        secret: dict[str, Any] = (
            {"key": key, "data": data}
            if recipe.noise_seed is None
            else {"noise_seed": recipe.noise_seed}
        )
        self.dp: DPModel = make_private(
            self.model,
            self.optimizer,
            sampling,
            noise_multiplier=noise_multiplier,
            clip=recipe.clip,
            loss_reduction="sum",
            backend=recipe.backend,
            **secret,
        )
        self._batch_seed = int.from_bytes(hashlib.shake_256(key + b"batches").digest(16), "big")

    def _model(self, folder: Path) -> Any:
        """The model as the run begins with it, or with adapters."""
        from transformers import AutoModelForCausalLM

        recipe = self.recipe
        model = load_pretrained(AutoModelForCausalLM, folder)  # in eval mode: dropout is off
        model.config.use_cache = False
        if recipe.gradient_checkpointing:
            try:
                model.activation_checkpointing_enable()
            except ValueError:
                raise UserError(
                    f"--gradient-checkpointing: {type(model).__name__} has none"
                ) from None
        if recipe.lora_rank is not None:
            torch.manual_seed(step_seed(recipe.seed, "lora"))
            assert recipe.lora_alpha is not None
            targets = recipe.lora_targets.split(",") if recipe.lora_targets else None
            model = add_lora(model, recipe.lora_rank, recipe.lora_alpha, targets, str(folder))
        else:
            before = sum(p.numel() for p in model.parameters())
            untie(model)
            self.untied_parameters = sum(p.numel() for p in model.parameters()) - before
        # dropout stays off; layers recompute themselves in training only
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        return model

    def step(self, stop: Sequence[int]) -> dict[str, Any] | None:
        """One batch and one release; the line of the log about it. None when a signal came (`stop`
        is no longer empty) before the batch was done: then nothing of it has been released.
        """
        recipe, dp = self.recipe, self.dp
        number = dp.steps
        torch.manual_seed(step_seed(recipe.seed, "torch", number))
        self.optimizer.zero_grad()
        rows = self.sampling.batch(self._batch_seed, number)
        lengths = self.corpus.lengths(rows)
        # By length, to save padding. A sample's loss depends neither on padding nor on its
        # neighbours, nor does the sum on the order.
        rows = rows[np.argsort(lengths, kind="stable")]
        losses = []
        for part in micro_batches(rows, recipe.micro_batch):
            if stop:
                return None
            loss = self.losses(self.corpus.batch(part))
            loss.sum().backward()
            losses.append(loss.detach())
        loss = finite_mean(torch.cat(losses)) if losses else math.nan
        dropped = 0
        if losses:
            dropped = int(
                (~torch.stack([norms.isfinite() for norms in dp.norms().values()]).all(0)).sum()
            )
            self.lost = self.lost + 1 if math.isnan(loss) else 0
        self.dropped += dropped
        rate = recipe.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {
            "step": dp.steps,
            "batch": len(rows),
            "tokens": int(lengths.sum()),
            "loss": None if math.isnan(loss) else loss,
            "dropped": dropped,
            "lr": rate,
        }

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each sample: [B]."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"
        ):
            logits = self.model(input_ids=batch["input_ids"].to(self.device)).logits
        return per_sample_loss(logits.float(), batch["labels"].to(self.device))

    @torch.no_grad()
    def evaluate(self, corpus: Corpus, records: int) -> float:
        """The mean loss of the first `records` of a corpus."""
        rows = np.arange(min(records, corpus.rows))
        losses = [
            self.losses(corpus.batch(part)) for part in micro_batches(rows, self.recipe.micro_batch)
        ]
        return float(torch.cat(losses).mean())


class Spent:
    """Epsilon as the steps go by, computed so seldom that they hardly wait for it."""

    def __init__(self, dp: DPModel, recipe: Recipe):
        self._dp, self._recipe = dp, recipe
        self._next = 0.0
        self._last: tuple[int, float] | None = None

    def now(self) -> dict[str, float]:
        """{"epsilon": ...}, or nothing when it is too early for another look."""
        began = time.perf_counter()
        if began < self._next and self._dp.steps < self._recipe.steps:
            return {}
        spent = self._dp.epsilon(self._recipe.delta, self._recipe.accountant)
        ended = time.perf_counter()
        self._next = ended + (ended - began) / ACCOUNTING_SHARE
        self._last = self._dp.steps, spent
        return {"epsilon": spent} if math.isfinite(spent) else {}

    def __str__(self) -> str:
        return (
            "" if self._last is None else f"epsilon {self._last[1]:.3f} after step {self._last[0]}"
        )
