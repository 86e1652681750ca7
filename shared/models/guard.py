"""What a model folder must be before anything of it is used, told from its small files alone.

A folder is the user's, or a stranger's: nothing in it may run, and where it is not what it says
it is the answer is one line that names the folder and the model's family.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shared.errors import UserError

# files through which a folder can name classes of its own (`auto_map`) for transformers to run
_MAY_NAME_CODE = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's config.json.

    Raises:
        UserError: there is none or it is damaged; the folder asks for code of its own to be run;
            its weights are quantised; it is that of an adapter.
    """
    config = _read_json(folder / "config.json")
    if config is None:
        raise UserError(
            f"{folder} holds no config.json; a model folder is what save_pretrained writes"
        )
    family = family_of(config)
    for file in _MAY_NAME_CODE:
        if "auto_map" in (_read_json(folder / file) or {}):
            raise UserError(
                f"{folder} ({family}): its {file} asks for code that comes with the model"
                " (auto_map), and none is run here; take a model whose family transformers has"
                " itself, or remove auto_map where these weights fit such a family"
            )
    # transformers would load the adapter's base model instead, from wherever the adapter says
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} ({family}): holds an adapter (adapter_config.json); name its base model, or"
            " merge the two and save them (merge_and_unload, save_pretrained)"
        )
    for part in (config, *config.values()):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and part.get(key):
                settings = part[key]
                kind = settings.get("quant_method") if isinstance(settings, dict) else None
                raise quantised(folder, family, str(kind or "of a kind that it does not name"))
    return config


def family_of(config: dict[str, Any]) -> str:
    """What messages call the family of a model: its `model_type`, else its class."""
    classes = config.get("architectures")
    named = config.get("model_type") or (classes[0] if isinstance(classes, list) else None)
    return named if isinstance(named, str) else "family not named"


def quantised(folder: Path, family: str, kind: str) -> UserError:
    """The refusal of weights that are codes rather than numbers."""
    return UserError(
        f"{folder} ({family}): its weights are quantised ({kind}); name the folder of the model in"
        " float32, bfloat16 or float16"
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: no JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: no JSON object")
    return content


@contextmanager
def plain_errors(folder: Path, family: str) -> Iterator[None]:
    """Whatever a library raises over the files of `folder` becomes a UserError of one line.

    Too little memory is not the folder's fault and stays what it is.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise whatever they like over a file that is damaged
        if "allocate memory" in str(error):  # a RuntimeError of torch or safetensors
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder} ({family}) cannot be loaded: {reason}") from error
