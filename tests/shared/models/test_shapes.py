"""Models with random weights: sizes by formula, and ties."""

import pytest
import torch

from shared.models import causal_lm_config, random_causal_lm
from shared.models.shapes import OPT_SHAPES

# What OPT's names say, in parameters.
OPT_SIZES = {
    "opt-125m": 125e6,
    "opt-1.3b": 1.3e9,
    "opt-2.7b": 2.7e9,
    "opt-6.7b": 6.7e9,
    "opt-13b": 13e9,
    "opt-30b": 30e9,
    "opt-66b": 66e9,
    "opt-175b": 175e9,
}


def _count(module):
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())


@pytest.mark.parametrize(("layers", "hidden", "heads"), [(1, 24, 4), (3, 40, 5)])
@pytest.mark.parametrize("tied", [True, False])
def test_an_opt_block_has_12_h2_plus_13_h_parameters(layers, hidden, heads, tied):
    model = random_causal_lm(
        causal_lm_config("opt", layers, hidden, heads, vocabulary=101, positions=30, tied=tied)
    )
    block = 12 * hidden**2 + 13 * hidden
    assert [_count(b) for b in model.model.decoder.layers] == [block] * layers
    assert _count(model) == layers * block + (101 + 32) * hidden + 2 * hidden + (
        0 if tied else 101 * hidden
    )


@pytest.mark.parametrize("name", OPT_SHAPES)
def test_the_shapes_of_opt_have_the_sizes_in_their_names(name):
    layers, hidden, heads = OPT_SHAPES[name]
    assert hidden % heads == 0
    total = layers * (12 * hidden**2 + 13 * hidden) + (50272 + 2050) * hidden + 2 * hidden
    assert total == pytest.approx(OPT_SIZES[name], rel=0.035)


def test_a_gpt2_block_has_12_h2_plus_13_h_parameters():
    model = random_causal_lm(
        causal_lm_config("gpt2", 2, 36, 4, vocabulary=101, positions=30, tied=True)
    )
    assert [_count(b) for b in model.transformer.h] == [12 * 36**2 + 13 * 36] * 2
    assert _count(model) == 2 * (12 * 36**2 + 13 * 36) + (101 + 30) * 36 + 2 * 36


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_block_has_4_h2_plus_3_h_inner_plus_2_h_parameters(tied):
    config = causal_lm_config("llama", 2, 48, 4, vocabulary=101, tied=tied)
    model = random_causal_lm(config)
    assert config.intermediate_size == 128  # 8/3 of 48, a multiple of 64
    block = 4 * 48**2 + 3 * 48 * 128 + 2 * 48
    assert [_count(b) for b in model.model.layers] == [block] * 2
    assert _count(model) == 2 * block + 101 * 48 * (1 if tied else 2) + 48


def test_a_qwen3_block_has_half_the_key_and_value_heads():
    config = causal_lm_config("qwen3", 2, 48, 4, vocabulary=101)
    model = random_causal_lm(config)
    block = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 128 + 2 * 48 + 2 * 12
    assert [_count(b) for b in model.model.layers] == [block] * 2
    assert _count(model) == 2 * block + 2 * 101 * 48 + 48


def test_vocabularies_default_to_the_familys_own():
    sizes = {
        family: causal_lm_config(family, 1, 8, 2).vocab_size
        for family in ("opt", "gpt2", "llama", "qwen3")
    }
    assert sizes == {"opt": 50272, "gpt2": 50257, "llama": 32000, "qwen3": 151936}


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_random_models_are_whole_tied_as_asked_and_the_same_for_a_seed(family, tied):
    config = causal_lm_config(family, 2, 24, 4, vocabulary=101, positions=32, tied=tied)
    model = random_causal_lm(config, seed=3)
    again, other = random_causal_lm(config, seed=3), random_causal_lm(config, seed=4)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert not model.training
    state = model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in again.state_dict().items())
    assert any(not torch.equal(state[n], t) for n, t in other.state_dict().items())
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.002
        else:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
    ids = torch.arange(10).view(2, 5)
    loss = model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(torch.log(torch.tensor(101.0)).item(), abs=0.3), (
        "it knows nothing"
    )


def test_random_models_can_be_in_half_precision():
    model = random_causal_lm(
        causal_lm_config("opt", 1, 24, 4, vocabulary=101, positions=32), dtype=torch.bfloat16
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    random_causal_lm(causal_lm_config("llama", 1, 24, 4, vocabulary=101))
    assert torch.equal(torch.get_rng_state(), before)
