"""The commands that damaged input is given to, see tests/fuzz.py."""

from fuzz import Command
from language_inputs import model

from projects.distzo2.command import main, parser

COMMANDS = [
    Command(
        "distzo2 plan",
        main,
        parser,
        lambda folder: model(folder / "model"),
        ("plan", "--model", "{}/model", "--gpus", "2"),
        "",
        {"--model": "config"},
    ),
]
