"""Fine-tune the user's own language model in little memory, and rebuild a run from its log."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shared.commands.main import main as run_command
from shared.commands.options import Parser, number
from shared.commands.recipe import Metavar, add_options
from shared.commands.recipe import Recipe as Base


class Recipe(Base):
    """The settings that decide which weights a run ends with. They stand in the log, from which a
    replay takes them.
    """

    sequence_length: int = Field(256, ge=2)
    """tokens in a row"""

    batch_size: int = Field(1, ge=1)
    """rows in a forward"""

    accumulate: int = Field(1, ge=1)
    """forwards whose losses a step averages"""

    lr: float | None = Field(None, ge=0)
    """learning rate (1e-6; with LoRA 1e-4)"""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """the last two end at 0"""

    warmup_steps: int = Field(0, ge=0)
    """linear warm-up"""

    eps: float = Field(1e-3, gt=0)
    """size of the perturbation"""

    weight_decay: float = Field(0.0, ge=0)
    """decoupled"""

    probe: Literal["inplace", "fresh"] | None = None
    """inplace: bitwise MeZO (that of float32); fresh: without its drift, which in bfloat16 is many
    times the update (that of bfloat16)"""

    seed: int = Field(0, ge=0)
    """of noise and order"""

    lora_rank: Annotated[int | None, Metavar("R")] = Field(None, ge=1)
    """train adapters only and save them as PEFT does"""

    lora_alpha: int | None = Field(None, ge=1)
    """scale of the adapters (2 R)"""

    lora_targets: Annotated[str | None, Metavar("A,B")] = None
    """modules to adapt, as q_proj,v_proj (all linear ones but the head)"""

    storage_dtype: (
        Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] | None
    ) = None
    """keep resting blocks in this dtype (that of --dtype)"""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """to the storage dtype"""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """to compute in and to save"""

    device: str = "cpu"
    """cpu or cuda"""

    eval_every: int | None = Field(100, ge=1)
    """steps between evaluations"""

    checkpoint_every: int = Field(100, ge=1)
    """steps between checkpoints"""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """From parsed options, with the defaults that depend on other options."""
        lora = options.lora_rank is not None
        values: dict[str, Any] = {"device": options.device.partition(":")[0]}  # whichever GPU it is
        if options.lr is None:
            values["lr"] = 1e-4 if lora else 1e-6
        if lora and options.lora_alpha is None:
            values["lora_alpha"] = 2 * options.lora_rank
        if options.probe is None:
            values["probe"] = "inplace" if options.dtype == "float32" else "fresh"
        if options.storage_dtype == options.dtype:
            values["storage_dtype"] = None
        if options.eval_data is None:
            values["eval_every"] = None
        return cls.from_options(options, **values)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.lora_rank is None and (self.lora_alpha or self.lora_targets):
            raise ValueError("--lora-alpha and --lora-targets need --lora-rank")
        if self.rounding == "stochastic" and self.storage_dtype is None:
            raise ValueError("--rounding stochastic needs a --storage-dtype narrower than --dtype")
        return self

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step in a run of `steps`."""
        assert self.lr is not None
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        along = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        match self.lr_schedule:
            case "linear":
                return self.lr * (1 - along)
            case "cosine":
                return self.lr * (1 + math.cos(math.pi * along)) / 2
        return self.lr

    def decisive(self) -> dict[str, Any]:
        """What the weights depend on, as JSON. How often a run pauses counts in low-bit storage
        alone, where an update that is applied early is rounded at another place.
        """
        pauses = () if self.storage_dtype else ("eval_every", "checkpoint_every")
        return {key: value for key, value in self.record().items() if key not in pauses}

    @property
    def weights_file(self) -> str:
        """The name of the file with what was trained."""
        return "model.safetensors" if self.lora_rank is None else "adapter_model.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; see `shared.commands.main.main`."""
    return run_command("zo2", parser, arguments)


def parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(prog="python -m projects.zo2", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
    )
    added.set_defaults(function="projects.zo2.finetune:finetune")
    add_run(added, "where the trained model and the run's log go")

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
    add_options(group, Recipe, "storage_dtype", "rounding", "dtype", "device")
    group.add_argument(
        "--threads",
        type=number(int, 1),
        metavar="N",
        help="of the computation (torch's default)",
    )

    add_training(added)

    group = added.add_argument_group("evaluation")
    group.add_argument(
        "--eval-data",
        type=Path,
        metavar="FILE",
        help="held-out .jsonl or .txt; its loss is printed",
    )
    add_options(group, Recipe, "eval_every")
    group.add_argument(
        "--eval-rows",
        type=number(int, 1),
        default=64,
        metavar="N",
        help="rows an evaluation takes at most (64)",
    )
    add_options(added.add_argument_group("faults"), Recipe, "checkpoint_every")

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
    )
    added.set_defaults(function="projects.zo2.replay:replay")
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


def add_run(added: argparse.ArgumentParser, out: str) -> None:
    """The options that say what is trained on what; `out` is the help of `--out`."""
    added.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="a model folder, smollm2-135m, or a hub id in your hub cache",
    )
    added.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help=".jsonl or .txt to train on"
    )
    added.add_argument("--out", required=True, type=Path, metavar="DIR", help=out)
    added.add_argument(
        "--steps",
        type=number(int, 1),
        default=1000,
        metavar="N",
        help="steps in all (1000); may grow later",
    )


def add_training(added: argparse.ArgumentParser) -> None:
    """The options that decide what is learnt: batches, optimiser, adapters."""
    group = added.add_argument_group("batches")
    add_options(group, Recipe, "sequence_length", "batch_size", "accumulate")
    group = added.add_argument_group("optimiser")
    add_options(group, Recipe, "lr", "lr_schedule", "warmup_steps", "eps", "weight_decay")
    add_options(group, Recipe, "probe", "seed")
    group = added.add_argument_group("LoRA")
    add_options(group, Recipe, "lora_rank", "lora_alpha", "lora_targets")
