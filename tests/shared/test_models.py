"""Models: sizes by formula, ties, and the packaged ones by what they know."""

import json
import shutil

import pytest
import torch

from shared import data
from shared.errors import UserError
from shared.models import (
    add_lora,
    causal_lm_config,
    copy_configuration,
    empty_causal_lm,
    fingerprint,
    load_causal_lm,
    load_efficientnet_lite0,
    load_sentence_encoder,
    local_model,
    random_causal_lm,
    save_lora_configuration,
    weight_files,
)
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


@pytest.mark.parametrize("tied", [True, False])
def test_an_empty_model_has_its_ties_and_no_memory(tied, tmp_path):
    made = random_causal_lm(causal_lm_config("llama", 2, 24, 4, vocabulary=101, tied=tied))
    made.save_pretrained(tmp_path)
    empty = empty_causal_lm(tmp_path)
    assert all(p.is_meta for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())
    assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == tied
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in made.named_parameters()
    }


def test_a_folder_is_a_model_if_it_has_a_config(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json"):
        local_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert local_model(tmp_path) == tmp_path
    assert local_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nobody/nothing-of-the-kind", "no such thing", "/not/a/folder"])
def test_what_is_not_there_is_refused_with_what_would_bring_it(name):
    with pytest.raises(UserError, match=r"no model '.*hf download") as caught:
        local_model(name)
    assert "\n" not in str(caught.value)


# ---- packaged models -----------------------------------------------------------------------------


@pytest.fixture
def cached(request):
    """Skips unless the catalogue's entry has been fetched."""
    try:
        data.path(request.param)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.data
@pytest.mark.parametrize("cached", ["smollm2-135m"], indirect=True)
@pytest.mark.usefixtures("cached")
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = load_causal_lm("smollm2-135m")
    assert _count(model) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(
            **ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


@pytest.mark.data
@pytest.mark.parametrize("cached", ["minilm-l6"], indirect=True)
@pytest.mark.usefixtures("cached")
def test_minilm_puts_like_beside_like():
    encoder = load_sentence_encoder()
    sentences = [
        "A man is eating pasta.",
        "Someone eats noodles.",
        "The stock market fell sharply.",
        "x",
    ]
    with torch.no_grad():
        vectors = encoder(**encoder.tokens(sentences))
        alone = encoder(**encoder.tokens(sentences[:1]))
    assert vectors.shape == (4, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(vectors[0], alone[0], atol=1e-5, rtol=1e-4)  # padding does not show
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 1] > similarity[0, 2] + 0.3
    assert encoder.tokens(["word " * 500], max_tokens=32)["input_ids"].shape == (1, 32)


@pytest.mark.data
@pytest.mark.parametrize("cached", ["efficientnet-lite0"], indirect=True)
@pytest.mark.usefixtures("cached")
def test_efficientnet_gives_a_thousand_finite_numbers():
    model = load_efficientnet_lite0()
    assert not model.training
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = model((torch.randint(0, 256, (2, 3, 224, 224), generator=g).float() - 127) / 128)
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    assert not torch.equal(logits[0], logits[1])


# ---- model folders and adapters ------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, save_tokenizer):
    """The folder of a model in two weights files, with a tokenizer."""
    folder = tmp_path / "small"
    random_causal_lm(
        causal_lm_config("llama", 2, 64, 2, vocabulary=260, positions=64)
    ).save_pretrained(folder, max_shard_size="200KB")
    save_tokenizer(folder)
    return folder


def test_the_weights_files_of_a_folder(small):
    files = weight_files(small)
    assert files == sorted(small.glob("*.safetensors"))
    assert len(files) > 1
    files[-1].unlink()
    with pytest.raises(UserError, match=rf"{files[-1].name} does not exist"):
        weight_files(small)


def test_a_fingerprint_tells_models_apart(small, tmp_path):
    before = fingerprint(small)
    assert fingerprint(shutil.copytree(small, tmp_path / "copy")) == before
    (small / "tokenizer.json").write_text("{}")
    assert fingerprint(small) == before
    seen = {before}
    for file in (*weight_files(small), small / "config.json"):
        whole = file.read_bytes()
        for changed in (whole[:-1] + bytes([whole[-1] ^ 1]), whole + b" "):
            file.write_bytes(changed)
            seen.add(fingerprint(small))
        file.write_bytes(whole)
    assert len(seen) == 1 + 2 * (len(weight_files(small)) + 1)
    assert fingerprint(small) == before


def test_a_fingerprint_holds_the_sizes_of_files_that_are_not_read_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    seen = set()
    for size in (5 << 20, 6 << 20):
        with open(tmp_path / "model.safetensors", "wb") as file:
            file.truncate(size)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 2


def test_everything_but_the_weights_is_copied(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    copy_configuration(small, out, torch.bfloat16)
    assert {f.name for f in out.iterdir()} == {
        f.name for f in small.iterdir() if "safetensors" not in f.name
    }
    given, copied = (json.loads((folder / "config.json").read_text()) for folder in (small, out))
    assert copied == given | {"dtype": "bfloat16"}
    assert (out / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


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
