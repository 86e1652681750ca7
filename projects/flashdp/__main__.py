"""`python -m projects.flashdp`: fine-tune the user's own language model with differential
privacy.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.commands.options import Parser, number
from shared.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 (UserError), 128 + the number of a signal
    that stopped it (Ctrl-C: 130).
    """
    try:
        options = _parser().parse_args(arguments)
        from projects.flashdp import train  # torch and transformers, which --help need not wait for

        return train.train(options)
    except UserError as error:
        print(f"flashdp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flashdp: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m projects.flashdp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    positive, natural, above = number(int, 1), number(int, 0), number(float, 0, above=True)

    added = commands.add_parser(
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        help="where the model, its privacy report and the run go",
    )

    group = added.add_argument_group("privacy")
    noise = group.add_mutually_exclusive_group(required=True)
    noise.add_argument(
        "--epsilon", type=above, metavar="X", help="spend this much, and find the noise for it"
    )
    noise.add_argument(
        "--noise-multiplier",
        type=number(float, 0),
        metavar="X",
        help="add this much noise, and see what it spends",
    )
    group.add_argument(
        "--delta",
        type=above,
        metavar="X",
        help="(1/(10 records), rounded down to one digit); below 1/records",
    )
    group.add_argument(
        "--accountant",
        choices=("rdp", "prv", "pld"),
        default="pld",
        help="pld (default) and prv are tight, rdp is fast and wastes some",
    )
    group.add_argument(
        "--clip",
        type=above,
        default=1.0,
        metavar="C",
        help="bound on what a record adds to a step's gradient (1)",
    )
    group.add_argument(
        "--noise-seed",
        type=natural,
        metavar="N",
        help="for tests: noise that whoever knows N can take away again",
    )

    group = added.add_argument_group("batches")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="steps in all")
    length.add_argument(
        "--epochs",
        type=above,
        default=3.0,
        metavar="X",
        help="so often is each record expected to be drawn (3)",
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="records expected in a batch; each is drawn apart (64)",
    )
    group.add_argument(
        "--micro-batch",
        type=positive,
        default=8,
        metavar="N",
        help="records in a forward; for memory and speed only (8)",
    )
    group.add_argument(
        "--sequence-length",
        type=number(int, 2),
        default=256,
        metavar="N",
        help="tokens of a record, the rest is cut (256)",
    )
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

    group = added.add_argument_group("optimiser")
    group.add_argument(
        "--optimizer", choices=("adamw", "sgd"), default="adamw", help="adamw (default) or sgd"
    )
    group.add_argument("--lr", type=number(float, 0), help="learning rate (1e-4; with LoRA 1e-3)")
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
        "--weight-decay", type=number(float, 0), default=0.0, metavar="X", help="(0)"
    )
    group.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="of the adapters' first weights; neither of noise nor batches (0)",
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

    group = added.add_argument_group("computation")
    group.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="of the clipped sums: auto (default), loop, ghost, recompute, ...",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="to compute in; weights are kept and saved in float32 (float32)",
    )
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="of the computation (torch's default)"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory, a second forward of each layer",
    )
    group.add_argument(
        "--checkpoint-every",
        type=positive,
        default=100,
        metavar="N",
        help="steps that a crash may cost (100)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
