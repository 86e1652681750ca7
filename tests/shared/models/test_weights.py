"""The tensors of a folder under the model's names: as transformers loads them, or refused."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel

from shared.errors import UserError
from shared.models import (
    causal_lm_config,
    empty_causal_lm,
    load_causal_lm,
    random_causal_lm,
    stored_tensors,
)


def read(stored):
    """Every tensor of a folder, by its name in the model."""
    return {
        name: tensor.make([load_file(file)[source] for file, source in tensor.sources])
        for name, tensor in stored.items()
    }


def refusal(folder):
    """The one line with which a folder's weights are refused, the same whole or one at a time."""
    with pytest.raises(UserError) as once:
        load_causal_lm(folder)
    with pytest.raises(UserError) as apart:
        stored_tensors(empty_causal_lm(folder), folder)
    assert str(once.value) == str(apart.value)
    assert "\n" not in str(once.value)
    return str(once.value)


def test_experts_that_are_stored_apart_are_read_as_transformers_fuses_them(mixture):
    wanted = AutoModelForCausalLM.from_pretrained(mixture).state_dict()
    model, _ = load_causal_lm(mixture)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    stored = stored_tensors(empty_causal_lm(mixture), mixture)
    found = read(stored)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    fused = stored["model.layers.1.mlp.experts.gate_up_proj"].sources
    assert len(fused) == 8  # two of each expert
    assert len(stored["lm_head.weight"].sources) == 1


@pytest.mark.parametrize("part", ["gate", "down"])
def test_a_mixture_without_one_tensor_of_one_expert_is_refused_by_name(mixture, change, part):
    names = {"gate": ("w1", "gate_proj"), "down": ("w2", "down_proj")}[part]

    def drop(tensors):
        (name,) = [n for n in tensors if re.search(rf"1.*experts\.2\.({'|'.join(names)})\.", n)]
        del tensors[name]

    change(mixture, drop)
    said = refusal(mixture)
    assert said.startswith(f"{mixture} ({mixture.name})")
    assert "model.layers.1.mlp.experts." in said


def test_a_mixture_may_be_stored_fused(mixture, tmp_path):
    model, _ = load_causal_lm(mixture)
    file = mixture / "model.safetensors"
    save_file(model.state_dict(), file, {"format": "pt"})
    found = read(stored_tensors(empty_causal_lm(mixture), mixture))
    assert all(torch.equal(found[name], t) for name, t in model.state_dict().items())
    assert len(found) == len(model.state_dict())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "qwen3"])
def test_every_tensor_is_there_once_by_a_name_that_the_model_has(family, tied, tmp_path):
    config = causal_lm_config(family, 2, 24, 4, vocabulary=101, positions=32, tied=tied)
    model = random_causal_lm(config, seed=5)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    empty = empty_causal_lm(tmp_path)
    stored = stored_tensors(empty, tmp_path)
    found = read(stored)
    wanted = dict(model.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert found.keys() == wanted.keys()
    assert len({file for tensor in stored.values() for file, _ in tensor.sources}) > 1
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_body_that_was_saved_without_its_head_is_found_where_the_head_is_tied(tmp_path):
    config = causal_lm_config("llama", 2, 24, 4, vocabulary=101, tied=True)
    body = LlamaModel(config)
    body.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    found = read(stored_tensors(empty_causal_lm(tmp_path), tmp_path))
    assert found.keys() == {f"model.{name}" for name, _ in body.named_parameters()}


def test_buffers_that_the_class_makes_itself_are_no_misfit(single, change):
    change(
        single,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        ),
    )
    load_causal_lm(single)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "holds no weights for 'model.layers.1.mlp.up_proj.weight', which its config.json asks",
        ),
        (
            lambda tensors: [tensors.pop(n) for n in list(tensors) if "norm" in n],
            "holds no weights for 'model.layers.0.input_layernorm.weight' and 4 more, which",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
            "has no place for: 'model.layers.2.mlp.up_proj.weight'; its config.json is of another",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}),
            "its weights' 'model.norm.weight' is [65], its config.json says [64]",
        ),
        (
            lambda tensors: tensors.update(
                {"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}
            ),
            "its weights are quantised ('model.norm.weight' is of float8_e4m3fn); name",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(torch.int8)}),
            "its weights are quantised ('model.norm.weight' is of int8); name",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(torch.int32)}),
            "its weights are quantised ('model.norm.weight' is of int32); name",
        ),
    ],
)
def test_weights_of_another_model_are_refused_with_the_first_tensor(single, change, edit, message):
    change(single, edit)
    said = refusal(single)
    assert message in said
    assert "(llama)" in said


@pytest.mark.parametrize("damage", ["short", "head", "empty", "lengths"])
def test_a_damaged_file_is_refused_by_its_name(single, damage):
    file = single / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "short": whole[:-1],
            "head": whole[:9] + b"\xff" + whole[10:],
            "empty": b"",
            "lengths": b"\xff" * 8 + whole[8:],
        }[damage]
    )
    assert refusal(single).startswith(f"{file} (llama) cannot be loaded: it is truncated or damag")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(single, change, wrong):
    change(single, lambda tensors: tensors["model.norm.weight"].__setitem__(63, wrong))
    with pytest.raises(UserError, match=r"\(llama\): 'model.norm.weight' holds NaN or infinity"):
        load_causal_lm(single)


def test_finding_the_weights_draws_no_random_numbers_and_says_nothing(single, change, capfd):
    change(single, lambda tensors: tensors.pop("lm_head.weight"))
    before = torch.get_rng_state()
    refusal(single)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
