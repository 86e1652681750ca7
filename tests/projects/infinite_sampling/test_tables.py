"""The arithmetic of the tables, by hand, and the small policy's task."""

import re
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from projects.infinite_sampling import data, policy
from projects.infinite_sampling.baselines import generate, generate_batch
from projects.infinite_sampling.experiments import common
from projects.infinite_sampling.experiments import policy as policy_experiment
from projects.infinite_sampling.tables import ablation_steps, speeds, trained
from shared import rows
from shared.errors import UserError
from shared.experiment import Run


def test_speeds_are_paired_with_micro_groups_round_by_round():
    rows = []
    for name, steps in (("micro groups", (10, 20)), ("framework (predicted)", (5, 15))):
        for prompt, count in enumerate(steps):
            rows.append(
                {
                    "kind": "rollout",
                    "model": "m",
                    "schedule": name,
                    "prompt": prompt,
                    "steps": count,
                    "lower_bound": 5,
                    "occupancy_share": 0.5,
                }
                | {"reingests": 2, "kv_bytes": 8}
            )
        rate = 1 if name == "micro groups" else 2
        rows += [
            {
                "kind": "time",
                "model": "m",
                "schedule": name,
                "repeat": r,
                "tokens_per_second": rate * (r + 1),
            }
            for r in range(6)
        ]
    found = speeds(pd.DataFrame(rows)).set_index("schedule").loc["framework (predicted)"]
    assert found["mean_steps"] == 10
    assert found["bound_ratio"] == 2
    assert found["micro_ratio"] == pytest.approx((0.5 + 0.75) / 2)
    assert (found["speed_ratio"], found["low_ratio"], found["high_ratio"]) == (2, 2, 2)


def test_steps_are_over_the_lower_bound_in_order_of_what_is_known():
    rows = [
        {
            "kind": "steps",
            "lengths": known,
            "refill": "fifo",
            "prompt": p,
            "steps": steps,
            "lower_bound": 10,
        }
        for known, steps in (("oracle", 11), ("k = 16", 12), ("k = 4", 13), ("none", 14))
        for p in range(2)
    ]
    found = ablation_steps(pd.DataFrame(rows))
    assert list(found.index) == ["none", "k = 4", "k = 16", "oracle"]
    assert found["fifo"].tolist() == pytest.approx([1.4, 1.3, 1.2, 1.1])


def test_steps_of_training_are_compared_with_those_of_trl_one_by_one():
    rows = []
    for mode, factor in (("micro groups", 2.0), ("TRL", 1.0), ("framework", 0.5)):
        for step in range(3):
            row = {
                "kind": "step",
                "dtype": "float32",
                "mode": mode,
                "step": step,
                "same_rewards": mode != "TRL",
                "kv_bytes": 8,
                "steps": 9,
            }
            times = {
                "rollout_seconds": factor * (step + 1),
                "step_seconds": 2 * factor * (step + 1) ** 2,
            }
            rows.append({**row, **times, "mismatch_ratio": 0.1 * step})
        for kind in ("pool", "held out"):
            rows += [
                {
                    "kind": "evaluation",
                    "dtype": "float32",
                    "mode": mode,
                    "step": s,
                    "prompts": kind,
                    "reward_score": s / 4,
                }
                for s in (0, 3)
            ]
        rows.append(
            {
                "kind": "memory",
                "dtype": "float32",
                "mode": mode,
                "rollout_peak_bytes": 7.0,
                "step_peak_bytes": 11.0,
            }
        )
    found = trained(pd.DataFrame(rows)).set_index("mode")
    assert found["trl_ratio"].tolist() == [2.0, 1.0, 0.5]
    assert found["rollout_ratio"].tolist() == [1.0, 2.0, 4.0]  # of micro groups' speed
    assert found["step_seconds"].tolist() == [16.0, 8.0, 4.0]
    assert found["same_rewards"].fillna("its own draws").tolist() == [
        "3 of 3",
        "its own draws",
        "3 of 3",
    ]
    assert found.loc["TRL", "pool"] == "0.00 to 0.75"
    assert found["mismatch_ratio"].tolist() == pytest.approx([0.2] * 3)


