"""Model folders, small and made in place."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared import data
from shared.errors import UserError
from shared.models import causal_lm_config, random_causal_lm


@pytest.fixture
def cached(request):
    """Skips unless the catalogue's entry has been fetched."""
    try:
        data.path(request.param)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def small(tmp_path, save_tokenizer):
    """The folder of a model in two weights files, with a tokenizer."""
    folder = tmp_path / "small"
    random_causal_lm(
        causal_lm_config("llama", 2, 64, 2, vocabulary=260, positions=64)
    ).save_pretrained(folder, max_shard_size="200KB")
    save_tokenizer(folder)
    return folder


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def mixture(request, tmp_path, save_tokenizer):
    """The folder of a mixture of 4 experts, which transformers stores one by one and fuses."""
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    sizes = {
        "vocab_size": 260,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    if request.param == "mixtral":
        config = MixtralConfig(**sizes, num_local_experts=4)
    else:
        config = Qwen3MoeConfig(**sizes, head_dim=8, num_experts=4, moe_intermediate_size=12)
    folder = tmp_path / request.param
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def change():
    """A function `change(folder, edit)`: `edit` changes the tensors {name: value} of the folder's
    single weights file in place.
    """

    def apply(folder, edit):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})

    return apply


@pytest.fixture
def single(small):
    """`small` with its weights in one file."""
    tensors = {}
    for file in sorted(small.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (small / "model.safetensors.index.json").unlink()
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    return small


@pytest.fixture
def edit_json():
    """A function `edit(file, **values)` that puts values into a JSON file."""

    def edit(file, **values):
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | values))

    return edit
