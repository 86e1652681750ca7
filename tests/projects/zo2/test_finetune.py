"""The command: data, budget, faults, what it saves. Tiny models with random weights stand for the
user's.
"""

import copy
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from projects.zo2 import ZO2, MeZO, budget, weights
from projects.zo2.budget import format_size, parse_size
from projects.zo2.command import main
from projects.zo2.runs import LOG, mean_loss
from projects.zo2.steplog import StepLog, read_log
from projects.zo2.storage import SafetensorsReader, SafetensorsWriter
from shared import meters
from shared.commands.folder import locked
from shared.corpus import IGNORED, Corpus
from shared.errors import UserError


def save_model(
    folder: Path,
    family: str = "llama",
    hidden: int = 32,
    layers: int = 3,
    vocabulary: int = 260,
    tied: bool = True,
) -> Path:
    """A model with random weights."""
    torch.manual_seed(0)
    match family:
        case "llama":
            config = LlamaConfig(
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=2 * hidden,
            )
        case "opt":
            config = OPTConfig(
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                ffn_dim=2 * hidden,
            )
            config.word_embed_proj_dim = hidden
        case "gpt2":
            config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=2)
    config.vocab_size, config.tie_word_embeddings, config.max_position_embeddings = (
        vocabulary,
        tied,
        128,
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path], Any]) -> Path:
    """Models, their tokenizers and data."""
    root = tmp_path_factory.mktemp("zo2")
    for family in ("llama", "opt", "gpt2"):
        save_tokenizer(save_model(root / family, family))
    lines = [{"text": f"line {i} of a text about nothing"} for i in range(40)]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"prompt": f"what is {i} + 1? ", "completion": str(i + 1)} for i in range(20)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(
    folder: Path, out: Path, *more: str, model: str = "llama", data: str = "text.jsonl"
) -> list[str]:
    given = [
        "finetune",
        "--model",
        str(folder / model),
        "--data",
        str(folder / data),
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    return [*given, "--sequence-length", "32", "--lr", "1e-3", *more]


def tune(
    folder: Path, out: Path, *more: str, model: str = "llama", data: str = "text.jsonl"
) -> Path:
    """A run that must end well. Returns the file with what it trained."""
    assert main(arguments(folder, out, *more, model=model, data=data)) == 0
    return next(out.glob("*model.safetensors"))


def weights_of(path: Path) -> dict[str, bytes]:
    reader = SafetensorsReader(path)
    return {
        name: reader.read(name).view(-1).view(torch.uint8).numpy().tobytes()
        for name in reader.names()
    }


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["inplace", "fresh"])
def test_the_saved_model_is_what_mezo_trains(folder: Path, tmp_path: Path, probe: str) -> None:
    schedule = [
        "--lr-schedule",
        "cosine",
        "--warmup-steps",
        "2",
        "--weight-decay",
        "0.1",
        "--accumulate",
        "2",
        "--batch-size",
        "2",
    ]
    tune(folder, tmp_path / "out", "--steps", "8", "--seed", "3", "--probe", probe, *schedule)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids
        == AutoTokenizer.from_pretrained(folder / "llama")("a b").input_ids
    )

    corpus = Corpus(tmp_path / "out" / "data")
    log = read_log(tmp_path / "out" / "steps.jsonl")
    assert log is not None
    rates = [step.lr for step in log.steps]
    assert rates[:3] == [5e-4, 1e-3, 1e-3]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    mezo = MeZO(model, lr=lambda t: rates[t], weight_decay=0.1, loss=mean_loss)
    for step in log.steps:
        found = mezo.step(corpus.step_batches(3, step.number, 2, 2), step.seed)
        if probe == "inplace":
            assert found == (step.loss, step.projected_gradient)
    for (name, expected), value in zip(model.named_parameters(), trained.parameters(), strict=True):
        if probe == "inplace":
            assert torch.equal(expected, value), name
        else:
            torch.testing.assert_close(expected, value, rtol=0, atol=2e-6)


