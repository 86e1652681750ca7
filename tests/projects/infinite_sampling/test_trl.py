"""The rollout for TRL: with a stand-in for its trainer, and with TRL itself where it is installed."""

from types import SimpleNamespace

import pytest
import torch

from projects.infinite_sampling.engine import Schedule
from projects.infinite_sampling.predictor import Constant, Online
from projects.infinite_sampling.trl_rollout import rollout


def small(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, eos_token_id=end, pad_token_id=end, bos_token_id=None))


def test_each_prompt_gets_as_many_completions_as_it_is_handed_over(tmp_path, save_tokenizer):
    tokenizer = save_tokenizer(tmp_path)
    model = small(tokenizer).train()
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped, process_index=0)
    args = SimpleNamespace(max_completion_length=6, temperature=1.0, seed=3)
    trainer = SimpleNamespace(
        processing_class=tokenizer, args=args, model=model, accelerator=accelerator, state=SimpleNamespace(global_step=0)
    )
    online = Online(Constant(), 1)
    function = rollout(Schedule("continuous", 3, "plan_sjf", 1, online), online)
    chat = [{"role": "user", "content": "c"}]
    made = function(["ab", "ab", chat, "ab", chat], trainer)
    assert model.training
    assert [tokenizer.decode(ids) for ids in made["prompt_ids"]] == ["ab", "ab", "<user>c<end><assistant>", "ab", "<user>c<end><assistant>"]
    assert [len(ids) for ids in made["completion_ids"]] == [len(values) for values in made["logprobs"]]
    same = [made["completion_ids"][i] for i in (0, 1, 3)]
    assert len({tuple(ids) for ids in same}) == 3  # one prompt, three completions
    for prompt, ids, logprobs in zip(made["prompt_ids"], made["completion_ids"], made["logprobs"], strict=True):
        with torch.no_grad():
            chances = torch.log_softmax(model(input_ids=torch.tensor([prompt + ids])).logits[0], -1)
        wanted = [float(chances[len(prompt) + t - 1, token]) for t, token in enumerate(ids)]
        assert logprobs == pytest.approx(wanted, abs=1e-5)
    assert function(["ab"], trainer)["completion_ids"][0] == same[0]
    trainer.state.global_step = 1
    assert function(["ab"], trainer)["completion_ids"][0] != same[0]


def test_trl_trains_with_it(tmp_path, save_tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = save_tokenizer(tmp_path)
    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=1, num_generations=4, per_device_train_batch_size=4,
        max_completion_length=6, report_to=[], logging_steps=1, bf16=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=small(tokenizer),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "ab"}, {"prompt": "cd"}]),
        processing_class=tokenizer,
        rollout_func=rollout(Schedule("continuous", 2)),
    )
    trainer.train()
    assert trainer.state.global_step == 1
