"""A model that rows of cache would drive wrongly is refused by name before the first token, and one
that is not is driven: told from logits, not from a list.
"""

import copy

import numpy as np
import pytest
import torch

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.rollout import Schedule
from projects.infinite_sampling.streams import cut, draw
from shared.errors import UserError

PROMPT, LIMIT = [3, 1, 4, 1, 5], 20
GATED = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SCHEDULES = [Schedule("continuous", 3), Schedule("dynamic", 3, page=4)]


def model_of(name):
    """A model whose attention is not flat, as that of first weights is."""
    import transformers as t

    plain = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    heads = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    match name:
        case "GPTNeo":
            config = t.GPTNeoConfig(
                vocab_size=23, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
        case "Phi3":
            rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}  # fmt: skip
            config = t.Phi3Config(
                **GATED,
                **plain,
                max_position_embeddings=64,
                rope_parameters=rope,
                original_max_position_embeddings=16,
            )
        case "Mistral":
            config = t.MistralConfig(**GATED, sliding_window=8)
        case "Gemma3":
            config = t.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=8)
        case "Bloom":
            config = t.BloomConfig(vocab_size=23, hidden_size=32, n_layer=2, n_head=4)
        case "Falcon":
            config = t.FalconConfig(**heads, alibi=True)
        case "wide Mistral":
            config = t.MistralConfig(**GATED, sliding_window=64)
        case "Mpt":
            config = t.MptConfig(vocab_size=23, d_model=32, n_layers=2, n_heads=4)
        case _:
            config = t.GPTNeoXConfig(**heads, intermediate_size=48)
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("name", ["GPTNeo", "Phi3", "Mistral", "Gemma3", "Bloom", "Falcon"])
def test_a_model_that_would_be_driven_wrongly_is_refused_by_name(name):
    heard = []
    for schedule in SCHEDULES:
        with pytest.raises(UserError, match=f"{name}.*rows that stand at different positions"):
            Engine(model_of(name), [0], LIMIT).run([PROMPT], 4, schedule, heard.append)
    assert not heard


@pytest.mark.parametrize("name", ["wide Mistral", "Mpt", "GPTNeoX"])
def test_one_that_is_driven_rightly_is_not(helpers, name):
    """A window wider than the rows among them, and positions by a bias on attention."""
    model = model_of(name).double()
    wanted = [helpers.naive(model, PROMPT, i, 7, LIMIT)[0] for i in range(4)]
    for schedule in SCHEDULES:
        made = Engine(model, [0], LIMIT, seed=7).run([PROMPT], 4, schedule).completions
        assert [c.tokens for c in made] == wanted


def test_rows_no_longer_than_the_window_are_driven():
    engine = Engine(model_of("Mistral"), [0], 3)
    assert len(engine.run([PROMPT], 4, Schedule("continuous", 2)).completions) == 4
    with pytest.raises(UserError, match="rows that stand at different positions"):
        engine.run([PROMPT * 2], 4, Schedule("continuous", 2))  # a longer prompt is asked of anew


def test_a_model_is_asked_once(helpers):
    model, calls = helpers.make(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for _ in range(2):
        calls.clear()
        steps = Engine(model, [0], LIMIT).run([PROMPT], 4, Schedule("continuous", 2)).stats.steps
        counts.append(len(calls) - steps)
    assert counts[0] > counts[1] == 1  # the prompt's


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["continuous", "dynamic"])
def test_under_autocast_completions_are_the_policys(helpers, attention, mode):
    """Those of a plain forward under the same autocast, but where rounding tips a draw."""
    model = helpers.make(dtype=torch.float32, attention=attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = [helpers.naive(model, PROMPT, i, 7, LIMIT)[0] for i in range(12)]
        made = Engine(model, [0], LIMIT, seed=7).run([PROMPT], 12, Schedule(mode, 4, page=4))
    same = [c.tokens == tokens for c, tokens in zip(made.completions, wanted, strict=True)]
    assert sum(same) >= 8
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UserError, match="GPTNeo"):
        Engine(model_of("GPTNeo"), [0], LIMIT).run([PROMPT], 4, Schedule(mode, 4))


