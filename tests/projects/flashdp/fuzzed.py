"""The commands that damaged input is given to; see tests/fuzz.py."""

from pathlib import Path

from fuzz import Command
from language_inputs import model, texts

from projects.flashdp.command import main, parser


def prepare(folder: Path) -> None:
    model(folder / "model")
    texts(folder / "text.jsonl", 30)


COMMANDS = [
    Command(
        "flashdp train",
        main,
        parser,
        prepare,
        (
            "train", "--model", "{}/model", "--data", "{}/text.jsonl", "--noise-multiplier", "1.0",
            "--steps", "2", "--batch-size", "4", "--sequence-length", "16", "--threads", "1",
        ),
        "out",
        {"--model": "model", "--data": "text"},
    ),
]  # fmt: skip
