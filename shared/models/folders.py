"""A model folder, as save_pretrained writes it: its weights files, what tells it apart, its
configuration.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from shared.errors import UserError
from shared.files import atomic_write

_SAMPLES = 64  # pieces of a weights file that the fingerprint looks at
_SAMPLE_NBYTES = 1 << 16
# What transformers writes beside config.json and the weights. Nothing else goes along into the
# folder of another model: what a run says of the one (privacy.json, run.json) is not true of it.
_CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises UserError when there are none, one is missing
    or their index is damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():  # as transformers chooses
        files = [folder / name for name in _indexed(index)]
    else:
        files = [single]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} does not exist; a model folder needs safetensors weights (save_pretrained"
                " writes them)"
            )
    return files


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = []
    if not names or any(not isinstance(n, str) or n != os.path.basename(n) for n in names):
        raise UserError(
            f"{index} is damaged: it does not say which file of the folder holds which tensor"
        )
    return names


def fingerprint(folder: Path) -> str:
    """Tells models apart without reading them whole: a hash of the configuration and of
    each weights file's size, beginning, end and samples between them.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(size.to_bytes(8, "little"))
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_NBYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_NBYTES))
    return digest.hexdigest()


def copy_configuration(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """What a model that was trained from that in `folder` keeps of it: tokenizer, chat template,
    defaults of generation, and config.json with the `dtype` of its weights.
    """
    for pattern in _CARRIED:
        for file in sorted(folder.glob(pattern)):
            copied = out / file.relative_to(folder)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copied)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    # not as strict JSON: some configurations hold Infinity
    atomic_write(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