def test_logits_that_are_not_finite_are_an_error(helpers):
    for value in (float("nan"), float("inf")):
        for temperature in (1.0, 0.0):
            model = helpers.make()
            engine = Engine(model, [0], LIMIT, temperature=temperature)
            engine.check([PROMPT])
            with torch.no_grad():
                model.lm_head.weight[7, :] = value
            with pytest.raises(UserError, match="logits that are not finite, for token 1 of"):
                engine.run([PROMPT], 4, Schedule("continuous", 2))
            with pytest.raises(UserError, match=r"LlamaForCausalLM.* not finite"):
                Engine(copy.deepcopy(model), [0], LIMIT).check([PROMPT])


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -1e300])
def test_predictions_that_are_not_finite_cost_steps_alone(llama, broken):
    class Broken:
        needs_hidden = False

        def predict(self, prefixes):
            return np.array([broken if i % 2 else 5.0 for _, i in prefixes.jobs])

    wanted = Engine(llama, [0], LIMIT, seed=7).run([PROMPT], 8, Schedule("full")).completions
    for schedule in (
        Schedule("continuous", 3, "plan_sjf", 2, Broken()),
        Schedule("dynamic", 3, "lpt_global", 1, Broken(), page=4),
    ):
        made = Engine(llama, [0], LIMIT, seed=7).run([PROMPT], 8, schedule).completions
        assert [c.tokens for c in made] == [c.tokens for c in wanted]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.5}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
     {"top_p": 1.5}],
)  # fmt: skip
def test_a_distribution_that_is_none_is_refused(llama, options):
    with pytest.raises(UserError, match=next(iter(options))):
        Engine(llama, [0], LIMIT, **options)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (8, 0.6), (1, 1.0), (0, 1e-9)])
def test_tokens_are_cut_as_transformers_cuts_them(top_k, top_p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(50, 40, dtype=torch.float64, generator=torch.manual_seed(0))
    warped = logits
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    chances = torch.softmax(warped, -1)
    found = cut(torch.softmax(logits, -1), top_k, top_p)
    assert torch.allclose(found / found.sum(-1, keepdim=True), chances, atol=1e-12)
    assert torch.equal(found > 0, chances > 0)


def test_draws_follow_what_is_left_and_log_probabilities_the_whole():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    uniforms = torch.from_numpy(np.random.default_rng(0).random(4000))
    tokens, logprobs = draw(logits, uniforms, 0.5, top_k=3, top_p=0.95)
    chances = torch.softmax(2 * logits[0].double(), -1)
    assert set(tokens.tolist()) == {0, 1}  # the third is beyond 0.95 of what top_k leaves
    share = float((tokens == 0).double().mean())
    assert share == pytest.approx(float(chances[0] / chances[:2].sum()), abs=0.02)
    assert torch.allclose(logprobs, chances.log()[tokens])


def test_a_rollout_draws_from_the_likeliest_tokens(llama):
    whole = Engine(llama, [0], LIMIT, seed=7).run([PROMPT], 16, Schedule("full")).completions
    one = Engine(llama, [0], LIMIT, seed=7, top_k=1).run([PROMPT], 16, Schedule("continuous", 4))
    greedy = Engine(llama, [0], LIMIT, temperature=0).run([PROMPT], 1, Schedule("full"))
    assert {tuple(c.tokens) for c in one.completions} == {tuple(greedy.completions[0].tokens)}
    assert len({tuple(c.tokens) for c in whole}) > 8
    cut_down = Engine(llama, [0], LIMIT, seed=7, top_p=0.5)
    full, *others = (cut_down.run([PROMPT], 16, s) for s in (Schedule("full"), *SCHEDULES))
    assert [c.tokens for c in full.completions] != [c.tokens for c in whole]
    for made in others:
        assert [c.tokens for c in made.completions] == [c.tokens for c in full.completions]
