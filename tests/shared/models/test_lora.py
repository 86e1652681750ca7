"""LoRA adapters: added, saved, loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.models import add_lora, load_causal_lm, load_lora, save_lora_configuration


@pytest.mark.parametrize("empty", [True, False])
def test_adapters_are_added_and_all_else_is_frozen(small, empty):
    model, _ = load_causal_lm(small)
    ids = torch.arange(12).view(2, 6)
    before = model(input_ids=ids).logits
    adapted = add_lora(model, 3, 6, ["q_proj", "v_proj"], str(small), empty=empty)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # A and B of two modules in two blocks
    assert all("lora_" in name for name in trained)
    assert {p.is_meta for p in trained.values()} == {empty}
    assert not adapted.training
    if not empty:
        assert torch.equal(adapted(input_ids=ids).logits, before)  # B is zero
        assert all(p.any() for name, p in trained.items() if "lora_A" in name)


def test_adapters_go_everywhere_but_into_the_head_unless_told_and_only_where_there_is_a_module(
    small,
):
    adapted = add_lora(load_causal_lm(small)[0], 2, 4, None, str(small))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * 7
    with pytest.raises(UserError, match=r"^--lora-targets: .*q_poj") as caught:
        add_lora(load_causal_lm(small)[0], 2, 4, ["q_poj"], str(small))
    assert "\n" not in str(caught.value)


def test_peft_loads_adapters_by_the_configuration_saved(small, tmp_path):
    from peft import PeftModel

    torch.manual_seed(3)
    adapted = add_lora(load_causal_lm(small)[0], 2, 4, ["o_proj"], str(small))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    save_lora_configuration(adapted, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (
        saved["r"],
        saved["lora_alpha"],
        saved["base_model_name_or_path"],
        saved["inference_mode"],
    ) == (2, 4, str(small), True)
    loaded = PeftModel.from_pretrained(load_causal_lm(small)[0], tmp_path / "adapter")
    found = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert found
    assert all(torch.equal(p, dict(adapted.named_parameters())[name]) for name, p in found.items())


@pytest.fixture
def adapter(small, tmp_path):
    """The folder of adapters of `small` whose B is not zero, and the adapted model."""
    torch.manual_seed(3)
    adapted = add_lora(load_causal_lm(small)[0], 2, 4, ["o_proj"], str(small))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted


def test_adapters_are_loaded_to_be_trained_further(small, adapter):
    folder, adapted = adapter
    loaded = load_lora(load_causal_lm(small)[0], folder)
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in adapted.named_parameters() if p.requires_grad
    ]
    assert not loaded.training


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.popitem(), r"does not fit the model, which has besides '.*lora_"),
        (
            lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(2)}),
            r"which has no place for 'base_model.model.x.lora_A.weight'",
        ),
        (lambda tensors: next(iter(tensors.values())).fill_(torch.nan), r"lora_A.* holds NaN"),
        (
            lambda tensors: tensors.update({k: t[:1].clone() for k, t in tensors.items()}),
            r"\(adapter\) cannot be loaded: ",
        ),
    ],
)
def test_adapters_of_another_model_are_refused(small, adapter, edit, message):
    file = adapter[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message) as caught:
        load_lora(load_causal_lm(small)[0], adapter[0])
    assert "\n" not in str(caught.value)


def test_other_adapters_than_lora_and_those_without_weights_are_refused(small, adapter, edit_json):
    folder, _ = adapter
    base, _ = load_causal_lm(small)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.safetensors does not exist"):
        load_lora(base, folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    edit_json(folder / "adapter_config.json", peft_type="IA3")
    with pytest.raises(UserError, match=r"holds adapters of IA3, not of LoRA"):
        load_lora(base, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"\(adapter\) cannot be loaded: "):
        load_lora(base, folder)