def value(chain: str) -> int:
    """12-3+4 -> 13."""
    return sum(map(int, re.findall(r"[+-]?\d+", chain)))


def test_solutions_are_right_and_rewarded():
    rng = np.random.default_rng(0)
    for _ in range(100):
        terms = data.problem(rng)
        prompt = data.prompt_of(terms)
        assert value(prompt[:-1]) == sum(terms)
        for style in data.STYLES:
            text = data.solution(terms, style)
            assert len(text) < data.LIMIT
            assert set(prompt + text) <= set(data.ALPHABET)
            for part in text.lstrip("?").rpartition("#")[0].split(","):
                if part:
                    left, right = part.split("=")
                    assert value(left) == int(right)
            assert data.reward([prompt], [text]) == [1.0]
            assert data.reward([prompt], [text + "0"]) == [0.0]
    assert data.reward(["9-3:", "9-3:", "1-2:"], ["6", "#-6", "?#-1"]) == [0.0, 0.0, 1.0]
    assert len(set(data.problems(50, 1))) == 50
    assert len(set(data.problems(6, 0, largest=1))) == 6
    with pytest.raises(UserError, match="operands up to 1 make 6 problems, not 7"):
        data.problems(7, 0, largest=1)


RECIPE = {"layers": 1, "hidden": 16, "heads": 2, "steps": 3, "rows": 4, "lr": 1e-3, "largest": 9}


def test_the_policy_that_others_use_is_the_one_that_was_trained(tmp_path):
    weights, loss = policy.train(policy.Recipe(**RECIPE, seed=0))
    assert 0 < loss < 5
    run = Run(quiet=True)
    policy_experiment.run(policy_experiment.Config(**RECIPE, test_prompts=5), run)
    (row,) = run.rows
    assert row["final_loss"] == loss
    assert row["parameters"] == sum(weight.numel() for weight in weights.values())
    assert 0 <= row["right_share"] <= 1
    path = rows.rows_path(tmp_path, "smoke", "infinite_sampling", "policy")
    about = {"paper": "infinite_sampling", "experiment": "policy", "scale": "smoke"}
    content = {**about, "config": {}, "seed": 0, "provenance": {}, "rows": run.rows}
    rows.write_rows(path, content, {}, run.tensors)
    used = Run(quiet=True, used={"policy": path})
    subject = common.subject("policy", 2, 0, limit=4, run=used)
    model, tokenizer = subject.model, subject.tokenizer
    assert not model.training
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    ids = tokenizer("9+7-3:")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode([*ids, 0], skip_special_tokens=True) == "9+7-3:"


def test_peers_sample_whole_groups(llama):
    for lengths in (
        generate(llama, [3, 1, 4], 5, 2, 10, 0),
        generate_batch(llama.float(), [3, 1, 4], 5, 2, 10, 0),
    ):
        assert len(lengths) == 5
        assert all(1 <= n <= 10 for n in lengths)
    llama.double()


def test_the_meter_tells_a_rollout_from_the_rest():
    meter = common.Meter("cpu")

    def work(marked: bool) -> str:
        with meter.rollout() if marked else nullcontext():
            torch.empty(10_000, dtype=torch.uint8)
        torch.empty(50_000, dtype=torch.uint8)
        return "done"

    assert meter.peaks(lambda: work(True)) == ("done", 50_000, 10_000, "allocator")
    assert meter.peaks(lambda: work(False)) == ("done", 50_000, None, "allocator")


def test_a_scale_that_needs_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU"):
        common.subject("policy", 1, 0, limit=4, run=Run(quiet=True), device="cuda")
    with pytest.raises(UserError, match="hf download"):
        common.subject("nobody/nothing", 1, 0, limit=4, run=Run(quiet=True))
