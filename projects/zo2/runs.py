"""What every command that trains a user's model stands on: `finetune`, `replay`, and DistZO2's.

The model is never in memory as a whole: it is made on the meta device and filled, or trained in a
file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from projects.zo2 import budget, weights
from projects.zo2.command import Recipe
from projects.zo2.engine import ZO2, Step
from projects.zo2.forwards import Forwards
from projects.zo2.steplog import Records
from shared.commands.folder import same_run
from shared.commands.progress import Progress
from shared.corpus import IGNORED, Batch, Corpus, tokenizer_digest
from shared.errors import UserError
from shared.files import atomic_files, sha256
from shared.models import (
    Stored,
    add_lora,
    copy_configuration,
    empty_causal_lm,
    fingerprint,
    save_lora_configuration,
    stored_tensors,
)

LOG = "steps.jsonl"
WORKING = "working.safetensors"  # the file that `--storage disk` trains in place
CHECKPOINT = Path("checkpoint", "weights.safetensors")
EARLY = ("data", "eval-data", WORKING)  # what a run's folder may hold before its first step
LOST_STEPS = 20  # so many losses in a row that are not finite end a run


# ---- the loss ------------------------------------------------------------------------------------


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the next-token losses, and how many there are. Looks at few logits at a time: they are
    a model's largest tensor.
    """
    logits = model(input_ids=batch["input_ids"]).logits
    labels = batch["labels"][:, 1:]
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    rows = budget.loss_rows(logits.shape[-1])
    for sequence, targets in zip(logits, labels, strict=True):
        for start in range(0, len(targets), rows):
            piece = targets[start : start + rows]
            losses = cross_entropy(
                sequence[start : start + len(piece)].float(),
                piece,
                ignore_index=IGNORED,
                reduction="none",
            )
            total += losses.double().sum()
    return total, int((labels != IGNORED).sum())


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean next-token loss on a batch, in float64."""
    total, count = loss_sum(model, batch)
    return total / max(1, count)


# ---- the run and its log -------------------------------------------------------------------------


def header_of(
    recipe: Recipe, model: str, folder: Path, data: Path, tokenizer: Any
) -> dict[str, Any]:
    """The header of a log: everything that the trained weights depend on.

    Args:
        model: what the user calls it.
        folder: where it is.
        data: the file with the text.
        tokenizer: the model's.
    """
    return {
        "name": model,
        "model": fingerprint(folder),
        "tokenizer": tokenizer_digest(tokenizer),
        "data": sha256(data),
        "settings": recipe.record(),
    }


def check_goes_on(
    known: Records | None, header: dict[str, Any], recipe: Recipe, steps: int, out: Path
) -> None:
    """Refuse to go on with something else than what the run in `out` began with, or to fewer steps
    than it has made. A run without a step binds nobody.
    """
    if known is None or not known.steps:
        return
    began = {**known.header, **known.header.get("settings", {})}
    now = {"model": header["model"], "data": header["data"], **recipe.decisive()}
    same_run(began, now, out)
    if began.get("tokenizer") != header["tokenizer"]:
        raise UserError(
            f"{out} holds a run with another tokenizer in the folder of --model; name another --out"
        )
    if len(known.steps) > steps:
        raise UserError(f"{out} has made {len(known.steps)} steps already; --steps may only grow")


def newest(out: Path, recipe: Recipe) -> Path:
    """Where a run has the weights of most steps, if it has any: its checkpoint, or the model that
    it ended with before `--steps` grew.
    """
    files = (out / CHECKPOINT, out / recipe.weights_file)
    return max(files, key=lambda file: weights.saved_steps(file) or 0)


def lost_steps(records: Records) -> int:
    """How many steps at the end of a log had no finite loss."""
    lost = 0
    for step in reversed(records.steps):
        if not step.skipped:
            break
        lost += 1
    return lost


def check_losses(lost: int, done: int, steps: int) -> None:
    """Refuse to go on after LOST_STEPS steps without a finite loss, and to end with one.

    Args:
        lost: how many of the last steps had none.
        done: how many steps were made.
        steps: how many are to be made.
    """
    if lost >= LOST_STEPS or (lost and done == steps):
        raise UserError(
            f"the loss was not finite in {lost} steps in a row (the last was {done - 1}); try"
            " another --out with a smaller --lr"
        )


def micro_batches(corpus: Corpus, recipe: Recipe, step: int, device: torch.device) -> list[Batch]:
    """What a step takes, on the device."""
    batches = corpus.step_batches(recipe.seed, step, recipe.batch_size, recipe.accumulate)
    return [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]


def show(progress: Progress, step: Step, tokens: int) -> None:
    """Show a step that has been made on `tokens` tokens."""
    if step.skipped:
        progress.line(f"step {step.number}: the loss is not finite; the step is skipped")
    progress.step(step.number + 1, tokens, None if step.skipped else step.loss)


def warn_of_drift(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Say where rounding changes the weights by more than training does."""
    if recipe.dtype != "float32" and recipe.probe == "inplace":
        say(
            f"{recipe.dtype} with --probe inplace: perturbing and restoring rounds the weights by"
            " more than training moves them; --probe fresh does not"
        )


