"""The command: what it trains, what it spends, how it goes on, what it refuses. Tiny models with
random weights stand for the user's.

A SIGKILL is tried at every moment at which the folder changes: one run is photographed there (its
folder copied), and each photograph is taken up by the command as if the run had died at that
moment.
"""

import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from projects.flashdp import (
    PoissonSampling,
    accounting,
    finetuning,
    make_private,
    per_sample_loss,
    train,
    untie,
)
from projects.flashdp.accounting import Mechanism
from projects.flashdp.command import main
from projects.flashdp.finetuning import FineTuning
from projects.flashdp.recipe import default_delta
from shared import data
from shared.commands.folder import locked
from shared.corpus import Corpus
from shared.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path], Any]) -> Path:
    """Models (tied), their tokenizers and data."""
    root = tmp_path_factory.mktemp("flashdp")
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2)
    for name, config in {"llama": llama, "gpt2": gpt2}.items():
        config.vocab_size, config.tie_word_embeddings, config.max_position_embeddings = (
            260,
            True,
            64,
        )
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        save_tokenizer(root / name)
    lines = [{"text": f"line {i} of nothing" + " at all" * (i % 3)} for i in range(40)]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "same.jsonl").write_text(
        "".join(json.dumps({"text": "abcabcabcabc"}) + "\n" for _ in range(30))
    )
    return root


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


NOISE = ["--noise-multiplier", "1"]


def arguments(
    folder: Path, out: Path, *more: str, model: str = "llama", file: str = "text.jsonl"
) -> list[str]:
    given = [
        "train",
        "--model",
        str(folder / model),
        "--data",
        str(folder / file),
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    given += [
        "--accountant",
        "rdp",
        "--batch-size",
        "8",
        "--micro-batch",
        "3",
        "--sequence-length",
        "24",
        "--lr",
        "1e-3",
    ]
    return [*given, *([] if {"--epsilon", "--noise-multiplier"} & set(more) else NOISE), *more]


def tune(
    folder: Path, out: Path, *more: str, model: str = "llama", file: str = "text.jsonl"
) -> dict[str, Tensor]:
    """A run that must end well. Returns the weights that it trained."""
    assert main(arguments(folder, out, *more, model=model, file=file)) == 0
    return load_file(next(out.glob("*model.safetensors")))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "private" / "log.jsonl").read_text().splitlines()]


def refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashdp: ")
    assert error.count("\n") == 1
    assert message in error


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "optimizer"), [("llama", "adamw"), ("gpt2", "sgd")])
def test_the_saved_model_is_what_the_library_trains(
    folder: Path, tmp_path: Path, model: str, optimizer: str
) -> None:
    schedule = [
        "--lr-schedule",
        "cosine",
        "--warmup-steps",
        "2",
        "--weight-decay",
        "0.1",
        "--steps",
        "6",
        "--optimizer",
        optimizer,
    ]
    schedule += ["--checkpoint-every", "2"]
    tune(folder, tmp_path / "out", *schedule, "--noise-seed", "5", "--clip", "0.7", model=model)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids
    assert words == AutoTokenizer.from_pretrained(folder / model)("a b").input_ids
    assert not trained.config.tie_word_embeddings
    assert trained.lm_head.weight is not trained.get_input_embeddings().weight

    corpus = Corpus.build(
        folder / "text.jsonl",
        AutoTokenizer.from_pretrained(folder / model),
        24,
        tmp_path / "corpus",
        pack=False,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder / model).eval()
    untie(theirs)
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    adam = make(theirs.parameters(), lr=1e-3, weight_decay=0.1)
    sampling = PoissonSampling(40, 8)
    make_private(theirs, adam, sampling, noise_multiplier=1.0, clip=0.7, noise_seed=5)
    seed = int.from_bytes(
        train.hashlib.shake_256((5).to_bytes(32, "big") + b"batches").digest(16), "big"
    )
    rates = [5e-4, 1e-3, *(1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))]
    log = log_of(tmp_path / "out")
    for step, rate in enumerate(rates):
        rows = sampling.batch(seed, step)
        batch = corpus.batch(rows)  # in the order of the file and in one piece
        adam.zero_grad()
        losses = per_sample_loss(theirs(input_ids=batch["input_ids"]).logits, batch["labels"])
        losses.sum().backward()
        adam.param_groups[0]["lr"] = rate
        adam.step()
        assert log[step]["batch"] == len(rows)
        assert log[step]["tokens"] == sum(corpus.batch([row])["input_ids"].numel() for row in rows)
        assert log[step]["lr"] == pytest.approx(rate)
        assert log[step]["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    for (name, expected), value in zip(
        theirs.named_parameters(), trained.parameters(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_it_learns_what_every_record_holds(folder: Path, tmp_path: Path) -> None:
    more = [
        "--noise-multiplier",
        "0.3",
        "--steps",
        "25",
        "--lr",
        "1e-2",
        "--batch-size",
        "20",
        "--micro-batch",
        "30",
    ]
    tune(
        folder,
        tmp_path / "out",
        *more,
        "--eval-data",
        str(folder / "same.jsonl"),
        "--eval-every",
        "10",
        file="same.jsonl",
    )
    log = log_of(tmp_path / "out")
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] > 5.3
    assert losses[-1] < 3
    held_out = {line["step"]: line["held_out_loss"] for line in log if "held_out_loss" in line}
    assert list(held_out) == [0, 10, 20, 25]
    assert held_out[25] < 3 < 5.3 < held_out[0]


def test_how_it_is_computed_changes_nothing_but_rounding(folder: Path, tmp_path: Path) -> None:
    more = ["--steps", "4", "--noise-seed", "1", "--optimizer", "sgd", "--lr", "0.1"]
    base = load_file(folder / "llama" / "model.safetensors")["model.norm.weight"]
    found = {
        "plain": tune(folder, tmp_path / "plain", *more),
        "whole": tune(
            folder, tmp_path / "whole", *more, "--micro-batch", "40", "--backend", "loop"
        ),
        "again": tune(
            folder, tmp_path / "again", *more, "--gradient-checkpointing", "--backend", "ghost"
        ),
        "narrow": tune(folder, tmp_path / "narrow", *more, "--dtype", "bfloat16"),
    }
    change = (found["plain"]["model.norm.weight"] - base).abs().max()
    assert change > 0.01
    for name, tolerance in (("whole", 1e-5), ("again", 1e-5), ("narrow", 1e-2)):
        for key, value in found[name].items():
            assert value.dtype == torch.float32
            assert (value - found["plain"][key]).abs().max() < tolerance, (name, key)
    assert not same(found["narrow"], found["plain"])


def test_checkpointed_layers_are_computed_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: (calls.append(len(x)), original(self, x))[1]
    )
    counts = []
    for name, more in (("kept", []), ("again", ["--gradient-checkpointing"])):
        calls.clear()
        tune(folder, tmp_path / name, "--steps", "2", "--noise-seed", "1", *more)
        counts.append(sum(calls))
    assert counts[1] == 2 * counts[0] > 0


def test_an_empty_batch_is_a_step_of_noise(folder: Path, tmp_path: Path) -> None:
    tune(folder, tmp_path / "out", "--steps", "12", "--batch-size", "1", "--noise-seed", "0")
    log = log_of(tmp_path / "out")
    empty = [line["step"] for line in log if line["batch"] == 0]
    assert empty
    assert len(log) == 12
    assert all(line["loss"] is None for line in log if line["batch"] == 0)
    report = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert report["history"] == [{"noise_multiplier": 1.0, "sample_rate": 1 / 40, "steps": 12}]