def test_the_loss_is_the_models_own(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    ids = torch.arange(40).view(2, 20)
    labels = ids.clone()
    labels[0, :7] = labels[1, 15:] = IGNORED
    expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(
        mean_loss(model, {"input_ids": ids, "labels": labels}).float(), expected
    )


@pytest.mark.parametrize(
    ("model", "data"), [("llama", "prompts.jsonl"), ("opt", "text.jsonl"), ("gpt2", "text.jsonl")]
)
def test_storage_changes_nothing_and_a_log_is_enough(
    folder: Path, tmp_path: Path, model: str, data: str
) -> None:
    runs = {}
    for storage in ("ram", "disk", "none"):
        more = [
            "--steps",
            "6",
            "--storage",
            storage,
            "--batch-size",
            "2",
            "--eval-data",
            str(folder / "prompts.jsonl"),
            "--eval-every",
            "3",
        ]
        runs[storage] = weights_of(tune(folder, tmp_path / storage, *more, model=model, data=data))
    assert runs["ram"] == runs["disk"] == runs["none"]
    assert runs["ram"] != weights_of(folder / model / "model.safetensors")
    assert {f.name for f in (tmp_path / "disk").iterdir()} & {
        "working.safetensors",
        "checkpoint",
    } == set()
    replayed = [
        "replay",
        "--log",
        str(tmp_path / "ram" / "steps.jsonl"),
        "--model",
        str(folder / model),
        "--out",
        str(tmp_path / "again"),
    ]
    assert main([*replayed, "--storage", "disk"]) == 0
    assert weights_of(tmp_path / "again" / "model.safetensors") == runs["ram"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(loaded[name].numpy().tobytes() == value for name, value in runs["ram"].items())


@pytest.mark.parametrize(
    ("rounding", "probe"),
    [("nearest", "inplace"), ("stochastic", "inplace"), ("stochastic", "fresh")],
)
def test_low_bit_runs_replay_and_go_on_exactly(
    folder: Path, tmp_path: Path, rounding: str, probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [
        "--steps",
        "12",
        "--storage-dtype",
        "bfloat16",
        "--rounding",
        rounding,
        "--checkpoint-every",
        "4",
        "--probe",
        probe,
    ]
    more += ["--eval-data", str(folder / "prompts.jsonl"), "--eval-every", "5"]
    whole = weights_of(tune(folder, tmp_path / "whole", *more))
    crash(monkeypatch, arguments(folder, tmp_path / "parts", *more), after=11)
    assert weights_of(tune(folder, tmp_path / "parts", *more, "--storage", "disk")) == whole
    replayed = [
        "replay",
        "--log",
        str(tmp_path / "parts" / "steps.jsonl"),
        "--model",
        str(folder / "llama"),
        "--out",
        str(tmp_path / "again"),
    ]
    assert main(replayed) == 0
    assert weights_of(tmp_path / "again" / "model.safetensors") == whole


def crash(monkeypatch: pytest.MonkeyPatch, given: list[str], after: int) -> None:
    """Run until `after` steps are in the log, and no further."""
    original = StepLog.step

    class Crash(BaseException):  # which the last net lets through
        pass

    def step(self, *args: object) -> None:
        original(self, *args)
        if len(self.records.steps) == after:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "step", step)
        with pytest.raises(Crash):
            main(given)


def test_in_bfloat16_the_weights_change_by_updates_alone_unless_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of zero there is nothing but the probe that can change them."""
    still = ["--dtype", "bfloat16", "--lr", "0", "--steps", "3"]
    base = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)
    tuned = {}
    for probe in ([], ["--probe", "fresh"], ["--probe", "inplace"]):
        out = tmp_path / "-".join(["out", *probe])
        tune(folder, out, *still, *probe)
        tuned[tuple(probe)] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        said = "perturbing and restoring rounds the weights" in capsys.readouterr().out
        assert said == ("inplace" in probe)
    for probe, model in tuned.items():
        same = [
            torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)
        ]
        assert all(same) != ("inplace" in probe)


def test_lora_trains_an_adapter_that_peft_loads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    more = [
        "--steps",
        "8",
        "--lora-rank",
        "3",
        "--lora-targets",
        "q_proj,v_proj",
        "--checkpoint-every",
        "3",
        "--eps",
        "1e-2",
    ]
    whole = weights_of(tune(folder, tmp_path / "whole", *more))
    crash(monkeypatch, arguments(folder, tmp_path / "parts", *more, "--storage", "disk"), after=5)
    assert weights_of(tune(folder, tmp_path / "parts", *more, "--storage", "disk")) == whole
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    tuned = PeftModel.from_pretrained(base, tmp_path / "parts")
    loaded = {
        name.replace(".default", ""): p for name, p in tuned.named_parameters() if "lora_" in name
    }
    assert {name: p.detach().numpy().tobytes() for name, p in loaded.items()} == whole
    assert all(p.abs().max() > 0 for name, p in loaded.items() if "lora_B" in name)
    assert len(loaded) == 3 * 2 * 2
    merged = tuned.merge_and_unload()
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if re.search(r"\.(q|v)_proj\.", name)}


def test_more_steps_go_on_from_the_finished_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = weights_of(tune(folder, tmp_path / "whole", "--steps", "9"))
    tune(folder, tmp_path / "grown", "--steps", "4")
    grown = tune(folder, tmp_path / "grown", "--steps", "9", "--storage", "disk")
    assert weights_of(grown) == whole
    assert "after step 4: 0 steps are replayed" in capsys.readouterr().out
    written = grown.stat().st_mtime_ns
    tune(folder, tmp_path / "grown", "--steps", "9")
    assert "9 steps already" in capsys.readouterr().out
    assert grown.stat().st_mtime_ns == written


# ---- faults --------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    more = [
        "--steps",
        "150",
        "--checkpoint-every",
        "20",
        "--accumulate",
        "2",
        "--lr-schedule",
        "linear",
        "--warmup-steps",
        "10",
    ]
    blows = {"ram": signal.SIGKILL, "disk": signal.SIGKILL, "none": signal.SIGINT}
    runs = {
        storage: subprocess.Popen(
            [
                sys.executable,
                "-m",
                "projects.zo2",
                *arguments(folder, tmp_path / storage, *more, "--storage", storage),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for storage in blows
    }
    waiting = dict(runs)
    deadline = time.monotonic() + 120
    while waiting and time.monotonic() < deadline:
        for storage, process in list(waiting.items()):
            log = tmp_path / storage / "steps.jsonl"
            if process.poll() is not None or (log.exists() and log.read_bytes().count(b"\n") > 50):
                process.send_signal(blows[storage])
                del waiting[storage]
        time.sleep(0.005)
    ended = {
        storage: (*process.communicate(), process.returncode) for storage, process in runs.items()
    }
    assert not waiting
    assert ended["ram"][2] == ended["disk"][2] == -signal.SIGKILL, ended
    assert ended["none"][2] == 130, ended
    assert re.fullmatch(
        r"zo2: stopped after step \d+ of 150; the same command goes on from there\n",
        ended["none"][1],
    )
    whole = weights_of(tune(folder, tmp_path / "whole", *more))
    for storage in blows:
        assert not (tmp_path / storage / "model.safetensors").exists()
        assert (
            weights.saved_steps(tmp_path / storage / "checkpoint" / "weights.safetensors") or 0
        ) >= 40
        assert weights_of(tune(folder, tmp_path / storage, *more, "--storage", storage)) == whole, (
            storage
        )


def test_what_a_crash_leaves_half_written_is_swept_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--steps", "9", "--checkpoint-every", "3", "--storage", "disk"]
    whole = weights_of(tune(folder, tmp_path / "whole", *more))
    out = tmp_path / "parts"
    crash(monkeypatch, arguments(folder, out, *more), after=7)
    (out / "checkpoint" / ".weights.safetensors.1.part").write_bytes(b"half")
    (out / ".data.part").mkdir()
    (out / "working.safetensors").write_bytes(b"nonsense")
    with open(out / "steps.jsonl", "ab") as log:
        log.write(b'{"event":"step","step":7,"se')
    assert weights_of(tune(folder, out, *more)) == whole
    assert not list(out.rglob(".*.part"))


def test_a_checkpoint_that_is_interrupted_leaves_the_last_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--steps", "9", "--checkpoint-every", "3"]
    original = SafetensorsWriter.write

    def write(self: SafetensorsWriter, tensor: torch.Tensor) -> None:
        original(self, tensor)
        if weights.saved_steps(self.path) == 3 and len(self.left) == 5:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", write)
        assert main(arguments(folder, out, *more)) == 130
    assert weights.saved_steps(out / "checkpoint" / "weights.safetensors") == 3
    assert weights_of(tune(folder, out, *more)) == weights_of(
        tune(folder, tmp_path / "whole", *more)
    )


def test_a_full_disk_is_one_line_and_the_checkpoint_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    out.mkdir()
    room = (folder / "llama" / "model.safetensors").stat().st_size * 3 // 2 + 90_000
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(out)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    more = ["--steps", "9", "--checkpoint-every", "3"]
    try:
        assert main(arguments(folder, out, *more)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no space left" in error
        assert weights.saved_steps(out / "checkpoint" / "weights.safetensors") == 3
        assert not list(out.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(out)], check=True)
        assert weights_of(tune(folder, out, *more)) == weights_of(
            tune(folder, tmp_path / "whole", *more)
        )
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_losses_that_are_not_finite_are_skipped_and_many_end_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--lr", "3e38", "--steps", "60"]
    assert main(arguments(folder, tmp_path / "out", *more)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "not finite in 20 steps in a row" in captured.err
    assert captured.out.count("the step is skipped") == 20
    log = read_log(tmp_path / "out" / "steps.jsonl")
    assert log is not None
    assert [step.skipped for step in log.steps[-20:]] == [True] * 20
    assert not log.steps[0].skipped
    assert main(arguments(folder, tmp_path / "out", *more)) == 2  # the same again, at once
    assert len(read_log(tmp_path / "out" / "steps.jsonl").steps) == len(log.steps)  # type: ignore[union-attr]


def test_weights_that_are_not_finite_are_never_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one step there is no loss after it that would tell."""
    for more in (
        ["--lr", "3e38", "--weight-decay", "3e38"],
        ["--lr", "3e38", "--weight-decay", "3e38", "--lora-rank", "2"],
        ["--eps", "3e38"],
    ):
        out = tmp_path / "-".join(more)
        said = "not finite in 1 steps" if "--eps" in more else "the trained model: "
        refused(arguments(folder, out, "--steps", "1", *more), said, capsys)
        assert {path.name for path in out.iterdir()} <= {LOG, "data", ".lock"}


def test_a_base_model_that_is_not_finite_is_not_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder / "llama", broken)
    file = broken / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    given = arguments(folder, tmp_path / "out", model=str(broken))
    refused(given, "holds NaN or infinity", capsys)
    assert not list(tmp_path.glob("out/*model.safetensors"))


def test_a_run_does_not_end_in_a_loss_that_is_not_finite(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    refused(
        arguments(folder, out, "--lr", "3e38", "--steps", "3"),
        "not finite in 2 steps in a row",
        capsys,
    )
    assert not (out / "model.safetensors").exists()


def test_a_run_without_a_step_binds_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the log's header and its first step; then another command."""
    out = tmp_path / "out"
    more = ["--steps", "3", "--eval-data", str(folder / "prompts.jsonl")]

    class Killed(BaseException):
        pass

    def step(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("projects.zo2.engine.ZO2.step", step)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # nobody tidies after a kill
        with pytest.raises(Killed):
            main(arguments(folder, out, *more, "--seed", "1"))
    assert (out / "steps.jsonl").read_bytes().count(b"\n") == 3  # header, flush, evaluation
    tune(folder, out, *more, "--seed", "2")
    tune(folder, tmp_path / "whole", *more, "--seed", "2")
    assert (out / "steps.jsonl").read_bytes() == (tmp_path / "whole" / "steps.jsonl").read_bytes()


# ---- memory --------------------------------------------------------------------------------------

BUDGET_SCRIPT = """
import os, re, resource, sys, contextlib, io
import projects.zo2.finetune
from projects.zo2 import budget
from projects.zo2.command import main
from shared.models import load_causal_lm
model, data, out = sys.argv[1:]
def run(size, out, *more):
    given = ["finetune", "--model", model, "--data", data, "--out", out]
    given += ["--steps", "2", "--sequence-length", "32", "--threads", "1"]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main([*given, "--memory-budget", size, *more])
    return status, errors.getvalue()
status, error = run("100MB", out)
assert status == 2 and error.count(chr(10)) == 1, error
size = re.search(r"needs --memory-budget ([0-9]+MB)", error)[1]
assert not os.path.exists(out)
child = os.fork()
if child == 0:
    resource.setrlimit(resource.RLIMIT_DATA, (budget.parse_size(size), -1))
    try:
        loaded, _ = load_causal_lm(model)
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
    except (MemoryError, RuntimeError, OSError):
        os._exit(3)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3, "plain loading fits too"
status, error = run(size, out)
assert status == 0, error
assert resource.getrlimit(resource.RLIMIT_DATA)[0] == -1
tight = "%dMB" % (budget.memory("VmData") // 10**6 + 1)
status, error = run(tight, out + "-ram", "--storage", "ram")
assert status == 2 and "less with --storage disk" in error, error
plan = budget.make_plan
budget.make_plan = lambda model, work, size: plan(model, work, None)
status, error = run("%dMB" % (budget.memory("VmData") // 10**6 + 10), out + "-tight")
assert status == 2 and error.count(chr(10)) == 1 and "larger --memory-budget" in error, error
print("fits", size)
"""


def test_the_budget_is_kept_and_kills_plain_loading(
    folder: Path, tmp_path: Path, save_tokenizer: Callable[[Path], Any]
) -> None:
    model = save_model(tmp_path / "large", hidden=512, layers=20)
    save_tokenizer(model)
    given = [
        sys.executable,
        "-c",
        BUDGET_SCRIPT,
        str(model),
        str(folder / "text.jsonl"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        given,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    size = parse_size(re.search(r"fits (\d+MB)", done.stdout)[1])  # type: ignore[index]
    peak = parse_size(re.search(r"peak memory (\S+ \S+) allocated", done.stdout)[1])  # type: ignore[index]
    assert 0.8 * size < peak <= size  # the plan is neither broken nor idle talk
    assert "blocks on disk, 1 visiting at a time" in done.stdout


def test_a_plan_takes_what_the_budget_allows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "memory", lambda key: 10**8)
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, vocab_size=1000
            )
        )
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4

    def plan(nbytes: int | None, storage: str = "disk", probe: str = "inplace") -> budget.Plan:
        return budget.make_plan(
            model, budget.Workload(2, 1, 64, probe, storage, None, torch.device("cpu"), 1), nbytes
        )

    fastest = plan(None)
    assert (fastest.slots, fastest.cache_noise) == (3, True)
    assert fastest.parts["slots"] == 3 * block
    assert fastest.parts["resident weights"] == 4 * (2 * 1000 * 1024 + 1024)
    assert fastest.parts["shared weights"] == 0  # this model is not tied
    found = [plan(fastest.total - n * block) for n in range(4)]
    assert [(p.slots, p.cache_noise) for p in found] == [
        (3, True),
        (2, True),
        (1, True),
        (1, False),
    ]
    assert all(p.total <= fastest.total - n * block for n, p in enumerate(found))
    with pytest.raises(UserError, match="is too small: this run needs --memory-budget"):
        plan(fastest.total - 4 * block)
    assert plan(None, probe="fresh").total > fastest.total + block
    assert plan(None, "ram").parts["stored blocks"] == 4 * block
    assert plan(None, "none").parts["model"] == fastest.parts["resident weights"] + 4 * block


@pytest.mark.parametrize("probe", ["inplace", "fresh"])
def test_a_plan_counts_the_forwards_that_wait_between_the_blocks(probe: str) -> None:
    """What more micro-batches take in a step, byte by byte, and what the plan says they do."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=16,
        )
    ).eval()
    taken, planned = [], []
    for accumulate in (1, 8):
        work = budget.Workload(4, accumulate, 64, probe, "ram", None, torch.device("cpu"), 1)
        parts = budget.make_plan(model, work, None).parts
        planned.append(parts["activations"] + parts["logits"])
        ids = torch.zeros(4, 64, dtype=torch.int64)
        engine = None
        gc.collect()  # what goes while bytes are counted would be taken off
        with meters.live_bytes() as meter:
            engine = ZO2(copy.deepcopy(model), probe=probe, loss=mean_loss)
            with meter.phase("step"):
                engine.step([{"input_ids": ids, "labels": ids}] * accumulate)
            engine.close()
        taken.append(meter.peak_bytes("step"))
    more = taken[1] - taken[0]
    assert more > 14 * ids.numel() * 512 * 4 * 0.9  # 14 more hidden states
    assert more <= planned[1] - planned[0] <= 3 * more


def test_sizes() -> None:
    assert [parse_size(text) for text in ("2GB", "1500MB", "1.5GiB", "3 k", "7", ".5G", "2gb")] == [
        2 * 10**9, 15 * 10**8, 3 * 2**29, 3000, 7, 5 * 10**8, 2 * 10**9,
    ]  # fmt: skip
    for text in ("", "GB", "-1GB", "2 cats", "0", "1e9"):
        with pytest.raises(UserError, match="is no size"):
            parse_size(text)
    assert format_size(1_500_000_000) == "1.50 GB"
    assert format_size(1_500_000) == "2 MB"


# ---- bad input -----------------------------------------------------------------------------------


def test_a_bad_line_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused(
        arguments(folder, tmp_path / "out", "--data", str(tmp_path / "bad.jsonl")),
        "bad.jsonl, line 2: not JSON",
        capsys,
    )
    assert not (tmp_path / "out").exists()


OPTIONS = [
    (["--lr", "-1"], "--lr: '-1' is not a number of at least 0"),
    (["--lr", "inf"], "--lr"),
    (["--eps", "0"], "--eps: '0' is not a number above 0"),
    (["--steps", "0"], "--steps"),
    (["--batch-size", "1.5"], "not an integer"),
    (["--probe", "both"], "--probe"),
    (["--memory-budget", "lots"], "'lots' is no size"),
    (["--memory-budget", "1MB"], "this run needs --memory-budget"),
    (["--model", "nowhere/at-all"], "nowhere/at-all"),
    (["--data", "missing.jsonl"], "missing.jsonl: No such file"),
    (["--data", "pyproject.toml"], "name a .jsonl or a .txt file"),
    (["--eval-data", "missing.jsonl"], "missing.jsonl: No such file"),
    (["--device", "tpu"], "--device tpu"),
    (["--storage", "none", "--storage-dtype", "bfloat16"], "--storage-dtype needs"),
    (["--rounding", "stochastic"], "--rounding stochastic needs"),
    (["--lora-alpha", "4"], "need --lora-rank"),
    (["--lora-rank", "2", "--lora-targets", "q_poj"], "q_poj"),
    (["--sequence-length", "129"], "--sequence-length 129 is more than the 128 positions"),
    (["--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize(
    ("given", "message"),
    OPTIONS,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    refused(arguments(folder, tmp_path / "out", *given), message, capsys)
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_only_as_it_began(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = weights_of(tune(folder, out, "--steps", "3"))
    different = [
        (["--lr", "2e-3"], "--lr 0.001, not 0.002"),
        (["--seed", "1"], "--seed 0, not 1"),
        (["--model", str(folder / "opt")], "another --model"),
        (["--data", str(folder / "prompts.jsonl")], "another --data"),
        (["--steps", "2"], "--steps may only grow"),
    ]
    for given, message in different:
        refused(arguments(folder, out, "--steps", "5", *given), message, capsys)
    renamed = tmp_path / "renamed"  # the same weights, and two tokens that have changed places
    shutil.copytree(folder / "llama", renamed)
    file = renamed / "tokenizer.json"
    vocabulary = (rules := json.loads(file.read_text()))["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(rules))
    given = arguments(folder, out, "--steps", "5", "--model", str(renamed))
    refused(given, "another tokenizer", capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refused(arguments(folder, tmp_path / "full"), "is not empty", capsys)
    (out / "steps.jsonl").write_bytes(
        (out / "steps.jsonl").read_bytes().replace(b'"step":1,', b'"step":8,')
    )
    refused(arguments(folder, out, "--steps", "5"), "line 3: step 8 where step 1 should be", capsys)
    assert weights_of(out / "model.safetensors") == before


def test_two_runs_cannot_share_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "out"):
        refused(arguments(folder, tmp_path / "out"), "another process is working", capsys)
        assert (tmp_path / "out").exists()


def test_a_model_folder_without_good_weights_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder / "llama", broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-1])
    refused(arguments(folder, tmp_path / "out", "--model", str(broken)), "truncated", capsys)
    (broken / "model.safetensors").unlink()
    refused(arguments(folder, tmp_path / "out", "--model", str(broken)), "does not exist", capsys)
    shutil.copyfile(folder / "opt" / "model.safetensors", broken / "model.safetensors")
    refused(
        arguments(folder, tmp_path / "out", "--model", str(broken)),
        "holds no weights for 'lm_head.weight'",
        capsys,
    )


def test_replay_refuses_another_model_and_a_used_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(folder, tmp_path / "out", "--steps", "2")
    log = str(tmp_path / "out" / "steps.jsonl")
    refused(
        ["replay", "--log", log, "--model", str(folder / "opt"), "--out", str(tmp_path / "new")],
        "is not the model",
        capsys,
    )
    refused(
        ["replay", "--log", log, "--model", str(folder / "llama"), "--out", str(tmp_path / "out")],
        "holds a model already",
        capsys,
    )
    refused(
        [
            "replay",
            "--log",
            "nowhere",
            "--model",
            str(folder / "llama"),
            "--out",
            str(tmp_path / "new"),
        ],
        "nowhere does not exist",
        capsys,
    )
    assert not (tmp_path / "new").exists()


def refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("zo2: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("given", [["--help"], ["finetune", "--help"], ["finetune", "--lr", "-1"]])
def test_help_and_a_wrong_option_wait_for_nothing_heavy(given: list[str]) -> None:
    code = f"""
import sys
from projects.zo2.command import main
try:
    main({given})
finally:
    print(*sorted({{"torch", "transformers", "numpy", "safetensors"}} & set(sys.modules)), "end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == ["end"], done.stderr
