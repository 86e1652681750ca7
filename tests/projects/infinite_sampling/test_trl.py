"""TRL's own trainer on completions of this engine: what it is handed, what it trains on, and where
it ends up.
"""

import copy
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch

from projects.infinite_sampling.baselines import TrlSteps
from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.grpo import advantages, backward
from projects.infinite_sampling.predictor import Constant, Online
from projects.infinite_sampling.rollout import Schedule
from projects.infinite_sampling.trl_rollout import rollout, rollout_seed
from shared.errors import UserError

# of TRL, that rollout_func may change; of transformers, its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore")
GROUP, LIMIT = 4, 12


def length(completions, **_):
    """A reward of texts or of chats."""
    return [float(len(one if isinstance(one, str) else one[0]["content"])) for one in completions]


def plain(trainer):
    """A model with the weights of the trainer's. (A deep copy would still run these: TRL puts a
    forward of its own over the model's.)
    """
    model = type(trainer.model)(trainer.model.config)
    model.load_state_dict(trainer.model.state_dict())
    return model.eval()


def recorded(function):
    """A rollout that writes down each call: (prompts, what came of it, whether the model was in
    training mode before and after).
    """
    calls = []

    def wrapped(prompts, trainer):
        before = trainer.model.training
        made = function(prompts, trainer)
        calls.append((list(prompts), made, (before, trainer.model.training)))
        return made

    return wrapped, calls


def rows(trainer):
    """Prompts, completions and log-probabilities of what the losses were of, without padding, and
    whether TRL counts each for the loss.
    """
    found = []
    for inputs in trainer.seen:
        for place in range(len(inputs["completion_ids"])):
            mask = inputs["completion_mask"][place].bool()
            prompt = inputs["prompt_ids"][place][inputs["prompt_mask"][place].bool()].tolist()
            chances = inputs["sampling_per_token_logps"][place]
            found.append(
                (prompt, inputs["completion_ids"][place][mask].tolist(), chances[mask].tolist())
            )
    return found


def test_it_trains_on_what_the_engine_samples(trl_trainer):
    online = Online(Constant(), 1)
    function, calls = recorded(rollout(Schedule("continuous", 3, "plan_sjf", 1, online), online))
    rewarded = []

    def reward(prompts, completions, **_):
        rewarded.extend(zip(prompts, completions, strict=True))
        return length(completions)

    options = {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "temperature": 0.8,
    }
    trainer = trl_trainer(["ab", "longer", "c", "dd", "e", "f"], reward, function, **options)
    start = plain(trainer)
    trainer.train()
    assert trainer.state.global_step == len(calls) == 3
    prompts, made, modes = calls[0]
    assert prompts == ["ab"] * GROUP + ["longer"] * GROUP  # each as often as completions are wanted
    assert modes == (True, True)
    tokens = [trainer.processing_class(text)["input_ids"] for text in ("ab", "longer")]
    engine = Engine(start, [0], LIMIT, temperature=0.8, seed=rollout_seed(3, 0))
    wanted = engine.run(tokens, GROUP, Schedule("micro", 2)).completions
    assert made["completion_ids"] == [c.tokens for c in wanted]
    assert len({len(ids) for ids in made["completion_ids"]}) > 2
    # some end, some are cut
    assert {ids[-1] == 0 for ids in made["completion_ids"]} == {True, False}
    flat = [
        key
        for _, made, _ in calls
        for key in zip(*(made[name] for name in ("prompt_ids", "completion_ids")), strict=True)
    ]
    # all that was sampled, its end tokens, and no padding
    assert sorted((p, c) for p, c, _ in rows(trainer)) == sorted(flat)
    text = trainer.processing_class.decode
    assert rewarded == [(text(p), text(c, skip_special_tokens=True)) for p, c in flat]
    for _, made, _ in calls:
        assert [len(ids) for ids in made["completion_ids"]] == [
            len(values) for values in made["logprobs"]
        ]
    # of the first step, under the first weights
    for prompt, completion, logprobs in rows(trainer)[: 2 * GROUP]:
        with torch.no_grad():
            chances = torch.log_softmax(
                start(input_ids=torch.tensor([prompt + completion])).logits[0] / 0.8, -1
            )
        expected = [
            float(chances[len(prompt) + t - 1, token]) for t, token in enumerate(completion)
        ]
        assert logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