# ---- the model -----------------------------------------------------------------------------------


def dtype_of(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def empty_model(folder: Path, recipe: Recipe, name: str) -> tuple[Any, dict[str, Stored]]:
    """The model on the meta device, with adapters if the recipe has them, and how the folder holds
    its weights.
    """
    model = empty_causal_lm(folder, getattr(torch, recipe.dtype))
    stored = stored_tensors(model, folder)
    if recipe.lora_rank is not None:
        targets = recipe.lora_targets.split(",") if recipe.lora_targets else None
        assert recipe.lora_alpha is not None
        model = add_lora(model, recipe.lora_rank, recipe.lora_alpha, targets, name, empty=True)
    return model, stored


def build_engine(
    model: Any,
    stored: dict[str, Stored],
    recipe: Recipe,
    start: Path | None,
    storage: str,
    working: Path,
    device: torch.device,
    plan: budget.Plan | None,
    loss: Callable[[nn.Module, Batch], Tensor] = mean_loss,
    write: bool = True,
    forwards: Forwards | None = None,
) -> ZO2:
    """The engine at the weights of the checkpoint `start`, or at the base model's where there is
    none.

    `write` is False where another process has written the working file; `forwards` is `ZO2`'s.
    """
    steps = weights.saved_steps(start) if start is not None else None
    begun = start if steps is not None else None
    if recipe.lora_rank is not None:
        source = weights.adapter_source(weights.folder_source(stored), model, recipe.seed, begun)
    elif begun is not None:
        source = weights.file_source(begun)
    else:
        source = weights.folder_source(stored)
    if storage == "disk":
        if write:
            weights.write_working_file(model, source, working, dtype_of(recipe.storage_dtype))
    else:
        weights.fill(model, source)
    assert recipe.probe is not None
    engine = ZO2(
        model,
        forwards=forwards,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        probe=recipe.probe,
        storage={"ram": "ram", "disk": working, "none": None}[storage],  # type: ignore[arg-type]
        storage_dtype=dtype_of(recipe.storage_dtype),
        rounding=recipe.rounding,
        slots=plan.slots if plan else 3,
        cache_noise=plan.cache_noise if plan else True,
        device=device,
        loss=loss,
    )
    engine.steps = steps or 0
    return engine


def save_model(engine: ZO2, recipe: Recipe, folder: Path, out: Path) -> None:
    """Write a model folder that transformers loads, or one that PEFT loads: whole, or not at
    all.

    Args:
        folder: of the base model.

    Raises UserError when a weight is not finite, or no space is left.
    """
    lora = recipe.lora_rank is not None
    with atomic_files(out, last=recipe.weights_file) as partial:
        weights.save_weights(engine, partial / recipe.weights_file, engine.steps, lora)
        if lora:
            save_lora_configuration(engine.model, partial)
        else:
            copy_configuration(folder, partial, getattr(torch, recipe.dtype))
