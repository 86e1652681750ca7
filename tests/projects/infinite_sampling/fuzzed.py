"""The commands that damaged input is given to; see tests/fuzz.py."""

from pathlib import Path

from fuzz import Command
from language_inputs import model

from projects.infinite_sampling.command import main, parser

RUN = ("--group", "4", "--slots", "2", "--max-new-tokens", "6", "--threads", "1")


def prepare(folder: Path) -> None:
    model(folder / "model")
    (folder / "prompts.jsonl").write_text(
        '{"prompt": "ab", "want": 1}\n{"prompt": "c", "want": 2}\n'
    )
    (folder / "rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
    )


COMMANDS = [
    Command(
        "infinite_sampling sample",
        main,
        parser,
        prepare,
        ("sample", "--model", "{}/model", "--prompts", "{}/prompts.jsonl", *RUN),
        "out",
        {"--model": "model", "--prompts": "text"},
    ),
    Command(
        "infinite_sampling train",
        main,
        parser,
        prepare,
        (
            "train", "--model", "{}/model", "--prompts", "{}/prompts.jsonl", *RUN,
            "--reward", "{}/rewards.py:length", "--steps", "1", "--prompts-per-step", "1",
        ),
        "out",
        {"--model": "model", "--prompts": "text", "--reward": "module"},
    ),
]  # fmt: skip
