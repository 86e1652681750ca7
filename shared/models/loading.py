"""The one place where transformers makes a model, a configuration or a tokenizer of a folder."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from shared.errors import UserError
from shared.finite import check_finite
from shared.models.guard import family_of, plain_errors, read_config
from shared.models.weights import stored_tensors

# several lines for a load of a second; experiments show their own
transformers_logging.disable_progress_bar()

# any of these makes a tokenizer; without one transformers may make an empty one
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load_config(folder: Path) -> Any:
    """The transformers configuration of a model folder. Raises UserError as `read_config` does, and
    where transformers does not know the family.
    """
    from transformers import AutoConfig

    family = family_of(read_config(folder))
    with plain_errors(folder, family):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def empty_model(kind: Any, config: Any, dtype: torch.dtype | None = None) -> Any:
    """A model of a configuration with its parameters on the meta device (no memory), buffers real,
    tied weights tied, in eval mode.

    Args:
        kind: one of transformers' auto classes (AutoModelForCausalLM), or a model's class.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if hasattr(kind, "from_config"):
            model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
        else:
            model = kind._from_config(config, dtype=dtype)
    # registering parameters on the meta device has made new objects of tied ones
    model.tie_weights()
    return model.eval()


def load_pretrained(kind: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder with all its weights, in eval mode.

    Args:
        kind: one of transformers' auto classes (AutoModelForCausalLM), or a model's class
            (CLIPModel).

    Raises:
        UserError: the folder asks for code to be run, is quantised or damaged; its model is of
            another kind; its weights are not exactly those of the model (`stored_tensors`), or not
            finite.
    """
    config = load_config(folder)
    family = config.model_type
    wanted = getattr(getattr(kind, "config_class", None), "model_type", family)
    if family != wanted:
        raise UserError(f"{folder} ({family}) is no model of the family {wanted}")
    with plain_errors(folder, family):
        stored_tensors(empty_model(kind, config, dtype), folder)
        model = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    check_finite(model, f"{folder} ({family})")
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, with a padding token.

    Raises:
        UserError: there is none, or one with tokens that the model's embedding has no rows for. A
            longer embedding is normal.
    """
    from transformers import AutoTokenizer

    config = load_config(folder)
    family = config.model_type
    if not any((folder / file).is_file() for file in _VOCABULARIES) and not any(
        folder.glob("*.tiktoken")
    ):
        raise UserError(
            f"{folder} ({family}) holds no tokenizer (tokenizer.json); save it there with its"
            " save_pretrained"
        )
    with plain_errors(folder, family):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        vocabulary = tokenizer.get_vocab()
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not vocabulary:
        raise UserError(f"{folder} ({family}): its tokenizer knows no tokens")
    token = max(vocabulary, key=vocabulary.__getitem__)
    if rows is not None and vocabulary[token] >= rows:
        raise UserError(
            f"{folder} ({family}): its tokenizer gives {token!r} the number {vocabulary[token]},"
            f" and its embedding has {rows} rows; save the tokenizer that belongs to the model, or"
            " resize the embedding"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: those of the model's generation configuration, then the
    tokenizer's own, each once.
    """
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ends = list(named) if isinstance(named, list | tuple) else [named]
    return [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end is not None]


def position_limit(model: Any) -> int | None:
    """How many tokens of a sequence the model has positions for; None where it sets no limit.

    Args:
        model: or its configuration alone, where no embedding keeps positions for padding.
    """
    config = getattr(model, "config", model).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(model, torch.nn.Module):
        for name, module in model.named_modules():
            # RoBERTa's positions begin behind that of padding. (OPT's do too, but its
            # configuration does not count them, and its module has no padding.)
            if (
                isinstance(module, torch.nn.Embedding)
                and "position" in name.rpartition(".")[2]
                and module.padding_idx is not None
            ):
                behind = module.num_embeddings - module.padding_idx - 1
                limit = behind if limit is None else min(limit, behind)
    return limit if limit is not None and limit > 0 else None


def check_length(model: Any, tokens: int, option: str = "--sequence-length") -> None:
    """Refuse sequences of so many tokens where the model has fewer positions. `model` as
    `position_limit` takes it.
    """
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        family = getattr(model, "config", model).model_type
        raise UserError(
            f"{option} {tokens} is more than the {limit} positions of the model ({family})"
        )
