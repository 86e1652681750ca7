"""A tiny language model with a token a byte, and text, for what is tried on every command."""

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{%"
    " endif %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}{% if"
    " add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(folder: Path) -> Any:
    """Save a tokenizer in `folder` and return it: a token per byte, `<end>`, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE
    )
    wrapped.save_pretrained(folder)
    return wrapped


def model(folder: Path) -> None:
    """Random weights and a tokenizer, as `save_pretrained` writes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def texts(file: Path, records: int = 12) -> None:
    """Lines with a text."""
    lines = [{"text": f"line {i} of a text about nothing"} for i in range(records)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