def test_lora_trains_an_adapter_that_peft_loads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    found = tune(
        folder,
        tmp_path / "out",
        "--steps",
        "4",
        "--lora-rank",
        "3",
        "--lora-targets",
        "q_proj,v_proj",
    )
    assert "tied" not in capsys.readouterr().out  # the embeddings are frozen
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    tuned = PeftModel.from_pretrained(base, tmp_path / "out")
    loaded = {
        name.replace(".default", ""): p for name, p in tuned.named_parameters() if "lora_" in name
    }
    assert same({name: p.detach() for name, p in loaded.items()}, found)
    assert len(loaded) == 2 * 2 * 2
    assert all(p.abs().max() > 0 for name, p in loaded.items() if "lora_B" in name)
    merged = tuned.merge_and_unload()
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if re.search(r"\.(q|v)_proj\.", name)}
    assert not (tmp_path / "out" / "model.safetensors").exists()
    other = tune(
        folder,
        tmp_path / "other",
        "--steps",
        "4",
        "--lora-rank",
        "3",
        "--lora-targets",
        "q_proj,v_proj",
        "--seed",
        "1",
    )
    assert not same(found, other)


# ---- what is spent -------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
def test_the_report_is_the_accountants(
    folder: Path, tmp_path: Path, accountant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tune(
        folder, out, "--epsilon", "3", "--delta", "1e-3", "--accountant", accountant, "--steps", "3"
    )
    report = json.loads((out / "privacy.json").read_text())
    history = [Mechanism(**one) for one in report["history"]]
    assert [(one.sample_rate, one.steps) for one in history] == [(8 / 40, 3)]
    assert report["epsilon"] == accounting.epsilon(history, report["delta"], accountant)
    assert 2.99 < report["epsilon"] <= 3
    assert (
        report["delta"],
        report["accountant"],
        report["target_epsilon"],
        report["dataset_size"],
    ) == (1e-3, accountant, 3, 40)
    text = (out / "privacy.txt").read_text()
    assert text.startswith(
        f"({report['epsilon']:.3f}, 0.001)-differential privacy by the {accountant} accountant\n"
    )
    printed = capsys.readouterr().out
    assert text in printed
    assert (
        f"noise multiplier {history[0].noise_multiplier:.4f}, 3 steps at sampling rate 0.2"
        in printed
    )
    assert [line for line in log_of(out) if "epsilon" in line][-1] == {
        **log_of(out)[-1],
        "epsilon": report["epsilon"],
    }


def test_what_is_left_out_has_defaults_that_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(folder, tmp_path / "out", "--epochs", "0.5")
    assert "at delta 0.002 by" in capsys.readouterr().out  # 1/400 rounded down
    # half of 40 / 8, rounded
    assert json.loads((tmp_path / "out" / "privacy.json").read_text())["history"][0]["steps"] == 2
    assert [default_delta(n) for n in (1, 3, 40, 100, 2000, 117_791)] == [
        0.1,
        0.03,
        0.002,
        0.001,
        5e-5,
        8e-7,
    ]


def test_without_noise_nothing_is_promised(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(folder, tmp_path / "out", "--noise-multiplier", "0", "--steps", "2")
    assert json.loads((tmp_path / "out" / "privacy.json").read_text())["epsilon"] is None
    assert "(inf, 0.002)-differential privacy" in capsys.readouterr().out
    # does not take minutes
    tune(
        folder,
        tmp_path / "little",
        "--noise-multiplier",
        "0.01",
        "--steps",
        "2",
        "--accountant",
        "pld",
    )
    # thousands, where e^epsilon times what 160 bits cannot make is above delta
    assert json.loads((tmp_path / "little" / "privacy.json").read_text())["epsilon"] is None


def test_what_the_guarantee_rests_on_is_said(folder: Path, tmp_path: Path) -> None:
    def text(out: Path) -> str:
        return (out / "privacy.txt").read_text()

    tune(folder, tmp_path / "one", "--steps", "2")
    assert "losses, batch sizes and samples left out are not covered" in text(tmp_path / "one")
    for absent in ("seed of the noise", "held-out", "add up"):
        assert absent not in text(tmp_path / "one")
    more = ["--steps", "2", "--noise-seed", "1", "--eval-data", str(folder / "same.jsonl")]
    album = photographed(
        tmp_path / "two",
        tmp_path / "album",
        arguments(folder, tmp_path / "two", *more, model=str(tmp_path / "one")),
    )
    for present in (
        "seed of the noise was given",
        "the held-out data is public",
        "epsilons add up",
    ):
        assert present in text(tmp_path / "two")
    report = json.loads((tmp_path / "two" / "privacy.json").read_text())
    assert any("seed of the noise" in one for one in report["assumptions"])
    # that of "one", a file of its model's, never stands there
    reports = [photograph / "privacy.json" for photograph in album]
    assert {path.read_bytes() for path in reports if path.exists()} <= {
        (tmp_path / "two" / "privacy.json").read_bytes()
    }


def test_nothing_private_is_left_outside_its_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tune(folder, out, "--steps", "2", "--eval-data", str(folder / "same.jsonl"))
    model = {f.name for f in (folder / "llama").iterdir()}
    assert {f.name for f in out.iterdir()} - {".lock"} == model | {
        "privacy.json",
        "privacy.txt",
        "private",
    }
    assert {f.name for f in (out / "private").iterdir()} == {"run.json", "log.jsonl"}
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    released = b"".join(f.read_bytes() for f in out.iterdir() if f.is_file())
    assert json.loads((out / "private" / "run.json").read_text())["data"].encode() not in released


# ---- going on ------------------------------------------------------------------------------------


def photographed(out: Path, album: Path, given: list[str]) -> list[Path]:
    """Run to the end, and copy the folder at each change of it: before and after every file that is
    put in place, made or removed, and after every line of the log.
    """
    album.mkdir()
    taken: list[Path] = []

    def photograph() -> None:
        if (out / "private").exists():
            taken.append(album / str(len(taken)) / "out")
            shutil.copytree(out, taken[-1])

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            photograph()
            done = original(*args, **kwargs)
            photograph()
            return done

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (train._Run, "_record"),
            (Path, "unlink"),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        assert main(given) == 0
    return taken


@pytest.mark.parametrize("lora", [False, True])
def test_a_kill_at_any_moment_costs_nothing_but_time(
    folder: Path,
    tmp_path: Path,
    lora: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "whole"
    more = [
        "--steps",
        "5",
        "--checkpoint-every",
        "2",
        "--lr-schedule",
        "linear",
        *(["--lora-rank", "2"] if lora else []),
    ]
    more += ["--eval-data", str(folder / "same.jsonl"), "--eval-every", "2", "--eval-rows", "3"]
    photographs = photographed(out, tmp_path / "album", arguments(folder, out, *more))
    whole, report, log = (
        load_file(next(out.glob("*model.safetensors"))),
        (out / "privacy.json").read_bytes(),
        log_of(out),
    )

    # epsilon stands there when there was time for it
    def told(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key != "epsilon"} for line in lines]

    states: dict[tuple[Any, ...], Path] = {}  # of photographs that show the same take one
    for photograph in photographs:
        files = sorted(f for f in photograph.rglob("*") if f.is_file())
        states.setdefault(
            tuple((str(f.relative_to(photograph)), f.read_bytes()) for f in files), photograph
        )
    begun = [one for one in states.values() if (one / "private" / "run.json").exists()]
    assert len(begun) > 20
    kept = begun if not lora else begun[::4]
    tokenizer = train.load_tokenizer(folder / "llama")
    # half of the time of a run as short as these
    monkeypatch.setattr(train, "load_tokenizer", lambda folder: tokenizer)
    for photograph in kept:
        if not (photograph / "privacy.json").exists():
            assert (photograph / "private" / "key").exists()
        assert same(tune(folder, photograph, *more), whole), photograph
        assert (photograph / "privacy.json").read_bytes() == report, photograph
        assert told(log_of(photograph)) == told(log), photograph
        assert {f.name for f in photograph.iterdir()} == {f.name for f in out.iterdir()}, photograph
        assert {f.name for f in (photograph / "private").iterdir()} == {"run.json", "log.jsonl"}, (
            photograph
        )
    early = [one for one in states.values() if one not in begun]
    # begun anew, with a key of its own
    assert tune(folder, early[-1], *more).keys() == whole.keys()
    assert not same(load_file(next(early[-1].glob("*model.safetensors"))), whole)


def test_a_killed_process_goes_on_to_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--steps", "400", "--checkpoint-every", "10", "--noise-multiplier", "2"]
    blows = {"killed": signal.SIGKILL, "stopped": signal.SIGINT}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "projects.flashdp", *arguments(folder, tmp_path / name, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in blows
    }
    waiting = dict(processes)
    deadline = time.monotonic() + 120
    while waiting and time.monotonic() < deadline:
        for name, process in list(waiting.items()):
            log = tmp_path / name / "private" / "log.jsonl"
            if process.poll() is not None or (log.exists() and log.read_bytes().count(b"\n") > 14):
                process.send_signal(blows[name])
                del waiting[name]
        time.sleep(0.005)
    ended = {
        name: (*process.communicate(), process.returncode) for name, process in processes.items()
    }
    assert not waiting
    assert ended["killed"][2] == -signal.SIGKILL, ended
    stopped = re.fullmatch(
        r"flashdp: stopped after step (\d+) of 400; the same command goes on from there\n",
        ended["stopped"][1],
    )
    assert stopped, ended
    assert ended["stopped"][2] == 130
    for name in blows:
        private = tmp_path / name / "private"
        assert stat.S_IMODE((private / "key").stat().st_mode) == 0o600
        assert not list((tmp_path / name).glob("*model.safetensors"))
        run = json.loads((private / "run.json").read_text())
        made = json.loads(safe_open(private / "checkpoint.safetensors", "pt").metadata()["state"])[
            "history"
        ]
        if name == "stopped":
            assert made == [[2.0, 0.2, int(stopped[1])]]
        steps = log_of(tmp_path / name)[-1]["step"] + 5
        # the first steps do not depend on how many will follow, and fewer are enough to compare
        run["settings"]["steps"] = steps
        (private / "run.json").write_text(json.dumps(run))
        key = (private / "key").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(train.os, "urandom", lambda n, key=key: key)
            whole = tune(folder, tmp_path / f"{name} whole", *more, "--steps", str(steps))
        assert same(tune(folder, tmp_path / name, *more, "--steps", str(steps)), whole), name
        assert not (private / "key").exists()
        reports = [
            json.loads((tmp_path / which / "privacy.json").read_text())
            for which in (name, f"{name} whole")
        ]
        assert reports[0] == reports[1]


def test_no_two_runs_share_their_noise(folder: Path, tmp_path: Path) -> None:
    first, second = (tune(folder, tmp_path / name, "--steps", "2") for name in "ab")
    assert not same(first, second)
    batches = [[line["tokens"] for line in log_of(tmp_path / name)] for name in "ab"]
    assert batches[0] != batches[1]
    seeded = [tune(folder, tmp_path / name, "--steps", "2", "--noise-seed", "3") for name in "cd"]
    assert same(*seeded)


def test_a_signal_in_a_batch_leaves_the_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(folder, tmp_path / "whole", "--steps", "5", "--noise-seed", "2")
    original, calls = FineTuning.losses, []

    def losses(self: Any, batch: Any) -> Tensor:
        calls.append(self.dp.steps)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "losses", losses)
        assert (
            main(arguments(folder, tmp_path / "out", "--steps", "5", "--noise-seed", "2"))
            == 128 + signal.SIGTERM
        )
    assert len(calls) == 8
    assert [line["step"] for line in log_of(tmp_path / "out")] == list(range(1, calls[-1] + 1))
    assert same(tune(folder, tmp_path / "out", "--steps", "5", "--noise-seed", "2"), whole)


def test_a_full_disk_is_one_line_and_the_checkpoint_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    out.mkdir()
    room = (folder / "llama" / "model.safetensors").stat().st_size * 6
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(out)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    more = ["--steps", "9", "--checkpoint-every", "3", "--noise-seed", "1"]
    try:
        refused(arguments(folder, out, *more), "no space left", capsys)
        assert not list(out.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(out)], check=True)
        assert same(tune(folder, out, *more), tune(folder, tmp_path / "whole", *more))
        assert "going on after step 3 of 9" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_finished_run_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tune(folder, out, "--steps", "3")
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.name != ".lock"}
    capsys.readouterr()
    tune(folder, out, "--steps", "3")
    assert "its 3 steps are made" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in before} == before


