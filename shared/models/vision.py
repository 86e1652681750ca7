"""Pretrained image backbones, and CLIP."""

from pathlib import Path
from typing import Any

import torch

from shared import data
from shared.errors import UserError
from shared.finite import check_finite
from shared.models.guard import plain_errors
from shared.models.loading import load_pretrained, load_tokenizer


def load_clip(folder: Path) -> tuple[Any, Any]:
    """The CLIP of a folder as save_pretrained writes it, in float32 and eval mode, and its
    tokenizer. Raises UserError as `load_pretrained` and `load_tokenizer` do.
    """
    from transformers import CLIPModel

    tokenizer = load_tokenizer(folder)
    return load_pretrained(CLIPModel, folder), tokenizer


def load_clip_processor(folder: Path) -> Any:
    """What makes the pixels that the CLIP of a folder reads of pictures. Raises UserError where the
    folder does not say how.
    """
    from transformers import CLIPImageProcessor

    with plain_errors(folder, "clip"):
        return CLIPImageProcessor.from_pretrained(folder, local_files_only=True)


def load_efficientnet_lite0() -> Any:
    """EfficientNet-Lite0 with its ImageNet-1k head, as timm's `tf_efficientnet_lite0`, in eval
    mode.

    Input: [batch, 3, 224, 224], RGB values as (x - 127) / 128 for x in 0..255. Raises UserError
    when it has not been fetched, or is not what it should be.
    """
    import timm

    file = next(data.path("efficientnet-lite0").rglob("*.pth"))
    with plain_errors(file, "tf_efficientnet_lite0"):
        weights = torch.load(file, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    target = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    source = [
        (name, tensor)
        for name, tensor in weights.items()
        if not name.endswith("num_batches_tracked")
    ]
    # The packaged file names its tensors otherwise, but lists them in the same order.
    if len(source) != len(target):
        raise UserError(
            f"{file} holds {len(source)} tensors; tf_efficientnet_lite0 has {len(target)}"
        )
    for (name, wanted), (stored, tensor) in zip(target.items(), source, strict=True):
        if wanted.shape != tensor.shape or name.split(".")[-1] != stored.split(".")[-1]:
            raise UserError(
                f"{file}: '{stored}' is {list(tensor.shape)}; tf_efficientnet_lite0 has there"
                f" '{name}', {list(wanted.shape)}"
            )
        wanted.copy_(tensor)
    check_finite(model, f"{file} (tf_efficientnet_lite0)")
    return model.eval()
