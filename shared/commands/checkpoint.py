"""Weights and an optimizer's state as one file, replaced as a whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.files import atomic_save

if TYPE_CHECKING:
    import torch
    from torch import nn


def save_checkpoint(
    path: Path,
    parameters: "Mapping[str, nn.Parameter]",
    optimizer: "torch.optim.Optimizer",
    state: Mapping[str, Any],
) -> None:
    """Write the parameters, the tensors of the optimizer's state for them, and `state`.

    Args:
        path: its folder exists.
        parameters: by name; those that are trained.
        state: JSON: how many steps were made, and whatever else is needed to go on.

    Raises:
        UserError: no space is left; the checkpoint of before is whole.
    """
    import torch

    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
    atomic_save(tensors, path, {"state": json.dumps(state, allow_nan=False)})


def load_checkpoint(
    path: Path, parameters: "Mapping[str, nn.Parameter]", optimizer: "torch.optim.Optimizer"
) -> dict[str, Any] | None:
    """Bring parameters and optimizer to where `save_checkpoint` found them, and return its `state`;
    None where there is no checkpoint.

    Raises UserError when the file is damaged, or another model's.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            for name, parameter in parameters.items():
                stored = file.get_tensor(f"model.{name}")
                if stored.shape != parameter.shape:  # copy_ would broadcast
                    raise ValueError(f"{name} is {list(stored.shape)}")
                parameter.copy_(stored)
            for entry in file.keys():  # noqa: SIM118 (it is no dict)
                kind, _, rest = entry.partition(".")
                if kind == "optimizer":
                    key, _, name = rest.partition(".")
                    value, parameter = file.get_tensor(entry), parameters[name]
                    # a count of steps stays on the CPU
                    optimizer.state[parameter][key] = (
                        value.to(parameter.device) if value.ndim else value
                    )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); name another --out") from None
    return state
