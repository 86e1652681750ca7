"""Pretrained language models and sentence encoders.

A model is named by an entry of the data catalogue ("smollm2-135m"), by a folder, or by a hub id
whose files are in the user's hub cache.
"""

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import data
from shared.errors import UserError
from shared.files import sha256
from shared.models.guard import plain_errors, read_config
from shared.models.loading import empty_model, load_config, load_pretrained, load_tokenizer
from shared.paths import cache_dir

# causal language models of the catalogue; they come as GGUF and are converted once
PACKAGED = ("smollm2-135m",)


def local_model(name_or_path: str | Path) -> Path:
    """The folder with a model's config.json, safetensors weights and tokenizer.

    Raises:
        UserError: it is not there, and the message says what would bring it; or it is refused as
            `read_config` does.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        read_config(path)
        return path
    name = str(name_or_path)
    if name in PACKAGED:
        return _converted(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(
            f"no model '{name}': it is no folder, not one of {', '.join(PACKAGED)}, and not in the"
            f" hub cache: hf download {name}"
        ) from None
    read_config(path)
    return path


def load_causal_lm(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer. Raises UserError as `local_model`,
    `load_pretrained` and `load_tokenizer` do.
    """
    from transformers import AutoModelForCausalLM

    folder = local_model(name_or_path)
    # what is refused is refused before the weights are read
    tokenizer = load_tokenizer(folder)
    return load_pretrained(AutoModelForCausalLM, folder, dtype), tokenizer


def empty_causal_lm(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The architecture of a model folder with its parameters on the meta device (no memory),
    buffers real, tied weights tied. Raises UserError as `load_config` does.

    What its weights are, `stored_tensors` finds in the folder, where it also checks them.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    with plain_errors(folder, config.model_type):
        return empty_model(AutoModelForCausalLM, config, dtype)


class SentenceEncoder(torch.nn.Module):
    """all-MiniLM-L6-v2: mean-pooled, normalised embeddings of sentences. `model` and `tokenizer`
    are transformers' own.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def tokens(self, sentences: list[str], max_tokens: int = 128) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, each [sentences, tokens], padded to the longest."""
        batch = self.tokenizer(
            sentences, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors [sentences, 384]."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load_sentence_encoder() -> SentenceEncoder:
    """all-MiniLM-L6-v2 (22.7 M parameters, 384 dimensions), in eval mode. Raises UserError when it
    has not been fetched.
    """
    from transformers import AutoModel

    folder = next(data.path("minilm-l6").rglob("config.json")).parent
    return SentenceEncoder(load_pretrained(AutoModel, folder), load_tokenizer(folder)).eval()


def _converted(name: str) -> Path:
    """The catalogue's GGUF file as a folder of safetensors, made once (half a minute) and kept in
    the cache.
    """
    source = data.path(name)
    content = sha256(data.stamp(name))  # which names the version and the digests of its files
    folder = cache_dir() / ".converted" / f"{name}-{content[:16]}"
    if (folder / "model.safetensors").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(source.rglob("*.gguf"))
    # its bar is not one of those that transformers lets one turn off
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    # What the GGUF loader returns remembers its quantisation and refuses to be saved; a fresh model
    # of its architecture does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    except OSError:
        # another process may have been first, with the same result
        if not (folder / "model.safetensors").is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
