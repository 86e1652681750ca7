"""Under torchrun the command leaves what ZO2's command leaves, to the last bit; it goes on after a
stop; what is wrong is one line.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from projects.zo2.command import main as zo2

ROOT = Path(__file__).resolve().parents[3]
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tokenizer):
    """A model with random weights, its tokenizer and data."""
    root = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=80,
        vocab_size=260,
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    save_tokenizer(root / "llama")
    lines = [{"text": f"line {i} of a text about nothing"} for i in range(40)]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def options(folder: Path, out: Path, *more: str) -> list[str]:
    given = [
        "--model",
        str(folder / "llama"),
        "--data",
        str(folder / "text.jsonl"),
        "--out",
        str(out),
        "--steps",
        str(STEPS),
    ]
    return [
        "finetune",
        *given,
        "--sequence-length",
        "24",
        "--accumulate",
        "4",
        "--lr",
        "1e-3",
        "--checkpoint-every",
        "5",
        *more,
    ]


def command(world: int, arguments: list[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "-m",
        "projects.distzo2",
        *arguments,
    ]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }


def torchrun(world: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(world, arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def alone(folder):
    """What ZO2's command makes with one thread."""
    out = folder / "alone"
    assert zo2(options(folder, out, "--threads", "1")) == 0
    return digest(out / "model.safetensors")


@pytest.mark.parametrize(
    "more",
    [(), ("--pert", "2"), ("--transfer", "sliced"), ("--pert", "2", "--transfer", "sliced")],
    ids=" ".join,
)
def test_the_model_is_that_of_one_process(more, folder, alone, tmp_path):
    out = tmp_path / "out"
    done = torchrun(2, options(folder, out, *more))
    assert done.returncode == 0, done.stderr[-2000:]
    assert digest(out / "model.safetensors") == alone
    assert not list(out.glob("working*"))
    assert LlamaForCausalLM.from_pretrained(out).config.num_hidden_layers == 3


def test_a_stopped_run_goes_on_to_the_same_model(folder, alone, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(2, options(folder, out)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    log = out / "steps.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    for child in subprocess.run(
        ["pgrep", "-f", str(out)], capture_output=True, text=True, check=False
    ).stdout.split():
        os.kill(int(child), signal.SIGKILL)  # torchrun cannot end its ranks any more
    process.wait()
    assert not (out / "model.safetensors").exists()
    # how work is shared out may change
    done = torchrun(2, options(folder, out, "--transfer", "sliced"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on after step" in done.stdout
    assert digest(out / "model.safetensors") == alone


@pytest.mark.parametrize(
    ("world", "more", "said"),
    [
        (3, ("--pert", "2"), "--pert 2 needs an even number of processes, and there are 3"),
        (2, ("--model", "no-such-model"), "no model 'no-such-model'"),
        (2, ("--data", "no-such-file.jsonl"), "no-such-file.jsonl"),
        (2, ("--lr", "3e38", "--steps", "1"), "the trained model: "),
    ],
)
def test_what_is_wrong_is_said_once_by_all_ranks_ending(world, more, said, folder, tmp_path):
    done = torchrun(world, options(folder, tmp_path / "out", *more))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("distzo2: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def node(port: int, arguments: list[str]) -> subprocess.Popen[str]:
    """A launcher of one rank, of two that meet at an endpoint, as on a cluster."""
    meeting = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "job",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
    ]
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meeting,
        "-m",
        "projects.distzo2",
        *arguments,
    ]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_launchers_that_meet_at_an_endpoint_make_the_same_model(folder, alone, tmp_path):
    port = free_port()
    both = [node(port, options(folder, tmp_path / "out")) for _ in range(2)]
    said = [one.communicate(timeout=150) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert digest(tmp_path / "out" / "model.safetensors") == alone


@pytest.mark.parametrize("given", [["--help"], ["plan", "--help"], ["finetune", "--pert", "3"]])
def test_help_and_a_wrong_option_wait_for_nothing_heavy(given):
    code = f"""
import sys
from projects.distzo2.command import main
try:
    main({given})
finally:
    print(*sorted({{"torch", "transformers", "numpy", "safetensors"}} & set(sys.modules)), "end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1].split() == ["end"], done.stderr
