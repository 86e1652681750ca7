"""Small models of every family, and prompts for them."""

from types import SimpleNamespace

import pytest
import torch

from projects.pahq.families import decoder_of
from projects.pahq.tiny import TinyDecoder
from shared.models import random_causal_lm

VOCABULARY = 37


def configuration(family, layers=2, heads=4, width=24):
    from transformers import (
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        OPTConfig,
        Qwen2Config,
        Qwen3Config,
    )

    common = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    gated = {"intermediate_size": 40, "num_key_value_heads": heads // 2}
    if family == "gpt2":
        return GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, vocab_size=VOCABULARY, n_positions=16,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
    if family in ("gpt_neox", "gpt_neox sequential"):
        return GPTNeoXConfig(
            intermediate_size=40, use_parallel_residual=family == "gpt_neox", **common
        )
    if family == "opt":
        return OPTConfig(
            ffn_dim=40, word_embed_proj_dim=width, max_position_embeddings=16, **common
        )
    if family == "qwen3":
        return Qwen3Config(head_dim=8, **gated, **common)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**gated, **common)


def shaken(config, seed=0):
    """A model whose biases and gains are random too, so that a forgotten one shows."""
    model = random_causal_lm(config, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def prompts(batch=3, length=7, seed=0):
    """Clean and corrupted tokens [B, T], and the last position of each."""
    draw = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(2, VOCABULARY, (2, batch, length), generator=draw)
    return clean, corrupted, torch.full((batch, 1), length - 1)


FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gpt_neox sequential", "opt")


@pytest.fixture(scope="session")
def of_family():
    """Model, decoder and prompts of a family, made once."""
    made = {}

    def make(family):
        if family not in made:
            model = shaken(configuration(family))
            clean, corrupted, positions = prompts()
            made[family] = SimpleNamespace(
                model=model, decoder=decoder_of(model), clean=clean, corrupted=corrupted,
                positions=positions,
            )  # fmt: skip
        return made[family]

    return make


def tiny(layers=2, heads=4, width=24, inner=0, seed=0):
    torch.manual_seed(seed)
    model = TinyDecoder(layers, heads, width, VOCABULARY, 16, inner).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model
