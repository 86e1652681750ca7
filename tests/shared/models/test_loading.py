"""Models and tokenizers of folders: they belong together, or are refused."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPModel,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from shared.errors import UserError
from shared.models import (
    check_length,
    empty_causal_lm_of,
    end_tokens,
    load_causal_lm,
    load_pretrained,
    load_tokenizer,
)
from shared.models.loading import position_limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_whole_in_the_dtype_asked_for(small, dtype):
    model, tokenizer = load_causal_lm(small, dtype)
    wanted = AutoModelForCausalLM.from_pretrained(small, dtype=dtype)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert not model.training
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in model.state_dict().items())
    assert tokenizer.pad_token == "<end>"


def test_a_model_of_another_kind_is_refused_by_its_family(small):
    with pytest.raises(UserError, match=r"\(llama\) is no model of the family clip"):
        load_pretrained(CLIPModel, small)


@pytest.mark.parametrize("pickled", [True, False])
def test_a_configuration_without_weights_is_refused(single, pickled):
    (single / "model.safetensors").unlink()
    if pickled:
        (single / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(UserError, match=r"model.safetensors does not exist; .* safetensors"):
        load_causal_lm(single)


def test_an_index_that_is_damaged_or_points_elsewhere_is_refused(small):
    index = small / "model.safetensors.index.json"
    for content in (
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index.json is damaged: it does not say which file"):
            load_causal_lm(small)


# ---- tokenizers ----------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_is_refused(small):
    (small / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"\(llama\) holds no tokenizer"):
        load_causal_lm(small)


def test_a_damaged_tokenizer_is_one_line(small):
    (small / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"\(llama\) cannot be loaded: ") as caught:
        load_tokenizer(small)
    assert "\n" not in str(caught.value)


def test_tokens_need_rows_of_the_embedding_and_rows_need_no_tokens(small, edit_json):
    tokenizer = load_tokenizer(small)  # 257 tokens, 260 rows
    assert len(tokenizer) == 257
    edit_json(small / "config.json", vocab_size=257)
    load_tokenizer(small)
    edit_json(small / "config.json", vocab_size=256)
    message = r"\(llama\): its tokenizer gives '<end>' the number 256, .* has 256 rows"
    with pytest.raises(UserError, match=message):
        load_tokenizer(small)


def test_added_tokens_count(small):
    tokenizer = load_tokenizer(small)
    tokenizer.add_tokens([f"<{number}>" for number in range(3)])
    tokenizer.save_pretrained(small)
    assert len(load_tokenizer(small)) == 260
    tokenizer.add_tokens(["<3>"])
    tokenizer.save_pretrained(small)
    with pytest.raises(UserError, match=r"gives '<3>' the number 260"):
        load_tokenizer(small)


@pytest.mark.parametrize(
    ("named", "own", "ends"),
    [
        (None, None, []),
        (None, 256, [256]),
        (7, None, [7]),
        (256, 256, [256]),
        ([9, 7], 256, [9, 7, 256]),
        ([9, 256], 256, [9, 256]),
        (0, 256, [0, 256]),
    ],
)
def test_what_ends_a_completion_is_what_the_model_and_the_tokenizer_say(small, named, own, ends):
    model, tokenizer = load_causal_lm(small)
    model.generation_config = GenerationConfig(eos_token_id=named)
    if own is None:
        tokenizer.eos_token = None
    assert end_tokens(model, tokenizer) == ends
    model.generation_config = None
    assert end_tokens(model, tokenizer) == ([] if own is None else [256])


# ---- positions -----------------------------------------------------------------------------------

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(**TINY, intermediate_size=8, max_position_embeddings=16), 16),
        (GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16), 16),
        (OPTConfig(**TINY, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=16), 16),
        (
            RobertaConfig(
                **TINY,
                intermediate_size=8,
                max_position_embeddings=16,
                pad_token_id=1,
                is_decoder=True,
            ),
            14,
        ),
    ],
)
def test_a_model_computes_at_its_limit_of_positions(config, limit):
    """...and those that keep an embedding for each fail one further."""
    model = AutoModelForCausalLM.from_config(config).eval()
    empty = empty_causal_lm_of(config)
    for known in (model, empty):
        assert position_limit(known) == limit
        check_length(known, limit)
        with pytest.raises(UserError, match=rf"^--sequence-length {limit + 1} is more than the"):
            check_length(known, limit + 1)
    ids = torch.full((1, limit + 1), 5)
    assert model(input_ids=ids[:, :limit]).logits.isfinite().all()
    if config.model_type != "llama":
        with pytest.raises(Exception, match=r"index out of range|out of bounds|size of tensor"):
            model(input_ids=ids)


def test_a_model_without_a_limit_takes_any_length():
    config = BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=20)
    check_length(config, 1_000_000)
    check_length(empty_causal_lm_of(config), 1_000_000)
    with pytest.raises(UserError, match=r"^--tokens 17 is more than the 16 positions .*\(llama\)"):
        check_length(LlamaConfig(**TINY, max_position_embeddings=16), 17, "--tokens")


def test_the_one_file_is_read_where_an_index_lies_beside_it(small, tmp_path):
    """As transformers does."""
    model, _ = load_causal_lm(small)
    other = tmp_path / "other"
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(other)
    shutil.copy(other / "model.safetensors", small)
    assert not load_causal_lm(small)[0].lm_head.weight.any()
