"""`python -m projects.flashdp`: fine-tune the user's own language model with differential
privacy.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from projects.flashdp.recipe import Recipe
from shared.commands.main import main as run_command
from shared.commands.options import Parser, number
from shared.commands.recipe import add_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status, as `shared.commands.main.main` does."""
    return run_command("flashdp", parser, arguments)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    made = Parser(prog="python -m projects.flashdp", description=__doc__)
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    positive = number(int, 1)

    train = commands.add_parser(
        "train",
        help="fine-tune a causal language model on your text",
        description=(
            "Fine-tune a causal language model so that what it learns from any single record of"
            " your text is bounded: (epsilon, delta)-differential privacy by DP-SGD with per-layer"
            " clipping. One record is one sample. The same command goes on where it was stopped or"
            " killed."
        ),
        epilog=(
            "example:\n  python -m projects.flashdp train --model smollm2-135m --data letters.jsonl"
            ' --epsilon 3 --out tuned\n\na line of the file: {"text": ...}, {"prompt": ...,'
            ' "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}\n\nThe'
            " guarantee is for the model, which appears in DIR when the run ends. The losses shown"
            " meanwhile (means over the records\nwhose loss is finite) and all that lies in"
            " DIR/private are for the owner of the data: no noise covers them."
        ),
    )
    train.set_defaults(function="projects.flashdp.train:train")
    train.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="a model folder, smollm2-135m, or a hub id in your hub cache",
    )
    train.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help=".jsonl or .txt to train on"
    )
    train.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where the model, its privacy report and the run go",
    )

    group = train.add_argument_group("privacy")
    noise = group.add_mutually_exclusive_group(required=True)
    add_options(noise, Recipe, "epsilon", "noise_multiplier")
    add_options(group, Recipe, "delta", "accountant", "clip", "noise_seed")

    group = train.add_argument_group("batches")
    length = group.add_mutually_exclusive_group()
    add_options(length, Recipe, "steps")
    length.add_argument(
        "--epochs",
        type=number(float, 0, above=True),
        default=3.0,
        metavar="X",
        help="so often is each record expected to be drawn (3)",
    )
    add_options(group, Recipe, "batch_size", "micro_batch", "sequence_length")
    group.add_argument(
        "--eval-data",
        type=Path,
        metavar="FILE",
        help="held-out .jsonl or .txt, taken to be public; its loss is printed",
    )
    group.add_argument(
        "--eval-every",
        type=positive,
        default=100,
        metavar="N",
        help="steps between evaluations (100)",
    )
    group.add_argument(
        "--eval-rows",
        type=positive,
        default=64,
        metavar="N",
        help="records an evaluation takes at most (64)",
    )

    group = train.add_argument_group("optimizer")
    add_options(
        group, Recipe, "optimizer", "lr", "lr_schedule", "warmup_steps", "weight_decay", "seed"
    )
    group = train.add_argument_group("LoRA")
    add_options(group, Recipe, "lora_rank", "lora_alpha", "lora_targets")
    group = train.add_argument_group("computation")
    add_options(group, Recipe, "backend", "dtype", "device", "gradient_checkpointing")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="of the computation (torch's default)"
    )
    group.add_argument(
        "--checkpoint-every",
        type=positive,
        default=100,
        metavar="N",
        help="steps that a crash may cost (100)",
    )
    return made
