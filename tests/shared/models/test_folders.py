"""Model folders: their weights files, what tells them apart, what another folder takes of them."""

import json
import shutil

import pytest
import torch

from shared.errors import UserError
from shared.models import copy_configuration, fingerprint, load_causal_lm, weight_files


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


# What transformers may have written beside the weights, and what a run, or a person, leaves there.
CARRIED = (
    "added_tokens.json",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
LEFT = (
    "README.md",
    "adapter_config.json",
    "data.txt",
    "model.safetensors.index.json",
    "modeling.py",
    "notes/chat_template.jinja",
    "privacy.json",
    "pytorch_model.bin.index.json",
    "run.json",
    "steps.jsonl",
    "trainer_state.json",
)


def test_another_model_takes_the_tokenizer_and_no_word_about_the_first(tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    for name in (*CARRIED, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    config = {"model_type": "llama", "torch_dtype": "float16", "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    copy_configuration(folder, out, torch.bfloat16)
    files = {str(file.relative_to(out)): file for file in out.rglob("*") if file.is_file()}
    assert files.keys() == {*CARRIED, "config.json"}
    assert all(files[name].read_text() == name for name in CARRIED)
    written = json.loads(files["config.json"].read_text())
    assert written == {"model_type": "llama", "dtype": "bfloat16"}


def test_a_model_with_the_configuration_of_another_is_loaded_with_its_tokenizer(single, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    copy_configuration(single, out, torch.float32)
    shutil.copy(single / "model.safetensors", out)
    assert load_causal_lm(out)[1].get_vocab() == load_causal_lm(single)[1].get_vocab()
