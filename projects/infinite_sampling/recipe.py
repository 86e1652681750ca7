"""The settings of `sample` and `train`. No torch: the commands' options are made of them."""

import argparse
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shared.commands import recipe
from shared.commands.recipe import Metavar


class Recipe(recipe.Recipe):
    """What both commands take. `decisive` is the part of it on which the result depends; the rest
    is for speed and memory.
    """

    group: Annotated[int, Metavar("G")] = Field(8, ge=1)
    """completions of a prompt"""

    max_new_tokens: int = Field(256, ge=1)
    """tokens of a completion at most"""

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    """0 takes the likeliest token"""

    top_k: Annotated[int, Metavar("N")] = Field(0, ge=0)
    """draw from the N likeliest tokens alone (0: from all)"""

    top_p: Annotated[float, Metavar("P")] = Field(1.0, gt=0, le=1)
    """draw from the fewest tokens that together have probability P"""

    stop: Annotated[list[str], Metavar("TEXT")] = Field(default_factory=list)
    """a string that ends a completion; may be given several times"""

    seed: int = Field(0, ge=0)
    """from which all random numbers are derived"""

    slots: Annotated[int, Metavar("M")] = Field(8, ge=1)
    """rows of the cache, at most --group"""

    mode: Literal["full", "micro", "continuous", "dynamic"] | None = None
    """how completions take rows (dynamic; with --fixed-shape continuous)"""

    refill: (
        Literal["fifo", "sjf_global", "lpt_global", "plan_static", "plan_sjf", "plan_lpt"] | None
    ) = None
    """which completion a freed row takes, with a predictor (lpt_global; in mode continuous
    plan_sjf, the paper's)"""

    predictor: Literal["none", "constant", "transformer", "ridge"] = "none"
    """of lengths, by which a free row chooses; without one it takes the next in order"""

    prefix: Annotated[int, Metavar("K")] = Field(1, ge=0)
    """tokens of each completion that the predictor sees; those beyond the first are fed twice"""

    eps: float = Field(0.1, gt=0)
    """of the plan"""

    budget_tokens: int | None = Field(None, ge=1)
    """of mode dynamic: tokens of cache (as many as --slots rows have)"""

    page: int = Field(8, ge=1)
    """of mode dynamic: tokens in a page"""

    fixed_shape: bool = False
    """the same completions bit for bit in float32 under any schedule; slower"""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """to compute in"""

    device: str = "cpu"
    """cpu or cuda"""

    # but for the last bit of a number, for which there is `fixed_shape`
    FREE: ClassVar[tuple[str, ...]] = (
        "slots",
        "mode",
        "refill",
        "predictor",
        "prefix",
        "eps",
        "budget_tokens",
        "page",
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.slots > self.group and self.rows_mode != "dynamic":
            raise ValueError(
                f"--slots {self.slots} is more than --group {self.group}; a group fits in as many"
                " rows as it has completions"
            )
        planned = self.refill is not None and self.refill.startswith("plan_")
        if self.rows_mode == "dynamic" and planned:
            raise ValueError(
                "--mode dynamic has no planned queues: use --refill fifo, sjf_global or"
                " lpt_global, or --mode continuous"
            )
        if self.refill not in (None, "fifo") and self.predictor == "none":
            raise ValueError(
                f"--refill {self.refill} goes by predicted lengths: name a --predictor"
            )
        if self.mode == "dynamic" and self.fixed_shape:
            raise ValueError("--fixed-shape needs fixed slots: use --mode continuous")
        return self

    @property
    def rows_mode(self) -> Literal["full", "micro", "continuous", "dynamic"]:
        """`mode`, or what it is where nothing is said."""
        return self.mode or ("continuous" if self.fixed_shape else "dynamic")

    @classmethod
    def resolved(cls, options: argparse.Namespace, **values: Any) -> Self:
        """From the command line. Raises UserError where options do not fit together."""
        # which of several GPUs it is changes nothing
        return cls.from_options(options, device=options.device.partition(":")[0], **values)

    def decisive(self) -> dict[str, Any]:
        """The fields on which the result depends, as JSON."""
        return {key: value for key, value in self.record().items() if key not in self.FREE}


class SampleRecipe(Recipe):
    """Of `sample`. A group may grow: a completion depends on no other."""

    prompts_at_once: int = Field(1, ge=1)
    """prompts whose completions are scheduled together"""

    FREE: ClassVar[tuple[str, ...]] = (*Recipe.FREE, "group", "prompts_at_once")


class TrainRecipe(Recipe):
    """Of `train`. `steps` may grow.

    `lr` may be left out as an option; `resolved` works it out.
    """

    group: Annotated[int, Metavar("G")] = Field(8, ge=2)
    """completions of a prompt, which are compared with one another"""

    steps: int = Field(100, ge=1)
    """steps in all; may grow later"""

    prompts_per_step: int = Field(1, ge=1)
    """prompts of a step"""

    updates: int = Field(1, ge=1)
    """optimizer steps on a rollout"""

    micro_batch: int | None = Field(None, ge=1)
    """completions in a backward; for memory only (--slots)"""

    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """how tokens are averaged"""

    clip: float = Field(0.2, gt=0)
    """of the ratio"""

    beta: float = Field(0.0, ge=0)
    """weight of the divergence from the first model"""

    lr: float = Field(None, ge=0, validate_default=True)
    """learning rate of AdamW (1e-6; with LoRA 1e-5)"""

    weight_decay: float = Field(0.0, ge=0)
    """of AdamW"""

    max_grad_norm: float = Field(1.0, gt=0)
    """longer gradients are shortened to it"""

    lora_rank: Annotated[int | None, Metavar("R")] = Field(None, ge=1)
    """train adapters only and save them as PEFT does"""

    lora_alpha: int | None = Field(None, ge=1)
    """scale of the adapters (2 R)"""

    FREE: ClassVar[tuple[str, ...]] = (*Recipe.FREE, "steps", "micro_batch")

    @model_validator(mode="after")
    def _training_fits(self) -> Self:
        if self.lora_alpha and not self.lora_rank:
            raise ValueError("--lora-alpha needs --lora-rank")
        if self.temperature == 0:
            raise ValueError(
                "--temperature 0 makes all completions of a group equal: there is nothing to learn"
                " from"
            )
        return self

    @classmethod
    def resolved(cls, options: argparse.Namespace, **values: Any) -> Self:
        """From the command line, with the defaults that depend on other options."""
        rank = options.lora_rank
        if options.lr is None:
            values["lr"] = 1e-5 if rank else 1e-6
        if rank and options.lora_alpha is None:
            values["lora_alpha"] = 2 * rank
        return super().resolved(options, **values)
