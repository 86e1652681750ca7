"""The commands that damaged input is given to; see tests/fuzz.py."""

from pathlib import Path

from fuzz import Command
from language_inputs import model, texts

from projects.zo2.command import main, parser

RUN = ("--steps", "2", "--sequence-length", "16", "--storage", "ram", "--threads", "1")


def prepare(folder: Path) -> None:
    model(folder / "model")
    texts(folder / "text.jsonl")


def trained(folder: Path) -> None:
    prepare(folder)
    line = ["--model", str(folder / "model"), "--data", str(folder / "text.jsonl"), *RUN]
    assert main(["finetune", *line, "--out", str(folder / "run")]) == 0


COMMANDS = [
    Command(
        "zo2 finetune",
        main,
        parser,
        prepare,
        ("finetune", "--model", "{}/model", "--data", "{}/text.jsonl", *RUN),
        "out",
        {"--model": "model", "--data": "text"},
    ),
    Command(
        "zo2 replay",
        main,
        parser,
        trained,
        ("replay", "--model", "{}/model", "--log", "{}/run/steps.jsonl"),
        "out",
        {"--model": "stored", "--log": "log"},
    ),
]
