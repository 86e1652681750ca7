"""A CLIP with LoRA adapters, fine-tuned as the paper does: some epochs of AdamW over fixed batches,
which end at no minimum.

There the Hessian need not be positive, so effects take a damped Gauss-Newton matrix, of some of the
batches, by conjugate gradients that are stopped early; what is left of the residual is for the
caller to report.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from projects.ecif.influence import Contrastive
from projects.ecif.loss import batch_losses
from projects.ecif.pictures import quickdraw_classes, sketches
from projects.ecif.towers import Clip
from shared.influence.baselines import Solve
from shared.influence.solvers import cg, spectral_radius
from shared.models import load_clip, local_model
from shared.seeding import generator, step_seed
from shared.vision.images import LabelledImages

# captions -> token ids and attention mask, [n, T] each
Tokens = Callable[[Sequence[str]], tuple[Tensor, Tensor]]

# CLIP's shapes by name: of the text tower, of the image tower, and both towers' projection.
# vit-b-16 is openai/clip-vit-base-patch16's.
_TINY = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
_BYTES = {
    "vocab_size": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "max_position_embeddings": 32,
}
SHAPES: dict[str, tuple[dict[str, int], dict[str, int], int]] = {
    "tiny": ({**_TINY, **_BYTES}, {**_TINY, "image_size": 8, "patch_size": 4}, 6),
    "small": ({**_SMALL, **_BYTES}, {**_SMALL, "image_size": 28, "patch_size": 7}, 64),
    "vit-b-16": (
        {"bos_token_id": 49406, "eos_token_id": 49407},
        {"image_size": 224, "patch_size": 16},
        512,
    ),
}


@dataclass(frozen=True, eq=False)
class Base:
    """A CLIP before fine-tuning, what makes tokens of captions, and where its weights are from:
    pretrained, trained here, random.
    """

    model: Any
    tokens: Tokens
    weights: str

    @property
    def size(self) -> int:
        """The edge of its pictures, in pixels."""
        return int(self.model.config.vision_config.image_size)


# ---- the model -----------------------------------------------------------------------------------


def base_model(name: str, pretrain_steps: int = 0) -> Base:
    """A CLIP by the name of a shape (random weights, captions read byte by byte), or pretrained: a
    folder, or an id in the hub's cache.

    Args:
        pretrain_steps: train the random one first, on Quick, Draw!'s drawings of classes that are
            not fine-tuned on.

    Raises:
        UserError: there is no such model, or `load_clip` refuses it.
    """
    from transformers import CLIPConfig, CLIPModel

    if name in SHAPES:
        text, vision, projection = SHAPES[name]
        with torch.random.fork_rng():
            torch.manual_seed(step_seed(0, "clip", name))
            model = CLIPModel(
                CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
            ).eval()
        settings = model.config.text_config
        limits = (settings.bos_token_id, settings.eos_token_id, settings.max_position_embeddings)
        base = Base(
            model,
            partial(_byte_tokens, limits=limits),
            "trained here" if pretrain_steps else "random",
        )
        if pretrain_steps:
            pretrain(base, pretrain_steps)
        return base
    model, tokenizer = load_clip(local_model(name))

    def tokens(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    return Base(model, tokens, "pretrained")


def _byte_tokens(captions: Sequence[str], limits: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Begin, the caption's bytes, end; filled up with more ends, as CLIP's own tokenizer does."""
    begin, end, longest = limits
    rows = [[begin, *one.encode()[: longest - 2], end] for one in captions]
    length = max(map(len, rows))
    ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def pretrain(
    base: Base, steps: int, classes: int = 160, batch: int = 128, rate: float = 2e-3
) -> None:
    """Train a CLIP of 28 pixels from scratch on drawings and the names of their classes, each class
    once a batch; some 60 ms a step.
    """
    _, names = quickdraw_classes()
    names = names[:classes]
    drawings = sketches(names).pixels.view(len(names), -1, 28, 28)
    ids, mask = base.tokens(names)
    model, draw = base.model.train(), np.random.default_rng(step_seed(0, "pretrain"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    normalise = Clip.normalise
    for _ in range(steps):
        chosen = torch.from_numpy(draw.permutation(classes)[:batch])
        pictures = drawings[chosen, torch.from_numpy(draw.integers(0, drawings.shape[1], batch))]
        moved = (
            pictures.roll(tuple(draw.integers(-2, 3, 2).tolist()), (1, 2))
            .unsqueeze(1)
            .expand(-1, 3, -1, -1)
        )
        out = model(
            input_ids=ids[chosen],
            attention_mask=mask[chosen],
            pixel_values=normalise(moved, torch.float32),
            return_loss=True,
        )
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


def with_lora(base: Base, rank: int, seed: int) -> Any:
    """The model with LoRA adapters on the query and value projections of both towers, all else
    frozen. Another seed, other adapters.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of a name in transformers
        torch.manual_seed(step_seed(seed, "lora"))
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"], lora_dropout=0.0
        )
        # PEFT changes the model that it is given
        return get_peft_model(copy.deepcopy(base.model), config).eval()


# ---- training ------------------------------------------------------------------------------------


def fine_tune(
    problem: Contrastive, start: Tensor, *, epochs: int, rate: float, seed: int
) -> list[Tensor]:
    """AdamW at a constant rate, a fixed batch a step, in an order that only the seed decides:
    parameters [p] at the end of each epoch.

    A step's loss is that of its batch and its share of the regulariser (AdamW's own decay is off).
    A batch without pairs is a step less.
    """
    w, draw, pairs = start.clone().requires_grad_(), generator(seed, "epochs"), problem.pairs
    optimiser = torch.optim.AdamW([w], lr=rate, weight_decay=0.0)
    found = []
    for _ in range(epochs):
        for batch in torch.randperm(pairs.batches, generator=draw).tolist():
            *inputs, present = (part[batch : batch + 1] for part in pairs.data)
            if not present.any():
                continue
            loss = batch_losses(problem.towers.logits(w, tuple(inputs)), present).sum()
            loss = loss + problem.delta / (2 * pairs.batches) * (w - start).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found.append(w.detach().clone())
    return found


def damped_ggn(
    problem: Contrastive, w: Tensor, *, damping: float, iterations: int, batches: int | None
) -> Solve:
    """H^-1 b, a column of b after the other, with the Gauss-Newton matrix at w of the first batches
    and a share of its largest eigenvalue.

    Args:
        damping: that share, which is added to the diagonal.
        iterations: of conjugate gradients, at the most; the residual that they leave is in the
            solver's Info.
        batches: how many of the batches, which are in random order; None: all.
    """
    operator = problem.objective(slice(batches)).ggn(w)
    added = damping * spectral_radius(operator, w, iterations=10)
    return partial(cg, operator, damping=added, tol=None, iterations=iterations)


def class_accuracy(
    towers: Clip, w: Tensor, classes: tuple[Tensor, Tensor], part: LabelledImages, chunk: int = 128
) -> float:
    """Share of pictures that are nearest to their class's caption, of the tokens and masks of all
    classes' captions.
    """
    right = 0
    with torch.no_grad():
        for images, labels in zip(part.pixels.split(chunk), part.labels.split(chunk), strict=True):
            texts, pictures, _ = towers.embed(w, (*classes, images.to(w.device)))
            nearest = (
                torch.nn.functional.normalize(pictures, dim=-1)
                @ torch.nn.functional.normalize(texts, dim=-1).T
            )
            right += int((nearest.argmax(1).cpu() == labels).sum())
    return right / len(part)