def test_trl_trains_with_the_log_probabilities_that_were_drawn_from(trl_trainer, adapters):
    """At every step: whatever the weights are by then, the engine sampled from them."""
    from peft import LoraConfig

    options = (
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
        if adapters
        else {}
    )
    trainer = trl_trainer(
        ["ab", "cd", "e"],
        length,
        rollout(Schedule("continuous", 3)),
        max_steps=3,
        learning_rate=0.1,
        **options,
    )
    trainer.train()
    assert len(trainer.seen) == 3
    drawn = []
    for inputs in trainer.seen:
        mask = inputs["completion_mask"].bool()
        drawn.append(inputs["sampling_per_token_logps"][mask])
        assert torch.allclose(drawn[-1], inputs["trained"][mask], atol=1e-4)
    assert all(values.numel() > 8 for values in drawn)
    if adapters:
        assert any(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_its_weights_are_those_of_this_librarys_steps(trl_trainer, loss_type):
    """Two steps of TRL's trainer with this rollout against two of the library: same completions,
    losses, clipping, optimizer.
    """
    prompts = ["ab", "longer", "c", "dd"]
    options = {
        "max_steps": 2,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
    }
    options |= {
        "loss_type": loss_type,
        "scale_rewards": "none" if loss_type == "dr_grpo" else "group",
        "max_grad_norm": 0.5,
    }
    trainer = trl_trainer(
        prompts, length, rollout(Schedule("continuous", 3)), **options, adam_beta2=0.95
    )
    model = plain(trainer)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    trainer.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(2):
        tokens = [
            trainer.processing_class(text)["input_ids"] for text in prompts[2 * step : 2 * step + 2]
        ]
        made = (
            Engine(model, [0], LIMIT, seed=rollout_seed(3, step))
            .run(tokens, GROUP, Schedule("full"))
            .completions
        )
        texts = [trainer.processing_class.decode(c.tokens, skip_special_tokens=True) for c in made]
        gains = advantages(
            torch.tensor(length(texts)).reshape(2, GROUP), scale=loss_type != "dr_grpo"
        ).flatten()
        optimizer.zero_grad()
        backward(model, tokens, made, gains, LIMIT, micro_batch=3, loss_type=loss_type)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    ours, theirs = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, trainer.model)
    )
    assert float((ours - before).norm()) > 0.1
    # Adam divides small gradients by themselves, so that rounding of a few parameters shows; 1e-3
    # of the way is far above it.
    assert float((ours - theirs).norm()) < 1e-3 * float((ours - before).norm())


