"""Predictors: what they may see, what censoring means, and measures by hand."""

import copy

import numpy as np
import pytest
import torch

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.predictor import (
    PREDICTORS,
    BinnedTransformer,
    Constant,
    HiddenRidge,
    Lengths,
    Online,
    Oracle,
    _bin_loss,
    _kaplan_meier_mean,
    evaluate,
    examples,
)
from projects.infinite_sampling.rollout import Completion, Prefixes, Schedule

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def told(count: int = 240, seed: int = 0, limit: int = 40) -> list[Completion]:
    """Completions whose second token says how long they are."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        kind = int(rng.integers(3))
        length = min(limit, (4, 14, 36)[kind] + int(rng.integers(3)))
        tokens = [int(rng.integers(10, 14)), 14 + kind, *[20] * (length - 2)]
        found.append(
            Completion(
                i % 3, i // 3, tokens, [0.0] * length, "length" if length == limit else "eos"
            )
        )
    return found


def test_examples_hold_the_prefix_and_nothing_beyond():
    made = [*told(), Completion(0, 99, [10], [0.0], "eos")]
    found = examples(PROMPTS, made, 2)
    assert len(found) == 240  # the one that ended within the prefix has a known length
    for prompt, tokens, (p, i), left in zip(
        found.prefixes.prompts,
        found.prefixes.tokens,
        found.prefixes.jobs,
        found.remaining,
        strict=True,
    ):
        (of,) = [c for c in made if (c.prompt, c.index) == (p, i)]
        assert prompt == PROMPTS[p]
        assert tokens == of.tokens[:2]
        assert left == len(of.tokens) - 2


@pytest.mark.parametrize("name", ["constant", "transformer"])
def test_with_no_prefix_a_group_has_one_prediction(name):
    found = examples(PROMPTS, told(), 0)
    predictor = PREDICTORS[name](24)
    predictor.fit(found)
    predicted = predictor.predict(found.prefixes)
    for prompt in range(3):
        mine = [
            value
            for value, (p, _) in zip(predicted, found.prefixes.jobs, strict=True)
            if p == prompt
        ]
        assert max(mine) - min(mine) < 1e-5
    assert abs(evaluate(np.round(predicted, 3), found)["within"]) == 0


def test_the_encoder_learns_what_the_prefix_tells():
    predictor = BinnedTransformer(24)
    predictor.fit(examples(PROMPTS, told(), 2))
    unseen = examples(PROMPTS, told(60, seed=1), 2)
    found = evaluate(predictor.predict(unseen.prefixes), unseen)
    assert found["error"] < 1.5
    assert found["within"] > 0.7
    blind = BinnedTransformer(24)
    blind.fit(examples(PROMPTS, told(), 1))  # the token that tells is not seen yet
    unseen = examples(PROMPTS, told(60, seed=1), 1)
    assert evaluate(blind.predict(unseen.prefixes), unseen)["error"] > 5
    low, high = (
        predictor.quantile(examples(PROMPTS, told(60, seed=1), 2).prefixes, 0.05),
        predictor.quantile(examples(PROMPTS, told(60, seed=1), 2).prefixes, 0.99),
    )
    assert (low <= high).all()
    assert (low < high).any()


def test_a_long_prompt_loses_its_beginning_and_not_the_prefix():
    long = [[9] * 300] * 3
    predictor = BinnedTransformer(24, steps=90, batch=32)
    predictor.fit(examples(long, told(), 2))
    unseen = examples(long, told(60, seed=1), 2)
    assert evaluate(predictor.predict(unseen.prefixes), unseen)["error"] < 1.5


def test_fitting_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    BinnedTransformer(24, steps=2).fit(examples(PROMPTS, told(), 2))
    assert torch.equal(torch.rand(3), wanted)


def test_a_censored_example_counts_for_its_bin_and_all_later_ones():
    logits = torch.tensor([[0.1, 0.7, -0.3, 0.2]], dtype=torch.float64)
    chances = torch.softmax(logits[0], -1)
    target = torch.tensor([2])
    assert _bin_loss(logits, target, torch.tensor([False])).item() == pytest.approx(
        -chances[2].log().item()
    )
    assert _bin_loss(logits, target, torch.tensor([True])).item() == pytest.approx(
        -chances[2:].sum().log().item()
    )
    assert _bin_loss(logits, torch.tensor([0]), torch.tensor([True])).item() == pytest.approx(
        0.0, abs=1e-12
    )


def test_the_mean_of_censored_lengths_by_hand():
    assert _kaplan_meier_mean(np.array([2.0, 4.0, 6.0]), np.array([False] * 3)) == pytest.approx(
        4.0
    )
    # one of three ends at 2; of the two left one is cut at 3, and the other ends at 6: 2 + 2/3 * 4
    assert _kaplan_meier_mean(
        np.array([2.0, 3.0, 6.0]), np.array([False, True, False])
    ) == pytest.approx(2 + 2 / 3 * 4)
    predictor = Constant()
    predictor.fit(Lengths(Prefixes([], [], []), np.array([2.0, 4.0]), np.array([False, False])))
    assert predictor.predict(Prefixes([[1]] * 3, [[1]] * 3, [(0, 0)] * 3)).tolist() == [3.0] * 3


def test_ridge_does_not_take_a_cut_length_for_a_length():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(600, 3))).float()
    true = 30 + 8 * features[:, 0].double().numpy() + rng.normal(size=600)
    cut = np.minimum(true, 32)
    censored = true > 32
    prefixes = Prefixes([[1]] * 600, [[1]] * 600, [(0, i) for i in range(600)], features)
    errors = {}
    for name, marks in (("told", censored), ("not told", np.zeros(600, dtype=bool))):
        predictor = HiddenRidge(turns=30)
        predictor.fit(Lengths(prefixes, cut, marks))
        errors[name] = float(np.abs(predictor.predict(prefixes) - true).mean())
    assert errors["told"] < 1.0 < 2.0 < errors["not told"]


def test_what_the_engine_captures_is_what_the_ridge_was_fitted_on(llama):
    seen = {}

    class Look:
        needs_hidden = True

        def predict(self, prefixes):
            seen.update(dict(zip(prefixes.jobs, prefixes.hidden, strict=True)))
            return np.ones(len(prefixes.jobs))

    for prefix, slots in ((0, 4), (1, 4), (3, 4), (0, 16), (1, 16)):  # 16: prompts read together
        seen.clear()
        made = (
            Engine(llama, [0], 12, seed=7)
            .run(PROMPTS, 6, Schedule("continuous", slots, "plan_sjf", prefix, Look()))
            .completions
        )
        wanted = examples(PROMPTS, made, prefix, llama, batch=5)
        assert set(wanted.prefixes.jobs) == set(seen)
        for job, features in zip(wanted.prefixes.jobs, wanted.prefixes.hidden, strict=True):
            assert torch.allclose(seen[job], features, atol=1e-5), prefix
    assert not llama.get_output_embeddings()._forward_pre_hooks


def test_features_are_had_a_few_rows_at_a_time_and_without_the_logits_of_a_prompt(
    llama, monkeypatch
):
    """A vocabulary of 50,000 for every token of every row would be the largest tensor of a training
    step.
    """
    from projects.infinite_sampling import predictor
    from shared.models import add_lora

    made = Engine(llama, [0], 12, seed=7).run(PROMPTS, 6, Schedule("continuous", 4)).completions
    wanted = examples(PROMPTS, made, 1, llama).prefixes.hidden
    for name, model in (
        ("plain", llama),
        ("adapters", add_lora(copy.deepcopy(llama), 2, 4, None, "somewhere")),
    ):
        shapes = []
        hook = model.get_output_embeddings().register_forward_hook(
            lambda module, inputs, output, s=shapes: s.append(output.shape)
        )
        assert torch.allclose(
            examples(PROMPTS, made, 1, model).prefixes.hidden, wanted, atol=1e-5
        ), name
        assert all(rows <= 8 and places <= len(PROMPTS) for rows, places, _ in shapes)
        shapes.clear()
        engine = Engine(model.eval(), [0], 3)
        engine.check(PROMPTS)
        # of prompts of two lengths, read at once; a model is asked once
        assert max((places for _, places, _ in shapes), default=0) <= 2
        shapes.clear()
        engine.run(PROMPTS, 2, Schedule("micro", 1))
        assert {places for _, places, _ in shapes} == {1}
        hook.remove()
    monkeypatch.setattr(predictor, "can_keep", lambda model: False)
    assert torch.allclose(examples(PROMPTS, made, 1, llama).prefixes.hidden, wanted, atol=1e-5)


def test_online_learns_from_the_last_rollouts():
    online = Online(Constant(), 0, keep=4, every=2)
    prefixes = Prefixes([[1]], [[]], [(0, 0)])
    assert online.predict(prefixes).tolist() == [1.0]
    for number, length in enumerate((10, 20, 30, 40)):
        online.observe(
            PROMPTS, [Completion(0, i, [20] * length, [0.0] * length, "eos") for i in range(2)]
        )
        # at the first and at every second; the last four
        assert online.predict(prefixes)[0] == pytest.approx((10, 15, 15, 35)[number])
    before = copy.deepcopy(online.predict(prefixes))
    online.observe(PROMPTS, [])
    assert (online.predict(prefixes) == before).all()


def test_measures_by_hand():
    prefixes = Prefixes([[1]] * 6, [[1]] * 6, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)])
    lengths = Lengths(prefixes, np.array([1.0, 2, 3, 10, 20, 5]), np.zeros(6, dtype=bool))
    found = evaluate(np.array([1.0, 3, 2, 17, 9, 5]), lengths)
    assert found["error"] == pytest.approx((0 + 1 + 1 + 7 + 11 + 0) / 6)
    assert found["smape"] == pytest.approx((0 + 2 / 5 + 2 / 5 + 14 / 27 + 22 / 29 + 0) / 6)
    assert (found["within_5"], found["within_10"]) == (pytest.approx(4 / 6), pytest.approx(5 / 6))
    # (2 - 1) / 3 pairs, and one pair the wrong way; the third group has none
    assert found["within"] == pytest.approx((1 / 3 - 1) / 2)
    assert evaluate(np.full(6, 4.0), lengths)["pooled"] == 0.0
    assert Oracle({(0, 0): 5}).predict(Prefixes([[1]], [[7, 8]], [(0, 0)])).tolist() == [3.0]
