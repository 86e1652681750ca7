"""`python -m projects.infinite_sampling`: many completions per prompt in little memory, and GRPO on
them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from projects.infinite_sampling.recipe import Recipe, SampleRecipe, TrainRecipe
from shared.commands.main import main as run_command
from shared.commands.options import Parser, number
from shared.commands.recipe import add_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status, as `shared.commands.main.main` does."""
    return run_command("infinite_sampling", parser, arguments)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = Parser(prog="python -m projects.infinite_sampling", description=__doc__)
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser(
        "sample",
        help="sample a group of completions for each prompt",
        description=(
            "Sample completions of your prompts, a group for each, in a cache of few rows. Which"
            " rows decode when does not change a completion: it depends on the model, the prompt,"
            " its number and the seed. The same command goes on where it was stopped."
        ),
        epilog=(
            "example:\n  python -m projects.infinite_sampling sample --model smollm2-135m --prompts"
            ' questions.jsonl --group 32 --slots 8 --out answers\n\na line of the file: {"prompt":'
            ' ...} or {"messages": [{"role": ..., "content": ...}, ...]}; .txt: a prompt a line'
        ),
    )
    sample.set_defaults(function="projects.infinite_sampling.sample:sample")
    _common(sample, SampleRecipe, "prompts_at_once")

    train = commands.add_parser(
        "train",
        help="train a model by GRPO with a reward function of yours",
        description=(
            "GRPO: each step samples a group of completions for some prompts, rewards them, and"
            " moves the model towards those above their group's mean. Memory follows --slots and"
            " --micro-batch, not the group. The same command goes on where it was stopped or"
            " killed, with at most the step under way lost."
        ),
        epilog=(
            "example:\n  python -m projects.infinite_sampling train --model smollm2-135m --prompts"
            " questions.jsonl --reward rewards.py:exact --group 16 --slots 4 --steps 100 --out"
            " tuned\n\nrewards.py: def exact(prompts, completions, **columns): return [number,"
            " ...]\ncolumns: what else stands on the prompts' lines, a list each"
        ),
    )
    train.set_defaults(function="projects.infinite_sampling.train:train")
    _common(train, TrainRecipe)
    group = train.add_argument_group("GRPO")
    group.add_argument(
        "--reward",
        required=True,
        metavar="FILE:FUNCTION",
        help="gives a list of numbers from prompts and completions; or package.module:function",
    )
    options = [field for field in TrainRecipe.model_fields if field not in Recipe.model_fields]
    add_options(group, TrainRecipe, *options)
    group.add_argument(
        "--checkpoint-every",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="steps that a crash may cost (1)",
    )
    return made


def _common(parser: argparse.ArgumentParser, recipe: type[Recipe], *more: str) -> None:
    """What both commands take; `more` fields of the recipe stand beside the schedule."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="a model folder, smollm2-135m, or a hub id in your hub cache",
    )
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE", help=".jsonl or .txt"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where what comes of it goes"
    )
    add_options(
        parser, recipe, "group", "max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed"
    )
    group = parser.add_argument_group("schedule (changes speed and memory, and no completion)")
    add_options(group, recipe, *Recipe.FREE, "fixed_shape", *more)
    group = parser.add_argument_group("computation")
    add_options(group, recipe, "dtype", "device")
    group.add_argument(
        "--threads", type=number(int, 1), metavar="N", help="of the computation (torch's default)"
    )