def chat_tokenizer(save_tokenizer, folder):
    """Puts a token in front of every text, as Llama's does, which a chat template writes itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = save_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="! $A", special_tokens=[("!", 2)]
    )
    tokenizer.chat_template = (
        "!{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ tail }}"
    )
    return tokenizer


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_read_as_the_trainer_reads_them(trl_trainer, save_tokenizer, tmp_path, chat):
    texts = ["ab", "longer"]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    function, calls = recorded(rollout(Schedule("continuous", 3)))
    options = {
        "chat_template_kwargs": {"tail": "<think>"},
        "max_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    tokenizer = chat_tokenizer(save_tokenizer, tmp_path)
    trainer = trl_trainer(prompts, length, function, tokenizer=tokenizer, **options)
    trainer.train()
    handed, made, _ = calls[0]
    assert made["prompt_ids"] == trainer._tokenize_prompts(handed)[0]
    written = [tokenizer.decode(ids) for ids in made["prompt_ids"][::GROUP]]
    assert written == [f"!<user>{text}<think>" if chat else f"!{text}" for text in texts]


def test_completions_that_were_cut_are_masked_where_trl_is_asked_to(trl_trainer):
    function, calls = recorded(rollout(Schedule("continuous", 3)))
    trainer = trl_trainer(
        ["ab", "cd"],
        length,
        function,
        gradient_accumulation_steps=2,
        mask_truncated_completions=True,
    )
    trainer.train()
    kept = sorted(ids for _, made, _ in calls for ids in made["completion_ids"] if ids[-1] == 0)
    cut = [ids for _, made, _ in calls for ids in made["completion_ids"] if ids[-1] != 0]
    assert kept
    assert cut
    assert all(len(ids) == LIMIT for ids in cut)
    assert sorted(completion for _, completion, _ in rows(trainer) if completion) == kept
    (line,) = [line for line in trainer.state.log_history if "completions/clipped_ratio" in line]
    assert line["completions/clipped_ratio"] == pytest.approx(len(cut) / 8)


def test_no_two_batches_have_the_same_numbers(trl_trainer):
    """Of one prompt, twice within a step and once in an evaluation; of which the predictor learns
    nothing.
    """
    heard = []

    class Heard(Online):
        def observe(self, prompts, completions):
            heard.append(len(completions))

    function, calls = recorded(rollout(Schedule("continuous", 3), Heard(Constant(), 1)))
    options = {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "num_generations_eval": 2,
        "per_device_eval_batch_size": 2,
    }
    trainer = trl_trainer(["ab", "ab"], length, function, learning_rate=0.0, max_steps=2, **options)
    trainer.train()
    trainer.evaluate()
    assert [len(prompts) for prompts, _, _ in calls] == [GROUP] * 4 + [2]
    assert [modes for _, _, modes in calls] == [(True, True)] * 4 + [(False, False)]
    assert heard == [GROUP] * 4
    made = [tuple(ids) for _, found, _ in calls for ids in found["completion_ids"] if len(ids) > 2]
    assert len(set(made)) == len(made) > 5
    again, _ = recorded(rollout(Schedule("micro", 2)))
    trainer.state.global_step = 0
    trainer.model.train()
    assert again(["ab"] * GROUP, trainer)["completion_ids"] == calls[0][1]["completion_ids"]


def test_the_trainer_goes_a_step_at_a_time_beside_another(trl_trainer, save_tokenizer, tmp_path):
    """As the peer that experiments measure: from the same weights, its own rollout and this one, a
    step in turn.
    """
    tokenizer, base = save_tokenizer(tmp_path), plain(trl_trainer(["ab"], length))
    prompts, phases = ["ab", "longer", "c", "dd"], []
    options = {
        "steps": 2,
        "prompts_per_step": 2,
        "group": GROUP,
        "micro_batch": 2,
        "limit": LIMIT,
        "lr": 1e-2,
        "seed": 3,
    }

    def score(prompts, completions):
        return length(completions)

    def made(name, function):
        @contextmanager
        def phase():
            phases.append(name)
            yield

        model = copy.deepcopy(base).train()
        return TrlSteps(
            model, tokenizer, prompts, score, **options, phase=phase, rollout_func=function
        ), model

    (own, one), (ours, other) = made("own", None), made("ours", rollout(Schedule("continuous", 3)))
    weights = [one.lm_head.weight.detach().clone()]
    for step in range(2):
        rewards, lengths = ours.step()
        assert len(own.step()[0]) == len(rewards) == len(lengths) == 2 * GROUP
        if step == 0:
            tokens = [tokenizer(text)["input_ids"] for text in prompts[:2]]
            wanted = (
                Engine(base, [0], LIMIT, seed=rollout_seed(3, 0))
                .run(tokens, GROUP, Schedule("full"))
                .completions
            )
            assert lengths == [len(c.tokens) for c in wanted]
            assert rewards == length(
                [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in wanted]
            )
        weights.append(one.lm_head.weight.detach().clone())
        # an optimizer step was made, and it is the model's
        assert not torch.equal(weights[-1], weights[-2])
    assert phases == ["ours", "own"] * 2
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    own.close()
    ours.close()
    with pytest.raises(UserError, match="8 completions of a step are no multiple of 3"):
        TrlSteps(
            base, tokenizer, prompts, score, **{**options, "micro_batch": 3}, phase=nullcontext
        )


def test_without_trl_the_peer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    options = {
        "steps": 1,
        "prompts_per_step": 1,
        "group": 2,
        "micro_batch": 2,
        "limit": 2,
        "lr": 0.0,
        "seed": 0,
    }
    with pytest.raises(UserError, match="needs TRL: pip install"):
        TrlSteps(None, None, ["a"], length, **options, phase=nullcontext)


@pytest.mark.parametrize("bf16", [True, None])
def test_it_works_under_the_trainers_autocast(trl_trainer, bf16):
    """Which is TRL's default, and stands around the model's own forward."""
    trainer = trl_trainer(
        ["ab", "cd"], length, rollout(Schedule("continuous", 3)), max_steps=2, bf16=bf16
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    assert len(trainer.seen) == 2
    for inputs in trainer.seen:
        mask = inputs["completion_mask"].bool()
        drawn, trained = (inputs[k][mask] for k in ("sampling_per_token_logps", "trained"))
        assert torch.allclose(drawn, trained, atol=1e-2)


def test_a_model_that_would_be_driven_wrongly_is_refused(trl_trainer, monkeypatch):
    trainer = trl_trainer(["ab"], length, rollout(Schedule("continuous", 3)))
    attend = torch.nn.functional.scaled_dot_product_attention

    def near(query, key, value, attn_mask=None, **options):
        """Looks at the last four tokens alone, whatever the mask, as a local layer would."""
        here = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
        seen = (here >= torch.arange(key.shape[2])) & (here - torch.arange(key.shape[2]) < 4)
        options.pop("is_causal", None)
        return attend(query, key, value, attn_mask=seen, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", near)
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*different positions"):
        trainer.train()


def test_processes_draw_other_completions(trl_trainer):
    trainer = trl_trainer(["ab"], length)

    class Ranked:
        def __init__(self, rank):
            self.process_index, self.unwrap_model = rank, trainer.accelerator.unwrap_model

    class Handed:
        def __init__(self, rank):
            self.accelerator = Ranked(rank)

        def __getattr__(self, name):
            return getattr(trainer, name)

    made = [
        rollout(Schedule("continuous", 3))(["ab"] * GROUP, Handed(rank))["completion_ids"]
        for rank in (0, 1, 0)
    ]
    assert made[0] == made[2] != made[1]


def test_part_of_the_distribution_is_drawn_from_as_the_trainer_is_told(trl_trainer):
    function, calls = recorded(rollout(Schedule("continuous", 3)))
    trainer = trl_trainer(["ab"], length, function, top_k=5, top_p=0.9, temperature=0.8)
    start = plain(trainer)
    trainer.train()
    tokens = [trainer.processing_class("ab")["input_ids"]]
    engine = Engine(start, [0], LIMIT, temperature=0.8, top_k=5, top_p=0.9, seed=rollout_seed(3, 0))
    wanted = engine.run(tokens, GROUP, Schedule("full")).completions
    whole = Engine(start, [0], LIMIT, temperature=0.8, seed=rollout_seed(3, 0))
    assert calls[0][1]["completion_ids"] == [c.tokens for c in wanted]
    assert [c.tokens for c in wanted] != [
        c.tokens for c in whole.run(tokens, GROUP, Schedule("full")).completions
    ]


@pytest.mark.parametrize("setting", [{"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_draws_from_a_part_of_the_distribution_are_refused(trl_trainer, setting):
    trainer = trl_trainer(["ab"], length, rollout(Schedule("continuous", 3)), **setting)
    with pytest.raises(UserError, match=f"{next(iter(setting))}="):
        trainer.train()


def test_tools_are_refused(trl_trainer):
    trainer = trl_trainer(["ab"], length, rollout(Schedule("continuous", 3)))
    trainer.tools = [len]
    with pytest.raises(UserError, match="no tools"):
        trainer.train()
