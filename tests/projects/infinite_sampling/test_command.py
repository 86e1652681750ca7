"""The commands on a small model of the user's: what they write, how they go on, what they refuse in
one line.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from projects.infinite_sampling import command
from projects.infinite_sampling import train as training
from projects.infinite_sampling.grpo import Batch, token_logprobs
from projects.infinite_sampling.predictor import HiddenRidge
from shared.commands.log import Log
from shared.errors import UserError
from shared.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tokenizer):
    """A model with a token per byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tmp_path_factory.mktemp("model")
    tokenizer = save_tokenizer(made)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **shape,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(made)
    return made


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "ab", "want": "x"}\n{"prompt": "hello", "want": "y"}\n{"messages": [{"role":'
        ' "user", "content": "c"}], "want": "z"}\n'
    )
    (tmp_path / "myrewards.py").write_text(
        "import math\ndef length(prompts, completions, want):\n    assert len(want) =="
        " len(prompts)\n    return [len(c) / 10 for c in completions]\ndef raises(prompts,"
        " completions, **columns):\n    raise KeyError('answer')\ndef nan(prompts, completions,"
        " **columns):\n    return [1.0] * (len(prompts) - 1) + [math.nan]\ndef few(prompts,"
        " completions, **columns):\n    return [1.0]\ndef words(prompts, completions, **columns):\n"
        "    return ['good'] * len(prompts)\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("myrewards", None)
    return tmp_path


def sample(folder, *more, out="out", prompts="p.jsonl"):
    return command.main(
        [
            "sample",
            "--model",
            str(folder),
            "--prompts",
            prompts,
            "--out",
            out,
            "--group",
            "5",
            "--slots",
            "2",
            "--max-new-tokens",
            "8",
            *more,
        ]
    )


def train(folder, *more, out="tuned", reward="myrewards.py:length"):
    base = [
        "train",
        "--model",
        str(folder),
        "--prompts",
        "p.jsonl",
        "--out",
        out,
        "--reward",
        reward,
        "--group",
        "4",
        "--slots",
        "2",
    ]
    return command.main(
        [*base, "--max-new-tokens", "6", "--predictor", "constant", "--lr", "0.01", *more]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def key(line):
    return line["prompt_index"], line["index"]


def test_completions_are_written_whatever_the_schedule(folder, files):
    assert sample(folder, "--predictor", "none") == 0
    first = sorted(lines(files / "out" / "completions.jsonl"), key=key)
    assert [key(line) for line in first] == [(p, i) for p in range(3) for i in range(5)]
    assert first[0]["prompt"] == "ab"
    assert first[10]["prompt"] == "<user>c<end><assistant>"
    assert all(0 < len(line["tokens"]) == len(line["logprobs"]) <= 8 for line in first)
    assert {line["finish"] for line in first} <= {"eos", "length"}
    others = [
        (), ("--mode", "micro"), ("--mode", "full"), ("--page", "4", "--prefix", "2"),
        ("--mode", "continuous", "--predictor", "constant", "--prompts-at-once", "3"),
        ("--mode", "continuous", "--predictor", "ridge", "--prefix", "2"), ("--predictor", "ridge"),
    ]  # fmt: skip
    tokens = []
    for number, options in enumerate(others):
        assert sample(folder, "--dtype", "float64", *options, out=f"out{number}") == 0
        found = sorted(lines(files / f"out{number}" / "completions.jsonl"), key=key)
        tokens.append([line["tokens"] for line in found])
    assert all(one == tokens[0] for one in tokens)


def test_sampling_goes_on_where_it_was_cut(folder, files, capsys):
    assert sample(folder) == 0
    path = files / "out" / "completions.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:6]) + whole[6][:20])  # a crash in the midst of a line
    assert sample(folder) == 0
    assert "6 of 15" in capsys.readouterr().out
    for now, before in zip(
        sorted(lines(path), key=key), sorted(map(json.loads, whole), key=key), strict=True
    ):  # beside other rows the last bit of a number may be another
        assert now.pop("logprobs") == pytest.approx(before.pop("logprobs"), abs=1e-5)
        assert now == before
    assert sample(folder) == 0
    assert len(lines(path)) == 15
    assert sample(folder, "--seed", "1") == 2
    assert "--seed 0, not 1" in capsys.readouterr().err
    assert sample(folder, "--mode", "micro") == 0  # a schedule may change


def test_training_goes_on_as_if_it_had_not_been_stopped(folder, files, monkeypatch):
    assert train(folder, "--steps", "4", out="whole") == 0
    save = training.save_checkpoint

    def crash(path, parameters, optimizer, state):
        save(path, parameters, optimizer, state)
        if state["steps"] == 2:
            raise KeyboardInterrupt  # as a power cut

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", crash)
        assert train(folder, "--steps", "4", out="cut") == 130
    with open(files / "cut" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "rewa')
    assert train(folder, "--steps", "4", out="cut") == 0
    assert lines(files / "cut" / "log.jsonl") == lines(files / "whole" / "log.jsonl")
    assert (files / "cut" / "model.safetensors").read_bytes() == (
        files / "whole" / "model.safetensors"
    ).read_bytes()
    log = lines(files / "whole" / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    # a pass over the prompts
    assert sorted(p for line in log[:3] for p in line["prompts"]) == [0, 1, 2]
    assert all(line["mismatch"] < 1e-4 for line in log)
    from transformers import AutoModelForCausalLM

    before, after = (
        AutoModelForCausalLM.from_pretrained(f, local_files_only=True).state_dict()
        for f in (folder, files / "whole")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_what_does_not_change_the_result_may_change_and_the_rest_may_not(folder, files, capsys):
    assert train(folder, "--steps", "1") == 0
    assert train(folder, "--steps", "2", "--mode", "micro", "--micro-batch", "3") == 0
    assert train(folder, "--steps", "3", "--clip", "0.3") == 2
    assert "--clip 0.2, not 0.3" in capsys.readouterr().err
    assert train(folder, "--steps", "1") == 2
    assert "may only grow" in capsys.readouterr().err


def test_a_run_holds_on_to_its_reward_function(folder, files, capsys):
    assert train(folder, "--steps", "1") == 0
    (files / "other.py").write_text((files / "myrewards.py").read_text())
    # the same function by another way
    assert train(folder, "--steps", "2", reward="myrewards:length") == 0
    assert train(folder, "--steps", "3", reward="other.py:length") == 0
    with open(files / "myrewards.py", "a") as file:
        file.write("\ndef twice(prompts, completions, want):\n    return [2.0] * len(want)\n")
    capsys.readouterr()
    assert train(folder, "--steps", "4") == 2
    assert "holds a run with another --reward" in capsys.readouterr().err
    assert train(folder, "--steps", "4", reward="other.py:few") == 2
    assert "holds a run with another --reward" in capsys.readouterr().err


def test_a_run_holds_on_to_what_ends_a_completion_and_to_the_chat_template(folder, files, capsys):
    changed = files / "changed"
    shutil.copytree(folder, changed)
    assert sample(changed) == 0
    settings = changed / "generation_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps({**json.loads(before), "eos_token_id": [0, 5]}))
    assert sample(changed) == 2
    assert "holds a run with another --model" in capsys.readouterr().err
    settings.write_text(before)
    (changed / "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
    assert sample(changed) == 2
    assert "holds a run with another --prompts" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "train"])
def test_a_corrected_command_works_in_the_same_folder(folder, files, capsys, command):
    (files / "out").mkdir()
    (files / "tuned").mkdir()
    call = sample if command == "sample" else train
    assert call(folder, "--max-new-tokens", "63") == 2
    assert "is more than the 64 positions of the model (llama)" in capsys.readouterr().err
    assert call(folder, "--seed", "1") == 0


def test_a_model_that_is_not_finite_is_not_saved(folder, files, monkeypatch, capsys):
    step = training.Training.step

    def broken(self, number):
        line = step(self, number)
        with torch.no_grad():
            next(iter(self.parameters.values())).view(-1)[0] = float("nan")
        return line

    monkeypatch.setattr(training.Training, "step", broken)
    assert train(folder, "--steps", "1") == 2
    assert "the trained model: " in capsys.readouterr().err
    assert not list((files / "tuned").glob("model*"))


def test_adapters_a_reference_and_several_updates(folder, files):
    assert (
        train(
            folder,
            "--steps",
            "2",
            "--lora-rank",
            "2",
            "--beta",
            "0.1",
            "--updates",
            "2",
            "--loss",
            "dapo",
            "--prompts-per-step",
            "2",
        )
        == 0
    )
    assert (files / "tuned" / "adapter_config.json").is_file()
    from safetensors.torch import load_file

    adapters = load_file(files / "tuned" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)
    assert train(folder, "--steps", "1", "--beta", "0.1", "--loss", "dr_grpo", out="full") == 0


def start(folder, files, *more, logged=2):
    """`train` in a process of its own, which would go on for a long time; comes back when it has
    logged as many steps.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        "train",
        "--model",
        str(folder),
        "--prompts",
        "p.jsonl",
        "--out",
        "t",
        "--reward",
        "myrewards.py:length",
        "--group",
        "4",
    ]
    command += [
        "--slots",
        "2",
        "--max-new-tokens",
        "6",
        "--predictor",
        "constant",
        "--lr",
        "0.01",
        "--steps",
        "100000",
        *more,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "projects.infinite_sampling", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = files / "t" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= logged):
        assert process.poll() is None
        time.sleep(0.05)
    return process, log


def test_a_kill_at_any_moment_leads_to_the_same_bytes(folder, files, monkeypatch):
    """One run is photographed at every moment at which its folder changes, and the command takes up
    each photograph as if the run had died there.
    """
    out, taken = files / "whole", {}

    def content_of(folder):
        return {
            str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
        }

    def photograph():
        state = tuple(sorted(content_of(out).items()))
        if state not in taken:
            taken[state] = files / "album" / str(len(taken))
            shutil.copytree(out, taken[state])

    def watched(original):
        def call(*args, **kwargs):
            photograph()
            done = original(*args, **kwargs)
            photograph()
            return done

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Log, "write")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        assert train(folder, "--steps", "2", out="whole") == 0
    assert len(taken) > 12
    for state in taken.values():
        assert train(folder, "--steps", "2", out=str(state)) == 0
        assert content_of(state) == content_of(out), state


def test_a_signal_ends_in_good_order(folder, files):
    process, _ = start(folder, files)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in error


def test_a_crash_loses_the_step_under_way_at_most(folder, files):
    process, log = start(folder, files)
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    logged = log.read_text().count("\n")
    # in a process of its own as well: here the user's code is this file, too
    again, _ = start(folder, files, "--steps", str(logged + 2), logged=logged)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    (kept,) = re.findall(r"going on after step (\d+) of", said)
    assert int(kept) >= logged - 1  # a step is logged, then kept: the one between is made again
    assert train(folder, "--steps", str(logged + 2), out="whole") == 0
    assert lines(log) == lines(files / "whole" / "log.jsonl")
    assert (files / "t" / "model.safetensors").read_bytes() == (
        files / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_stop_string_ends_a_completion(folder, files):
    assert (
        sample(folder, "--group", "20", "--max-new-tokens", "20", "--stop", "a", "--stop", "}7")
        == 0
    )
    found = lines(files / "out" / "completions.jsonl")
    stopped = [line for line in found if line["finish"] == "stop"]
    assert stopped
    assert all(line["completion"].endswith(("a", "}7")) for line in stopped)
    assert all("a" not in line["completion"] for line in found if line["finish"] != "stop")
    assert train(folder, "--steps", "1", "--stop", "a") == 0


def test_progress_says_how_busy_slots_are_and_training_how_well_sampling_agrees(
    folder, files, capsys
):
    assert sample(folder) == 0
    out = capsys.readouterr().out
    assert re.search(r"step 15/15 .*slots \d+% busy, step \d+", out)
    assert re.search(
        r"15 completions in .*; \d+ tokens in \d+ steps, slots \d+% busy, [\d.]+ kB of keys and"
        r" values",
        out,
    )
    assert train(folder, "--steps", "2") == 0
    out = capsys.readouterr().out
    assert re.search(r"step 2/2 .*reward [\d.]+, length \d+, slots \d+% busy", out)
    largest = max(line["mismatch"] for line in lines(files / "tuned" / "log.jsonl"))
    assert 0 < largest < 1e-4
    assert f"differed by {largest:.1e} at the most" in out


def test_the_predictor_is_fitted_again_as_the_policy_learns(folder, files, monkeypatch):
    fitted = []

    def fit(self, known, of=HiddenRidge.fit):
        fitted.append(sorted({len(prompt) for prompt in known.prefixes.prompts}))
        of(self, known)

    monkeypatch.setattr(HiddenRidge, "fit", fit)
    assert train(folder, "--steps", "11", "--predictor", "ridge", "--prefix", "1") == 0
    assert len(fitted) == 2  # after the first rollout, and after the tenth
    assert len(fitted[0]) == 1
    assert len(fitted[1]) == 3  # by then of all three prompts


def test_another_stop_string_is_another_run(folder, files, capsys):
    assert sample(folder, "--stop", "a") == 0
    assert train(folder, "--steps", "1", "--stop", "a") == 0
    capsys.readouterr()
    assert sample(folder, "--stop", "b") == 2
    assert "--stop" in capsys.readouterr().err
    assert train(folder, "--steps", "2") == 2
    assert "--stop" in capsys.readouterr().err


def test_another_part_of_the_distribution_is_another_run(folder, files, capsys):
    assert sample(folder, "--top-p", "0.5", "--top-k", "3") == 0
    assert sample(folder, "--top-p", "0.6", "--top-k", "3") == 2
    assert "--top-p 0.5, not 0.6" in capsys.readouterr().err
    assert sample(folder, "--top-k", "1", out="likeliest") == 0
    found = lines(files / "likeliest" / "completions.jsonl")
    assert len({tuple(line["tokens"]) for line in found}) == 3  # one for each prompt
    assert train(folder, "--steps", "1", "--top-p", "0.5") == 0


def training_of(folder, files, monkeypatch, *more):
    """What a call of `train` works with, after it is done."""
    made = []
    init = training.Training.__init__

    def watched(self, *args):
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(training.Training, "__init__", watched)
    assert train(folder, *more) == 0
    return made[0]


@pytest.mark.parametrize("adapters", [(), ("--lora-rank", "2")])
def test_the_reference_is_the_model_that_training_began_with(folder, files, monkeypatch, adapters):
    from shared.models import load_causal_lm

    made = training_of(folder, files, monkeypatch, "--steps", "2", "--beta", "0.1", *adapters)
    batch = Batch(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1))
    start, _ = load_causal_lm(folder, torch.float32)
    with torch.no_grad():
        wanted, now = token_logprobs(start, batch), token_logprobs(made.model, batch)
    assert torch.allclose(made.reference(batch), wanted, atol=1e-6)
    assert not torch.allclose(now, wanted, atol=1e-4)


def test_the_gradient_of_a_step_is_no_longer_than_it_may_be(folder, files, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        parts = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack(parts).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for dtype in ("float32", "bfloat16"):
        norms.clear()
        more = ("--dtype", dtype, "--max-grad-norm", "1e-3")
        assert train(folder, "--steps", "3", *more, out=dtype) == 0
        logged = [line["gradient_norm"] for line in lines(files / dtype / "log.jsonl")]
        assert max(logged) > 1e-2
        assert len(norms) == 3
        assert max(norms) <= 1.001e-3


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
def test_advantages_are_over_the_deviation_but_for_dr_grpo(folder, files, monkeypatch, loss):
    handed = []
    backward = training.grpo.backward

    def watched(*args, **kwargs):
        handed.append(args[3])
        return backward(*args, **kwargs)

    monkeypatch.setattr(training.grpo, "backward", watched)
    (files / "spread.py").write_text(
        "def spread(prompts, completions, **columns):\n"
        "    return [sum(map(ord, c)) % 7 for c in completions]\n"
    )
    assert train(folder, "--steps", "1", "--loss", loss, reward="spread.py:spread") == 0
    (line,) = lines(files / "tuned" / "log.jsonl")
    rewards = np.array(line["rewards"])
    assert rewards.std() > 0.01
    wanted = rewards - rewards.mean()
    if loss == "grpo":
        wanted /= rewards.std(ddof=1) + 1e-4
    assert handed[0].tolist() == pytest.approx(wanted.tolist())


def test_later_updates_on_a_rollout_are_of_another_policy(folder, files):
    """Whose ratios are clipped: were they 1, none would be."""
    more = ("--steps", "3", "--lr", "0.05", "--clip", "0.05")
    assert train(folder, *more, "--updates", "3", out="three") == 0
    assert train(folder, *more, out="one") == 0
    assert max(line["clipped"] for line in lines(files / "three" / "log.jsonl")) > 0
    assert max(line["clipped"] for line in lines(files / "one" / "log.jsonl")) == 0


def test_small_steps_are_not_lost_in_bfloat16(folder, files):
    from safetensors.torch import load_file

    more = ("--dtype", "bfloat16", "--lr", "1e-6", "--checkpoint-every", "1")
    assert train(folder, "--steps", "3", *more) == 0
    kept = load_file(files / "tuned" / "checkpoint.safetensors")
    start = load_file(folder / "model.safetensors")
    moved = same = 0
    for name, before in start.items():
        after = kept[f"model.{name}"]
        assert after.dtype == torch.float32
        if kept[f"optimizer.exp_avg.{name}"].any():
            used = kept[f"optimizer.exp_avg.{name}"] != 0
            moved += int((after != before.bfloat16().float())[used].sum())
            same += int((after == before.bfloat16().float())[used].sum())
    assert moved > 0.95 * (moved + same) > 100
    saved = load_file(files / "tuned" / "model.safetensors")
    for name, weight in saved.items():  # what is saved is the trained weights, rounded
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, kept[f"model.{name}"].bfloat16())
    assert train(folder, "--steps", "5", *more) == 0
    assert train(folder, "--steps", "5", *more, out="whole") == 0
    assert lines(files / "tuned" / "log.jsonl") == lines(files / "whole" / "log.jsonl")


@pytest.mark.parametrize("command", ["sample", "train"])
def test_a_model_that_would_be_driven_wrongly_is_one_line(
    tmp_path, files, save_tokenizer, capsys, command
):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    local = tmp_path / "local"
    tokenizer = save_tokenizer(local)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_layers=2, num_heads=2, window_size=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(local)
    capsys.readouterr()
    assert (sample if command == "sample" else train)(local) == 2
    assert "GPTNeoForCausalLM" in (error := capsys.readouterr().err.splitlines()[-1])
    assert "rows that stand at different positions" in error
    assert not (files / ("out" if command == "sample" else "tuned") / "run.json").exists()


@pytest.mark.parametrize("command", ["sample", "train"])
@pytest.mark.parametrize("fault", ["nan", "missing"])
def test_broken_weights_are_one_line_and_nothing_is_sampled(folder, files, capsys, command, fault):
    from safetensors.torch import load_file, save_file

    broken = files / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(key for key in weights if "o_proj" in key)
    if fault == "nan":
        weights[name][0, 0] = float("nan")
    else:
        del weights[name]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert (sample if command == "sample" else train)(broken) == 2
    assert name in capsys.readouterr().err
    assert not list(files.glob("*/*.jsonl"))


def test_reward_functions_are_told_apart_by_what_is_bound_to_them(files):
    module = files / "bound.py"
    module.write_text(
        "from functools import partial\n"
        "def score(prompts, completions, scale, **columns):\n"
        "    return [scale * len(c) for c in completions]\n"
        "one, two = partial(score, scale=1), partial(score, scale=2)\n"
        "same = partial(score, scale=1)\n"
        "odd = partial(score, scale=object())\n"
        "class Scorer:\n"
        "    def __init__(self, scale):\n        self.scale = scale\n"
        "    def __call__(self, prompts, completions, **columns):\n"
        "        return [0.0] * len(prompts)\n"
        "first, second = Scorer(1), Scorer(2)\n"
    )
    from shared.commands.inputs import user_module

    def digest_of(name):
        return training.reward_digest(
            "bound.py:reward", user_module(f"bound.py:{name}", "--reward")
        )

    assert digest_of("one") == digest_of("same") != digest_of("two")
    assert digest_of("first") != digest_of("second")
    with pytest.raises(UserError, match="cannot be told apart"):
        digest_of("odd")


@pytest.mark.parametrize("command", ["sample", "train"])
def test_a_model_without_a_cache_is_one_line(tmp_path, files, save_tokenizer, capsys, command):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    uncached = tmp_path / "uncached"
    tokenizer = save_tokenizer(uncached)
    shape = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
        "attn_implementation": "eager",
    }
    OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(
        uncached
    )
    capsys.readouterr()
    assert (sample if command == "sample" else train)(uncached) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "fills no key-value cache" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-new-tokens", "63"], "is more than the 64 positions"),
        (
            ["--mode", "dynamic", "--budget-tokens", "9", "--page", "4", "--prefix", "1"],
            "too small for one row",
        ),
        (["--mode", "dynamic", "--refill", "plan_sjf"], "no planned queues"),
        (["--refill", "lpt_global"], "name a --predictor"),
        (["--stop", ""], "empty stop string"),
        (["--mode", "continuous", "--slots", "6"], "--slots 6 is more than --group 5"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--fixed-shape", "--mode", "dynamic"], "needs fixed slots"),
        (["--group", "0"], "of at least 1"),
        (["--device", "tpu"], "use cpu or cuda"),
    ],
)
def test_bad_options_of_sample_are_one_line(folder, files, capsys, arguments, said):
    assert sample(folder, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": ""}', "line 1: an empty prompt"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: needs a"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a", "want": NaN}', "line 1: not JSON (NaN"),
        ("[1]", "line 1: a JSON object is wanted"),
        ('{"prompt": "a", "messages": []}', '"prompt" beside "messages"'),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [1]}', '"tools" beside'),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "no system role"),
        ("", "holds no prompts"),
    ],
)
def test_bad_prompts_are_one_line(folder, files, capsys, text, said):
    (files / "bad.jsonl").write_text(text)
    assert sample(folder, prompts="bad.jsonl") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("reward", "arguments", "said"),
    [
        ("myrewards.py:raises", [], "myrewards.py:raises: KeyError"),
        ("myrewards:nan", [], "returned nan for the completion"),
        ("myrewards:few", [], "1 numbers for 4 completions"),
        ("myrewards:words", [], "a list of numbers"),
        ("myrewards:number", [], "number is a int, not a function"),
        ("myrewards:absent", [], "has no absent; it has"),
        ("nowhere:length", [], "there is no module nowhere"),
        ("myrewards", [], "write file.py:function"),
        ("myrewards:length", ["--group", "1", "--slots", "1"], "at least 2"),
        ("myrewards:length", ["--prompts-per-step", "4"], "more than the 3 prompts"),
        ("myrewards:length", ["--temperature", "0"], "nothing to learn"),
        ("myrewards:length", ["--lora-alpha", "4"], "needs --lora-rank"),
    ],
)
def test_bad_rewards_and_options_of_train_are_one_line(
    folder, files, capsys, reward, arguments, said
):
    assert train(folder, "--steps", "1", *arguments, reward=reward) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_text_file_has_a_prompt_a_line(folder, files):
    (files / "p.txt").write_text("ab\ncd\n")
    assert sample(folder, prompts="p.txt", out="t") == 0
    assert {line["prompt"] for line in lines(files / "t" / "completions.jsonl")} == {"ab", "cd"}


def test_help_and_a_wrong_option_load_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom projects.infinite_sampling.command import main\n"
        "assert main(['train', '--nonsense']) == 2\n"
        "try:\n    main(['sample', '--help'])\nexcept SystemExit:\n"
        "    print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert done.stderr.startswith("infinite_sampling: ")


def test_help_shows_an_example(capsys):
    for name in ("sample", "train"):
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
        assert f"python -m projects.infinite_sampling {name} --model" in capsys.readouterr().out
