"""The circuit of your task in your language model: which heads and MLPs do it, by which edges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.commands.main import main as run_command
from shared.commands.options import Parser
from shared.commands.recipe import Metavar, Recipe, add_options


class Discovery(Recipe):
    """The settings that decide the circuit."""

    threshold: Annotated[float, Metavar("X")] = Field(0.01)
    """an edge goes where the metric rises by less than this without it"""

    metric: Literal["kl", "task"] = "kl"
    """KL to the full model, or minus the task's margin of right over wrong answers"""

    start: Annotated[int | None, Metavar("K")] = Field(None, ge=1)
    """search among the K strongest edges by EAP-IG (all edges)"""

    steps: int = Field(5, ge=1)
    """inputs between corrupted and clean that EAP-IG averages over"""

    order: Literal["normal", "reverse"] = "normal"
    """of a receiver's senders: from the embedding on, or from the last"""

    absolute: bool = False
    """compare the size of the change"""

    policy: Literal["fp32", "rtn", "pahq-receiver", "pahq-sender", "pahq-both"] = "pahq-receiver"
    """which heads keep full precision: all; none; that of the edge's receiver, sender, or both"""

    format: Literal["int8", "bf16", "e4m3", "int4"] = "int8"
    """of what is low (int4 is simulated; e4m3 is, on a CPU)"""

    scope: Literal["qkv", "attn", "linear"] = "qkv"
    """what is low: projections of attention; all of attention; all linear layers"""

    scale: Literal["head", "channel", "none"] = "head"
    """of low weights: per head, per output channel, or unscaled"""

    ablation: Literal["corrupted", "zero"] = "corrupted"
    """what stands for a missing edge: the sender in the corrupted prompt, or zero"""

    reference: Literal["full", "same"] = "full"
    """of the KL: the model in full precision, or in the search's own"""

    prompts: int = Field(16, ge=1)
    """pairs of a built-in task (of a file: all)"""

    seed: int = Field(0, ge=0)
    """of a built-in task's prompts"""


class Work(Recipe):
    """The settings that decide how the work is done."""

    look_ahead: Annotated[int, Metavar("K")] = Field(1, ge=1)
    """removals tried at once, for the same result: worth it on a GPU"""

    masters: Literal["resident", "on demand", "prefetched"] = "resident"
    """full-precision heads: on the device; or on the host, brought when needed, or ahead"""

    device: str = "cpu"
    """cpu or cuda"""

    threads: int | None = Field(None, ge=1)
    """of the computation (torch's default)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; see `shared.commands.main.main`."""
    return run_command("pahq", parser, arguments)


TASK = "ioi, greater-than, docstring, repeated, or a .jsonl of clean, corrupted, answer, wrong"


def parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(prog="python -m projects.pahq", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _discover(commands)
    evaluate = commands.add_parser(
        "evaluate",
        help="what a circuit does on held-out prompts, in full precision",
        description=(
            "Faithfulness: the model with the circuit's edges alone. Completeness: the model"
            " without them.\nRandom edges, as many, stand beside both."
        ),
    )
    evaluate.set_defaults(function="projects.pahq.judge:evaluate")
    evaluate.add_argument("circuit", type=Path, metavar="DIR", help="folder of discover")
    _model(evaluate)
    evaluate.add_argument("--task", required=True, metavar="TASK", help=TASK)
    evaluate.add_argument(
        "--prompts", type=int, default=16, metavar="N", help="of a built-in task (16)"
    )
    evaluate.add_argument(
        "--seed", type=int, default=1000, metavar="N",
        help="of a built-in task's prompts (1000: others than discover's)",
    )  # fmt: skip
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    compare = commands.add_parser(
        "compare",
        help="two circuits of a model: agreement, ROC",
        description="How far two circuits of the same model agree, the second taken as the truth.",
    )
    compare.set_defaults(function="projects.pahq.judge:compare")
    compare.add_argument("first", type=Path, metavar="DIR", help="folder of discover")
    compare.add_argument("second", type=Path, metavar="DIR", help="folder of discover")
    return parser


def _model(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|ID",
        help="folder, hub id or smollm2-135m; Llama, Mistral, Qwen2/3, GPT-2, GPT-NeoX or OPT",
    )


def _discover(commands: "object") -> None:
    added: Parser = commands.add_parser(  # type: ignore[attr-defined]
        "discover",
        help="find a circuit",
        description=(
            "Find the edges of a model that a task needs: ACDC's greedy search, with only the head"
            " under test in\nfull precision. The same command goes on where it was stopped or"
            " killed, to the same circuit."
        ),
        epilog=(
            "examples:\n  python -m projects.pahq discover --model smollm2-135m --task ioi --start"
            " 200 --out circuit\n  python -m projects.pahq discover --model my-gpt2/ --task"
            ' pairs.jsonl --threshold 0.02 --out circuit\n\na line of pairs.jsonl: {"clean": "A'
            ' text that ends before", "corrupted": "The text that ends before",\n"answer": " this",'
            ' "wrong": " that"}; all prompts have the same number of tokens.'
        ),
    )
    added.set_defaults(function="projects.pahq.discover:discover")
    _model(added)
    added.add_argument("--task", required=True, metavar="TASK", help=TASK)
    added.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="edges, recipe, picture"
    )
    group = added.add_argument_group("the search")
    add_options(
        group, Discovery, "threshold", "metric", "start", "steps", "order", "absolute", "ablation"
    )
    group = added.add_argument_group("precision")
    add_options(group, Discovery, "policy", "format", "scope", "scale", "reference")
    group = added.add_argument_group("prompts")
    add_options(group, Discovery, "prompts", "seed")
    group = added.add_argument_group("computation")
    add_options(group, Work)
