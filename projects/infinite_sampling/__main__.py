"""`python -m projects.infinite_sampling`: many completions per prompt in little memory, and GRPO on
them.
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
        if options.command == "sample":
            # torch and transformers, which --help need not wait for
            from projects.infinite_sampling import sample

            return sample.sample(options)
        from projects.infinite_sampling import train

        return train.train(options)
    except UserError as error:
        print(f"infinite_sampling: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("infinite_sampling: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m projects.infinite_sampling", description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    positive, natural, above, from_zero = (
        number(int, 1),
        number(int, 0),
        number(float, 0, above=True),
        number(float, 0),
    )

    added = commands.add_parser(
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common(added, positive, natural, above, from_zero)
    added.add_argument(
        "--prompts-at-once",
        type=positive,
        default=1,
        metavar="N",
        help="prompts whose completions are scheduled together (1)",
    )

    added = commands.add_parser(
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
            " questions.jsonl --reward rewards:exact --group 16 --slots 4 --steps 100 --out"
            " tuned\n\nrewards.py: def exact(prompts, completions, **columns): return [number,"
            " ...]\ncolumns: what else stands on the prompts' lines, a list each"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common(added, positive, natural, above, from_zero)
    group = added.add_argument_group("GRPO")
    group.add_argument(
        "--reward",
        required=True,
        metavar="MODULE:FUNCTION",
        help="gives a list of numbers from prompts and completions",
    )
    group.add_argument("--steps", type=positive, default=100, metavar="N", help="(100)")
    group.add_argument("--prompts-per-step", type=positive, default=1, metavar="N", help="(1)")
    group.add_argument(
        "--updates", type=positive, default=1, metavar="N", help="optimizer steps on a rollout (1)"
    )
    group.add_argument(
        "--micro-batch",
        type=positive,
        metavar="N",
        help="completions in a backward; for memory only (--slots)",
    )
    group.add_argument(
        "--loss",
        choices=("grpo", "dapo", "dr_grpo"),
        default="grpo",
        help="how tokens are averaged (grpo)",
    )
    group.add_argument("--clip", type=above, default=0.2, metavar="X", help="of the ratio (0.2)")
    group.add_argument(
        "--beta",
        type=from_zero,
        default=0.0,
        metavar="X",
        help="weight of the divergence from the first model (0)",
    )
    group.add_argument("--lr", type=from_zero, help="learning rate of AdamW (1e-6; with LoRA 1e-5)")
    group.add_argument("--weight-decay", type=from_zero, default=0.0, metavar="X", help="(0)")
    group.add_argument("--max-grad-norm", type=above, default=1.0, metavar="X", help="(1)")
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
        "--checkpoint-every",
        type=positive,
        default=1,
        metavar="N",
        help="steps that a crash may cost (1)",
    )
    return parser


def _common(
    parser: argparse.ArgumentParser,
    positive: object,
    natural: object,
    above: object,
    from_zero: object,
) -> None:
    option = parser.add_argument
    option(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="a model folder, smollm2-135m, or a hub id in your hub cache",
    )
    option("--prompts", required=True, type=Path, metavar="FILE", help=".jsonl or .txt")
    option("--out", required=True, type=Path, metavar="DIR", help="where what comes of it goes")
    option("--group", type=positive, default=8, metavar="G", help="completions of a prompt (8)")
    option("--max-new-tokens", type=positive, default=256, metavar="N", help="(256)")
    option(
        "--temperature",
        type=from_zero,
        default=1.0,
        metavar="X",
        help="0 takes the likeliest token (1)",
    )
    option(
        "--stop",
        action="append",
        metavar="TEXT",
        help="a string that ends a completion; may be given several times",
    )
    option("--seed", type=natural, default=0, metavar="N", help="(0)")
    group = parser.add_argument_group("schedule (changes speed and memory, and no completion)")
    option = group.add_argument
    option(
        "--slots",
        type=positive,
        default=8,
        metavar="M",
        help="rows of the cache, at most --group (8)",
    )
    option(
        "--mode",
        choices=("full", "micro", "continuous", "dynamic"),
        default="continuous",
        help="(continuous)",
    )
    option(
        "--refill",
        choices=("fifo", "sjf_global", "lpt_global", "plan_static", "plan_sjf", "plan_lpt"),
        help=(
            "which completion a freed row takes (plan_sjf, the paper's; lpt_global in mode dynamic)"
        ),
    )
    option(
        "--predictor",
        choices=("none", "constant", "transformer", "ridge"),
        default="transformer",
        help="of lengths (transformer)",
    )
    option(
        "--prefix",
        type=natural,
        default=16,
        metavar="K",
        help="tokens of each completion that it sees (16)",
    )
    option("--eps", type=above, default=0.1, metavar="X", help="of the plan (0.1)")
    option(
        "--budget-tokens",
        type=positive,
        metavar="N",
        help="of mode dynamic: tokens of cache (as many as --slots rows have)",
    )
    option(
        "--page",
        type=positive,
        default=16,
        metavar="N",
        help="of mode dynamic: tokens in a page (16)",
    )
    option(
        "--fixed-shape",
        action="store_true",
        help="the same completions bit for bit in float32 under any schedule; slower",
    )
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="(float32)"
    )
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="of the computation (torch's default)"
    )


if __name__ == "__main__":
    sys.exit(main())