def interrupted(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str, after: int = 5
) -> None:
    """A run that ends as by a kill when it has made so many steps."""

    class Killed(BaseException):
        pass

    original = train._Run._record

    def record(self: Any, line: Any) -> None:
        original(self, line)
        if line["step"] == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_record", record)
        with pytest.raises(Killed):
            main(arguments(folder, out, *more))


def test_a_command_that_failed_before_its_first_step_may_be_mended_in_the_same_folder(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def broken(self: FineTuning, stop: object) -> None:
        raise UserError("this model cannot make a step")

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "step", broken)
        refused(arguments(folder, out, "--steps", "3"), "cannot make a step", capsys)
    tune(folder, out, "--steps", "2", "--lr", "2e-3")


def test_a_run_goes_on_only_as_it_began(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    more = ["--steps", "8", "--checkpoint-every", "2", "--epsilon", "5"]
    interrupted(folder, out, monkeypatch, *more)
    run = json.loads((out / "private" / "run.json").read_text())
    cost = accounting.epsilon([Mechanism(run["noise_multiplier"], 0.2, 12)], 0.002, "rdp")
    assert cost > 5.5
    different = [
        (["--lr", "2e-3"], "--lr 0.001, not 0.002"),
        (["--seed", "1"], "--seed 0, not 1"),
        (["--epsilon", "6"], "--epsilon 5.0, not 6.0"),
        (["--delta", "1e-3"], "--delta 0.002, not 0.001"),
        (["--accountant", "pld"], "--accountant rdp, not pld"),
        (["--clip", "2"], "--clip 1.0, not 2.0"),
        (["--batch-size", "9"], "--batch-size 8, not 9"),
        (["--micro-batch", "4"], "--micro-batch 3, not 4"),
        (["--noise-seed", "4"], "--noise-seed null, not 4"),
        (["--lora-rank", "4"], "--lora-rank null, not 4"),
        (["--model", str(folder / "gpt2")], "another --model"),
        (["--data", str(folder / "same.jsonl")], "another --data"),
        (["--steps", "7"], "--steps 8, not 7"),
        (
            ["--steps", "12"],
            f"is for 8 steps and epsilon 5.000; 12 steps would spend epsilon {cost:.3f}",
        ),
    ]
    for given, message in different:
        refused(arguments(folder, out, *more, *given), message, capsys)
    mixed = [*more[:4], "--noise-multiplier", "1"]
    refused(arguments(folder, out, *mixed), "--epsilon 5.0, not null", capsys)
    tokenizer = train.load_tokenizer(folder / "llama")
    tokenizer.chat_template = "{{ messages }}"
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_tokenizer", lambda folder: tokenizer)
        refused(arguments(folder, out, *more), "holds a run on other tokens", capsys)
    key = (out / "private" / "key").read_bytes()
    for other in (bytes(32), key[:-1], None):
        (out / "private" / "key").unlink()
        if other is not None:
            (out / "private" / "key").write_bytes(other)
        refused(arguments(folder, out, *more), "is not the key that this run began with", capsys)
        (out / "private" / "key").write_bytes(key)
    checkpoint = (out / "private" / "checkpoint.safetensors").read_bytes()
    (out / "private" / "checkpoint.safetensors").write_bytes(checkpoint[:-1])
    refused(arguments(folder, out, *more), "checkpoint.safetensors is damaged", capsys)
    (out / "private" / "checkpoint.safetensors").write_bytes(checkpoint)
    # these may change
    tune(folder, out, *more, "--checkpoint-every", "1", "--eval-data", str(folder / "same.jsonl"))
    refused(
        arguments(folder, out, *more, "--steps", "12"), f"would spend epsilon {cost:.3f}", capsys
    )
    assert json.loads((out / "privacy.json").read_text())["history"][0]["steps"] == 8


def test_epsilon_goes_on_from_where_it_was(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(finetuning, "ACCOUNTING_SHARE", math.inf)  # computed at every step
    interrupted(folder, tmp_path / "out", monkeypatch, "--steps", "6", "--checkpoint-every", "2")
    spent = accounting.epsilon([Mechanism(1.0, 0.2, 4)], 0.002)
    capsys.readouterr()
    tune(folder, tmp_path / "out", "--steps", "6", "--checkpoint-every", "2")
    assert f"going on after step 4 of 6: epsilon {spent:.3f} is spent" in capsys.readouterr().out
    for line in log_of(tmp_path / "out"):
        assert line["epsilon"] == accounting.epsilon([Mechanism(1.0, 0.2, line["step"])], 0.002)


# ---- losses that are not finite ------------------------------------------------------------------


def test_a_sample_without_a_finite_gradient_is_left_out_and_counted(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = FineTuning.losses

    def losses(self: Any, batch: Any) -> Tensor:
        found = original(self, batch)
        bad = batch["input_ids"][:, 5] == batch["input_ids"][0, 5]  # of each forward some
        return found * torch.where(bad, math.nan, 1.0)

    monkeypatch.setattr(FineTuning, "losses", losses)
    more = ["--steps", "6", "--checkpoint-every", "2", "--noise-seed", "1"]
    found = tune(folder, tmp_path / "whole", *more)
    assert all(value.isfinite().all() for value in found.values())
    log = log_of(tmp_path / "whole")
    dropped = sum(line["dropped"] for line in log)
    assert 6 <= dropped < sum(line["batch"] for line in log)
    said = f"{dropped} samples were left out of a step because"
    assert said in capsys.readouterr().out
    assert any(line["loss"] is not None for line in log)
    interrupted(folder, tmp_path / "parts", monkeypatch, *more)
    capsys.readouterr()
    assert same(tune(folder, tmp_path / "parts", *more), found)
    assert said in capsys.readouterr().out


def test_a_model_that_has_come_apart_ends_the_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = FineTuning.losses
    monkeypatch.setattr(
        FineTuning,
        "losses",
        lambda self, batch: original(self, batch) * (math.nan if self.dp.steps > 2 else 1),
    )
    more = ["--steps", "60", "--checkpoint-every", "7", "--batch-size", "2"]
    for _ in range(2):  # the same again, from the checkpoint
        refused(
            arguments(folder, tmp_path / "out", *more),
            "no record had a finite loss in 20 batches in a row",
            capsys,
        )
        log = log_of(tmp_path / "out")
        assert sum(line["loss"] is None and line["batch"] > 0 for line in log) == 20
        assert log[-1]["step"] < 60
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_that_is_not_finite_is_not_saved(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = FineTuning.step

    def step(self: Any, stop: Any) -> Any:
        line = original(self, stop)
        with torch.no_grad():
            self.trainable[0][1].view(-1)[0] = math.nan
        return line

    monkeypatch.setattr(FineTuning, "step", step)
    refused(arguments(folder, tmp_path / "out", "--steps", "1"), "holds NaN or infinity", capsys)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {".lock", "private"}


# ---- bad input -----------------------------------------------------------------------------------

OPTIONS = [
    (["--clip", "0"], "--clip: '0' is not a number above 0"),
    (["--clip", "-1"], "--clip"),
    (["--clip", "nan"], "--clip"),
    (["--noise-multiplier", "-1"], "--noise-multiplier: '-1' is not a number of at least 0"),
    (["--noise-multiplier", "inf"], "--noise-multiplier"),
    (["--noise-multiplier", "1", "--epsilon", "1"], "not allowed with argument"),
    (["--epsilon", "0"], "--epsilon: '0' is not a number above 0"),
    (
        ["--epsilon", "0.001", "--steps", "1000000000000"],
        "epsilon 0.001 at delta 0.002 cannot be reached in 1000000000000 steps",
    ),
    (["--delta", "0.025"], "below 1/40"),
    (["--delta", "2"], "below 1/40"),
    (["--delta", "0"], "--delta"),
    (["--accountant", "gdp"], "--accountant"),
    (["--steps", "0"], "--steps"),
    (["--steps", "2", "--epochs", "2"], "not allowed with argument"),
    (["--batch-size", "41"], "--batch-size 41 is more than the 40 records"),
    (["--micro-batch", "0"], "--micro-batch"),
    (["--lr", "-1"], "--lr: '-1' is not a number of at least 0"),
    (["--noise-seed", str(2**256)], "of at least 0 and below 1.15792e+77"),
    (["--backend", "fast"], "no backend 'fast'; there are auto, loop"),
    (["--model", "nowhere/at-all"], "nowhere/at-all"),
    (["--data", "missing.jsonl"], "missing.jsonl: No such file"),
    (["--data", "pyproject.toml"], "name a .jsonl or a .txt file"),
    (["--eval-data", "missing.jsonl"], "missing.jsonl: No such file"),
    (["--device", "tpu"], "--device tpu"),
    (["--lora-alpha", "4"], "need --lora-rank"),
    (["--lora-rank", "2", "--lora-targets", "q_poj"], "q_poj"),
    (["--sequence-length", "65"], "--sequence-length 65 is more than the 64 positions"),
    (["--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize(
    ("given", "message"),
    OPTIONS,
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    refused(arguments(folder, tmp_path / "out", *given), message, capsys)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    refused(arguments(folder, tmp_path / "mine", *given), message, capsys)
    assert {f.name for f in (tmp_path / "mine").iterdir()} <= {".lock"}


def test_epsilon_or_noise_must_be_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(folder, tmp_path / "out")
    place = given.index(NOISE[0])
    del given[place : place + 2]
    refused(given, "--epsilon --noise-multiplier is required", capsys)


def test_bad_data_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.jsonl"
    for content, message in (
        ("", "holds no text to train on"),
        ('{"text": "a"}\n{"text": \n', "bad.jsonl, line 2: not JSON"),
    ):
        file.write_text(content)
        refused(arguments(folder, tmp_path / "out", "--data", str(file)), message, capsys)
        assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, message in (
        ("thesis.tex", "is not empty and holds no run"),
        ("private/diary.txt", "holds other things than a run"),
    ):
        file = tmp_path / place.replace("/", "-") / place
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        refused(arguments(folder, tmp_path / place.replace("/", "-")), message, capsys)
        assert file.read_text() == "mine"
    with locked(tmp_path / "busy"):
        refused(arguments(folder, tmp_path / "busy"), "another process is working", capsys)


def test_a_model_folder_without_good_weights_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder / "llama", broken)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-1])
    refused(arguments(folder, tmp_path / "out", "--model", str(broken)), "cannot be loaded", capsys)
    shutil.copyfile(folder / "gpt2" / "model.safetensors", broken / "model.safetensors")
    refused(
        arguments(folder, tmp_path / "out", "--model", str(broken)), "holds no weights for", capsys
    )
    (broken / "model.safetensors").unlink()
    refused(arguments(folder, tmp_path / "out", "--model", str(broken)), "does not exist", capsys)
    assert not (tmp_path / "out").exists()


def test_help_and_a_wrong_option_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom projects.flashdp.command import main\n"
        "assert main(['train', '--nonsense']) == 2\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n"
        "    print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "example:\n  python -m projects.flashdp train --model" in done.stdout
    assert "no noise covers them" in done.stdout
    assert done.stdout.endswith("set()\n")
    assert done.stderr.startswith("flashdp: ")


@pytest.mark.data
def test_smollm2_is_trained(folder: Path, tmp_path: Path) -> None:
    try:
        data.path("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))
    more = [
        "--steps",
        "2",
        "--lora-rank",
        "2",
        "--lora-targets",
        "q_proj",
        "--batch-size",
        "4",
        "--sequence-length",
        "16",
    ]
    found = tune(folder, tmp_path / "out", *more, "--model", "smollm2-135m")
    assert len(found) == 2 * 30
    assert all(value.isfinite().all() for value in found.values())
    assert json.loads((tmp_path / "out" / "privacy.json").read_text())["groups"] == 2 * 30
