"""Pretrained image backbones."""

from typing import Any

import torch

from shared import data


def load_efficientnet_lite0() -> Any:
    """EfficientNet-Lite0 with its ImageNet-1k head, as timm's `tf_efficientnet_lite0`, in eval
    mode.

    Input: [batch, 3, 224, 224], RGB values as (x - 127) / 128 for x in 0..255. Raises UserError
    when it has not been fetched.
    """
    import timm

    file = next(data.path("efficientnet-lite0").rglob("*.pth"))
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
    assert len(source) == len(target)
    for (name, wanted), (_, tensor) in zip(target.items(), source, strict=True):
        assert wanted.shape == tensor.shape, name
        wanted.copy_(tensor)
    return model.eval()
