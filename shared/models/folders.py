"""A model folder, as save_pretrained writes it: its weights files, what tells it apart, its
configuration.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch

from shared.errors import UserError
from shared.files import atomic_write

_SAMPLES = 64  # pieces of a weights file that the fingerprint looks at
_SAMPLE_NBYTES = 1 << 16
# configuration and tokenizer files of a model folder
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises UserError when there are none or one is
    missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [
            folder / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} does not exist; a model folder needs safetensors weights (save_pretrained"
                " writes them)"
            )
    return files


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
    """Everything of a model folder but the weights: configuration, generation defaults,
    tokenizer.
    """
    for file in sorted(folder.iterdir()):
        if (
            file.is_file()
            and file.suffix in _COPIED
            and not file.name.endswith(".index.json")
            and file.name != "config.json"
        ):
            shutil.copyfile(file, out / file.name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    # not as strict JSON: some configurations hold Infinity
    atomic_write(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
