"""Type, default, bounds, choices and help of an option stand once: in the recipe."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from shared.commands.options import Parser
from shared.commands.recipe import Metavar, Recipe, add_options
from shared.errors import UserError


class Toy(Recipe):
    steps: int = Field(1000, ge=1)
    """steps in all"""

    lr: float | None = Field(None, gt=0, lt=1)
    """learning rate, below 100 % (1e-6; with LoRA 1e-4)"""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """to compute in"""

    ranks: Literal[1, 2] = 1
    """of the mesh"""

    rank: Annotated[int | None, Metavar("R")] = Field(None, ge=1)
    """of the adapters"""

    stop: list[str] = Field(default_factory=list)
    """a string that ends it; may be repeated"""

    fixed: bool = False
    """the same shapes always"""

    shuffle: bool = True
    """a new order in each pass"""

    file: Path | None = None
    """held-out data"""

    eps: float = 1e-3
    """size of the step"""

    flush: int | None = None
    """computed, not an option"""

    @model_validator(mode="after")
    def together(self) -> "Toy":
        if self.lr is None and self.rank is not None:
            raise ValueError("--rank needs --lr")
        return self


OPTIONS = [name for name in Toy.model_fields if name != "flush"]


def parse(*arguments, fields=OPTIONS, recipe=Toy):
    parser = Parser(prog="tool")
    add_options(parser, recipe, *fields)
    return parser.parse_args(arguments)


def test_without_options_a_recipe_has_its_defaults():
    assert Toy.from_options(parse()) == Toy()


def test_options_become_fields_of_their_type():
    options = parse(
        "--steps", "3", "--lr", "0.5", "--dtype", "bfloat16", "--ranks", "2", "--rank", "4",
        "--stop", "a", "--stop", "b", "--fixed", "--no-shuffle", "--file", "x.txt", "--eps", "1",
    )  # fmt: skip
    recipe = Toy.from_options(options, flush=7)
    assert recipe.model_dump() == {
        "steps": 3,
        "lr": 0.5,
        "dtype": "bfloat16",
        "ranks": 2,
        "rank": 4,
        "stop": ["a", "b"],
        "fixed": True,
        "shuffle": False,
        "file": Path("x.txt"),
        "eps": 1.0,
        "flush": 7,
    }


def test_the_help_has_description_default_and_metavar():
    parser = Parser(prog="tool")
    add_options(parser, Toy)
    text = " ".join(parser.format_help().split())
    for part in (
        "--steps N steps in all (1000)",
        "--lr X learning rate, below 100 % (1e-6; with LoRA 1e-4) --dtype",
        "--dtype {float32,bfloat16} to compute in (float32)",
        "--rank R of the adapters --stop",
        "--fixed the same shapes always --shuffle",
        "--file FILE held-out data",
        "--eps X size of the step (0.001)",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' is not an integer of at least 1"),
        (["--lr", "0"], "argument --lr: '0' is not a number above 0 and below 1"),
        (["--lr", "1"], "argument --lr: '1' is not a number above 0 and below 1"),
        (["--eps", "nan"], "argument --eps: 'nan' is not a number"),
        (["--eps=-inf"], "argument --eps: '-inf' is not a number"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_a_value_out_of_bounds_is_refused_before_anything_else(arguments, message):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert message in str(caught.value)


def test_a_field_without_a_default_is_required():
    class Needs(Recipe):
        epsilon: float
        """to spend"""

    with pytest.raises(UserError, match="the following arguments are required: --epsilon"):
        parse(recipe=Needs, fields=())
    assert Needs.from_options(parse("--epsilon", "2", recipe=Needs, fields=())).epsilon == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps 0: input should be greater than or equal to 1"),
        ({"lr": float("nan")}, "--lr nan: input should be a finite number"),
        ({"rank": 2}, "--rank needs --lr"),
        ({"momentum": 1}, "--momentum is unknown"),
        ({"steps": "3"}, "--steps 3: input should be a valid integer"),
    ],
)
def test_what_pydantic_refuses_is_one_line_about_options(values, message):
    with pytest.raises(UserError) as caught:
        Toy.from_options(parse(), **values)
    assert str(caught.value) == message


def test_a_record_reads_back_and_damage_is_one_line():
    recipe = Toy(lr=0.5, file=Path("a"), stop=["x"])
    assert Toy.from_record(recipe.record(), "log, line 1") == recipe
    with pytest.raises(
        UserError, match=r"^log, line 1: --steps x: .*; it is damaged or of another"
    ):
        Toy.from_record({**recipe.record(), "steps": "x"}, "log, line 1")
    with pytest.raises(UserError, match="--old-option is unknown"):
        Toy.from_record({**recipe.record(), "old_option": 1}, "log, line 1")
    with pytest.raises(UserError, match="damaged"):
        Toy.from_record({"steps": {1}}, "log, line 1")  # type: ignore[dict-item]


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Toy().steps = 3
