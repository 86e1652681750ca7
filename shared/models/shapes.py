"""Language models with random weights, at any size: for what does not depend on the weights
(memory, speed, bytes).

Say so beside every number they are used for.
"""

from typing import Any, Literal

import torch

from shared.models.loading import empty_model

Family = Literal["opt", "gpt2", "llama", "qwen3"]

# layers, hidden size, heads, of Zhang et al. 2022 (arXiv 2205.01068), table 1
OPT_SHAPES = {
    "opt-125m": (12, 768, 12),
    "opt-1.3b": (24, 2048, 32),
    "opt-2.7b": (32, 2560, 32),
    "opt-6.7b": (32, 4096, 32),
    "opt-13b": (40, 5120, 40),
    "opt-30b": (48, 7168, 56),
    "opt-66b": (64, 9216, 72),
    "opt-175b": (96, 12288, 96),
}


def causal_lm_config(
    family: Family,
    layers: int,
    hidden: int,
    heads: int,
    vocabulary: int | None = None,
    positions: int = 2048,
    tied: bool = False,
) -> Any:
    """A transformers configuration. The vocabulary defaults to the family's own; the inner size is
    the family's usual multiple.
    """
    from transformers import GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

    common: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        "use_cache": False,
    }
    if family == "opt":
        sizes: dict[str, Any] = {
            "hidden_size": hidden,
            "word_embed_proj_dim": hidden,
            "ffn_dim": 4 * hidden,
            "max_position_embeddings": positions,
        }
        return OPTConfig(vocab_size=vocabulary or 50272, **sizes, **common)
    if family == "gpt2":
        shape: dict[str, Any] = {
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": positions,
        }
        return GPT2Config(
            vocab_size=vocabulary or 50257, tie_word_embeddings=tied, use_cache=False, **shape
        )
    inner = 8 * hidden // 3
    gated: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": inner // 64 * 64 or inner,
        "max_position_embeddings": positions,
    }
    if family == "llama":
        return LlamaConfig(vocab_size=vocabulary or 32000, **gated, **common)
    return Qwen3Config(
        vocab_size=vocabulary or 151936,
        head_dim=hidden // heads,
        num_key_value_heads=max(1, heads // 2),
        **gated,
        **common,
    )


def empty_causal_lm_of(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A causal language model of `config` as `empty_model` makes it."""
    from transformers import AutoModelForCausalLM

    return empty_model(AutoModelForCausalLM, config, dtype)


def random_causal_lm(
    config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A model of `config` in eval mode, its matrices uniform with standard deviation 0.02, norm
    gains 1 and biases 0.

    Uniform, because drawing Gaussians takes longer than what a memory table measures.
    """
    model = empty_causal_lm_of(config, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                if parameter.ndim > 1:
                    value.uniform_(-0.02 * 3**0.5, 0.02 * 3**0.5, generator=generator)
                else:
                    value.fill_(0.0 if name == "bias" else 1.0)
                made[id(parameter)] = torch.nn.Parameter(value)
            setattr(module, name, made[id(parameter)])
    return model.to(device).eval()
