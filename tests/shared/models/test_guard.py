"""What a folder must be before anything of it is used: no code, no codes for numbers, no damage."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from shared.errors import UserError
from shared.models import (
    load_causal_lm,
    load_clip_processor,
    load_config,
    load_tokenizer,
    loading,
    local_model,
)
from shared.models.guard import plain_errors, read_config

CODE = """
from pathlib import Path
Path({marker!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def own(small, tmp_path, monkeypatch, edit_json):
    """A folder whose model, configuration and tokenizer are code that lies in it, and the file that
    the code writes when it runs. Whatever is asked on the terminal is answered with yes.
    """
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    marker = tmp_path / "marker"
    (small / "code.py").write_text(CODE.format(marker=str(marker)))
    edit_json(
        small / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"},
    )
    edit_json(
        small / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "code.OwnTokenizer"]},
    )
    return small, marker


def test_the_code_of_this_folder_runs_where_nobody_guards(own):
    folder, marker = own
    AutoTokenizer.from_pretrained(folder)
    assert marker.exists()


@pytest.mark.parametrize("load", [local_model, load_config, load_tokenizer, load_causal_lm])
def test_code_that_lies_in_a_folder_is_refused_in_a_line_and_does_not_run(own, load):
    folder, marker = own
    with pytest.raises(UserError, match=rf"^{folder} \(own\): its config.json asks for code") as no:
        load(folder)
    assert "\n" not in str(no.value)
    assert not marker.exists()


def test_a_tokenizer_alone_may_not_bring_code(own, edit_json):
    folder, marker = own
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match=r"\(llama\): its tokenizer_config.json asks for code"):
        load_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_nor_does_it_run_where_the_folders_files_say_nothing(own, load, monkeypatch):
    folder, marker = own
    monkeypatch.setattr(loading, "read_config", lambda folder: {"model_type": "own"})
    with pytest.raises(UserError, match=r"\(own\) cannot be loaded"):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("where", ["config.json", "text_config"])
@pytest.mark.parametrize("kind", ["fp8", "bitsandbytes", "gptq", "compressed-tensors"])
def test_quantised_folders_are_refused_by_their_kind(small, edit_json, where, kind):
    settings = {"quantization_config": {"quant_method": kind}}
    edit_json(small / "config.json", **(settings if "." in where else {where: settings}))
    with pytest.raises(UserError, match=rf"\(llama\): its weights are quantised \({kind}\); name"):
        local_model(small)


def test_a_folder_with_an_adapter_is_not_its_base_model(small, edit_json):
    edit_json(small / "adapter_config.json", base_model_name_or_path="elsewhere", peft_type="LORA")
    with pytest.raises(UserError, match=r"\(llama\): holds an adapter"):
        local_model(small)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config.json is damaged: no JSON \("),
        ("[" * 100_000, r"config.json is damaged"),
        ("[1]", r"config.json is damaged: no JSON object"),
        ("{}", r"\(family not named\) cannot be loaded"),
        ('{"model_type": "lama"}', r"\(lama\) cannot be loaded: .*does not recognize"),
        ('{"architectures": ["LamaForCausalLM"]}', r"\(LamaForCausalLM\) cannot be loaded"),
        ('{"model_type": ["llama"]}', r"\(family not named\) cannot be loaded"),
        ('{"model_type": "llama", "hidden_size": "x"}', r"\(llama\) cannot be loaded"),
        ('{"model_type": "llama", "num_attention_heads": 0}', r"\(llama\) cannot be loaded"),
        ('{"model_type": "clip"}', r"\(clip\) cannot be loaded"),
    ],
)
def test_a_damaged_or_unknown_configuration_is_one_line(single, content, message):
    (single / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_causal_lm(single)
    assert str(caught.value).startswith(str(single))
    assert "\n" not in str(caught.value)


def test_a_folder_without_its_description_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json"):
        read_config(tmp_path)
    with pytest.raises(UserError, match=r"\(clip\) cannot be loaded"):
        load_clip_processor(tmp_path)


def test_too_little_memory_is_not_the_folders_fault(tmp_path):
    for error in (
        MemoryError(),
        torch.OutOfMemoryError(),
        RuntimeError("unable to mmap 210351744 bytes: Cannot allocate memory (12)"),
    ):
        with pytest.raises(type(error)) as caught, plain_errors(tmp_path, "llama"):
            raise error
        assert caught.value is error
