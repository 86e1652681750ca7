"""`torchrun -m projects.distzo2`: fine-tune the user's own language model with several processes;
or plan that.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from projects.zo2.__main__ import DTYPES, add_training
from shared.commands.options import Parser, number
from shared.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on this rank. Returns the exit status: 0, 1 (another rank ended), 2
    (UserError), 128 + a signal's number.
    """
    try:
        options = _parser().parse_args(arguments)
        # torch and transformers, which --help need not wait for
        module = importlib.import_module(f"projects.distzo2.{options.function}")
        return int(getattr(module, options.function)(options))
    except UserError as error:
        if _first():
            print(f"distzo2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distzo2: stopped", file=sys.stderr)
        return 130


def _first() -> bool:
    """Whether this is the rank that speaks for all."""
    import os

    return os.environ.get("RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="torchrun ... -m projects.distzo2", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    added = commands.add_parser(
        "finetune",
        help="fine-tune a causal language model on your text",
        description=(
            "Fine-tune a causal language model on your text with forward passes only, shared out"
            " among processes. The result is that of `python -m projects.zo2 finetune` with the"
            " same options, to the last bit. The same command goes on where it was stopped or"
            " killed."
        ),
        epilog=(
            "example:\n  torchrun --standalone --nproc-per-node 2 -m projects.distzo2 finetune"
            " --model smollm2-135m --data reviews.jsonl \\\n    --accumulate 2 --steps 1000 --out"
            " tuned\n\na step's global batch is --accumulate micro-batches, which the ranks"
            " share out"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(function="finetune")
    # what ZO2's command has besides
    added.set_defaults(storage_dtype=None, rounding="nearest", eval_data=None, eval_every=0)
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
        help="where the model and the log go; a folder that all ranks see",
    )
    added.add_argument(
        "--steps",
        type=number(int, 1),
        default=1000,
        metavar="N",
        help="steps in all (1000); may grow later",
    )

    group = added.add_argument_group("processes")
    group.add_argument(
        "--pert",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: the two perturbed forwards on two ranks (1)",
    )
    group.add_argument(
        "--transfer",
        choices=("replicated", "sliced"),
        default="replicated",
        help="sliced: each rank moves an N-th of a block",
    )
    group.add_argument(
        "--check-every",
        type=number(int, 0),
        default=100,
        metavar="N",
        help="steps between comparisons of all weights (100)",
    )
    group.add_argument(
        "--timeout",
        type=number(float, 1),
        default=300.0,
        metavar="S",
        help="seconds a rank waits for the others (300)",
    )
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda: a GPU a rank")
    group.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="to compute in and to save (float32)"
    )

    add_training(added)

    group = added.add_argument_group("faults")
    group.add_argument(
        "--checkpoint-every",
        type=number(int, 1),
        default=100,
        metavar="N",
        help="steps between checkpoints (100)",
    )

    added = commands.add_parser(
        "plan",
        help="predict the speed of every mode on so many GPUs",
        description=(
            "Predict tokens a second, bytes and speed-up over ZO2 on one GPU for every mode, from"
            " the datasheet's rates. Nothing is run."
        ),
        epilog="example: python -m projects.distzo2 plan --model opt-175b --gpus 4 --gpu h100-sxm",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(function="plan")
    added.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_SIZE",
        help="a model folder, or a size of OPT: opt-1.3b ... opt-175b",
    )
    added.add_argument(
        "--gpus", type=number(int, 1), required=True, metavar="N", help="how many, a rank each"
    )
    added.add_argument(
        "--gpu", default="a100-sxm", metavar="NAME", help="of hardware.csv (a100-sxm)"
    )
    added.add_argument(
        "--tokens", type=number(int, 1), default=2048, metavar="N", help="of a sequence (2048)"
    )
    added.add_argument(
        "--batch",
        type=number(int, 1),
        metavar="N",
        help="sequences a step in all (as many as GPUs)",
    )
    added.add_argument(
        "--host-link",
        type=number(float, 0, above=True),
        metavar="GB/S",
        help="of a link to the host, each way (the GPU's)",
    )
    added.add_argument(
        "--links",
        type=number(int, 1),
        metavar="N",
        help="links to the host that the GPUs share (one each)",
    )
    added.add_argument(
        "--exchange",
        type=number(float, 0, above=True),
        metavar="GB/S",
        help="into a GPU from others (the GPU's)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
