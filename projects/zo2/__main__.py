"""`python -m projects.zo2`: fine-tune the user's own language model in little memory, and rebuild a
run from its log.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.commands.options import Parser, number
from shared.errors import UserError

DTYPES = ("float32", "bfloat16")
STORAGE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 (UserError), 128 + the number of a signal
    that stopped it (Ctrl-C: 130).
    """
    try:
        options = _parser().parse_args(arguments)
        from projects.zo2 import finetune  # torch and transformers, which --help need not wait for

        return int(getattr(finetune, options.function)(options))
    except UserError as error:
        print(f"zo2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zo2: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m projects.zo2", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    positive = number(int, 1)

    added = commands.add_parser(
        "finetune",
        help="fine-tune a causal language model on your text",
        description=(
            "Fine-tune a causal language model on your text with forward passes only, under a hard"
            " limit on memory. The same command goes on where it was stopped or killed."
        ),
        epilog=(
            "example:\n  python -m projects.zo2 finetune --model smollm2-135m --data reviews.jsonl"
            ' --memory-budget 1GB --steps 1000 --out tuned\n\na line of reviews.jsonl: {"text":'
            ' ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content":'
            " ...}, ...]}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(function="finetune")
    added.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="a model folder, smollm2-135m, or a hub id in your hub cache",
    )
    added.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help=".jsonl or .txt to train on"
    )
    added.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="where the trained model and the run's log go",
    )
    added.add_argument(
        "--steps",
        type=number(int, 1),
        default=1000,
        metavar="N",
        help="steps in all (1000); may grow later",
    )

    group = added.add_argument_group("memory")
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="hard limit, as 2GB or 1.5GiB; on a GPU, of its memory (no limit)",
    )
    group.add_argument(
        "--storage",
        choices=("ram", "disk", "none"),
        help="where the blocks rest (disk with a budget, otherwise ram)",
    )
    group.add_argument(
        "--storage-dtype",
        choices=STORAGE_DTYPES,
        help="keep resting blocks in this dtype (that of --dtype)",
    )
    group.add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        default="nearest",
        help="to the storage dtype (nearest)",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="to compute in and to save (float32)"
    )
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="of the computation (torch's default)"
    )

    add_training(added)

    group = added.add_argument_group("evaluation")
    group.add_argument(
        "--eval-data",
        type=Path,
        metavar="FILE",
        help="held-out .jsonl or .txt; its loss is printed",
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
        help="rows an evaluation takes at most (64)",
    )

    group = added.add_argument_group("faults")
    group.add_argument(
        "--checkpoint-every",
        type=positive,
        default=100,
        metavar="N",
        help="steps between checkpoints (100)",
    )

    added = commands.add_parser(
        "replay",
        help="rebuild trained weights from the base model and the log of a run",
        description=(
            "Rebuild the weights that a run trained from its base model and its log, bit for bit,"
            " without data."
        ),
        epilog=(
            "example: python -m projects.zo2 replay --log tuned/steps.jsonl --model smollm2-135m"
            " --out rebuilt"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(function="replay")
    added.add_argument(
        "--log", required=True, type=Path, metavar="FILE", help="steps.jsonl of the run"
    )
    added.add_argument(
        "--model", required=True, metavar="DIR_OR_ID", help="the model that the run began with"
    )
    added.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where the weights go"
    )
    added.add_argument(
        "--storage", choices=("ram", "disk"), default="ram", help="where the blocks rest (ram)"
    )
    return parser


def add_training(added: argparse.ArgumentParser) -> None:
    """The options that decide what is learnt: batches, optimiser, adapters."""
    positive, natural, share = number(int, 1), number(int, 0), number(float, 0)
    group = added.add_argument_group("batches")
    group.add_argument(
        "--sequence-length",
        type=number(int, 2),
        default=256,
        metavar="N",
        help="tokens in a row (256)",
    )
    group.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="rows in a forward (1)"
    )
    group.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        metavar="N",
        help="forwards whose losses a step averages (1)",
    )

    group = added.add_argument_group("optimiser")
    group.add_argument("--lr", type=share, help="learning rate (1e-6; with LoRA 1e-4)")
    group.add_argument(
        "--lr-schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="constant (default), or to 0",
    )
    group.add_argument(
        "--warmup-steps", type=natural, default=0, metavar="N", help="linear warm-up (0)"
    )
    group.add_argument(
        "--eps",
        type=number(float, 0, above=True),
        default=1e-3,
        help="size of the perturbation (1e-3)",
    )
    group.add_argument("--weight-decay", type=share, default=0.0, metavar="X", help="(0)")
    group.add_argument(
        "--probe",
        choices=("inplace", "fresh"),
        default="inplace",
        help="inplace: bitwise MeZO; fresh: without its drift",
    )
    group.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of noise and order (0)"
    )

    group = added.add_argument_group("LoRA")
    group.add_argument(
        "--lora-rank",
        type=positive,
        metavar="R",
        help="train adapters only and save them as PEFT does",
    )
    group.add_argument(
        "--lora-alpha", type=positive, metavar="N", help="scale of the adapters (2 R)"
    )
    group.add_argument(
        "--lora-targets",
        metavar="A,B",
        help="modules to adapt, as q_proj,v_proj (all linear ones but the head)",
    )


if __name__ == "__main__":
    sys.exit(main())
