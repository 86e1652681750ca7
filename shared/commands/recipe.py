"""Options taken from the fields of a recipe: type, default, bounds, choices and help stand once.

class Recipe(shared.commands.recipe.Recipe):
    steps: int = Field(1000, ge=1)
    '''steps in all; may grow later'''

    lr: float | None = Field(None, ge=0)
    '''learning rate (1e-6; with LoRA 1e-4)'''

    dtype: Literal["float32", "bfloat16"] = "float32"
    '''to compute in and to save'''

add_options(parser, Recipe, "steps", "lr")       # --steps N, --lr X
recipe = Recipe.from_options(options, lr=1e-6 if options.lr is None else options.lr)
"""

import argparse
import json
import math
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from shared.commands.options import number
from shared.errors import UserError


@dataclass(frozen=True)
class Metavar:
    """What stands for the value in `--help`, where N, X, FILE or NAME does not do:
    `rank: Annotated[int | None, Metavar("R")] = None`.
    """

    text: str


class Recipe(BaseModel):
    """The settings that decide what a command makes. Frozen; unknown fields, wrong types and
    numbers that are not finite are refused. The text under a field is its description and the
    option's help.

    Checks of several fields belong in a `@model_validator(mode="after")` that raises ValueError
    with the user's line ("--lora-alpha needs --lora-rank").
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @classmethod
    def from_options(cls, options: argparse.Namespace, **values: Any) -> Self:
        """From parsed options; the rest of the namespace is not looked at.

        Args:
            options: has an attribute for each field that is an option.
            values: fields that are computed, or whose default depends on other options; they go
                before `options`.

        Raises:
            UserError: a field is wrong, in terms of its option.
        """
        given = {field: getattr(options, field) for field in cls.model_fields if field in options}
        try:
            return cls.model_validate({**given, **values})
        except ValidationError as error:
            raise UserError("; ".join(_sentences(error))) from None

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> Self:
        """From the JSON of `record()` in a log or a run's file.

        Raises UserError that begins with `where`: a field is missing, unknown or wrong.
        """
        try:
            return cls.model_validate_json(json.dumps(record))
        except (ValidationError, TypeError) as error:
            said = _sentences(error) if isinstance(error, ValidationError) else [str(error)]
            raise UserError(
                f"{where}: {'; '.join(said)}; it is damaged or of another version"
            ) from None

    def record(self) -> dict[str, Any]:
        """As JSON: what a run writes down of itself, and compares when it goes on."""
        values: dict[str, Any] = self.model_dump(mode="json")
        return values


def option_name(field: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + field.replace("_", "-")


def add_options(group: Any, recipe: type[Recipe], *fields: str) -> None:
    """Give a parser, or a group of it, an option for each of the recipe's fields named, or for all.

    A field without a default is required. The help is the field's description, followed by its
    default; where that is None the description says what it comes to. `Literal` gives choices,
    `bool` a switch (`--no-...` where it is on), `list` an option that may be repeated.
    """
    for field in fields or recipe.model_fields:
        info = recipe.model_fields[field]
        group.add_argument(option_name(field), **_argument(field, info))


def _argument(field: str, info: FieldInfo) -> dict[str, Any]:
    """The keyword arguments of `add_argument`."""
    kind = _without_none(info.annotation)
    text = (info.description or "").replace("%", "%%")
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    if kind is bool:
        if default is None:
            raise TypeError(f"{field}: a switch needs a default")
        action: Any = argparse.BooleanOptionalAction if default else "store_true"
        return {"action": action, "default": default, "help": text}
    if default is not None and default != []:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        text = f"{text} ({shown})".lstrip()
    argument: dict[str, Any] = {"help": text}
    if info.is_required():
        argument["required"] = True
    else:
        argument["default"] = default
    if get_origin(kind) is list:
        argument["action"] = "append"
        if default:
            raise TypeError(f"{field}: a list that is an option begins empty; argparse appends")
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        argument["choices"] = choices
        argument["type"] = type(choices[0])
        return argument
    metavar = next((m.text for m in info.metadata if isinstance(m, Metavar)), None)
    if kind in (int, float):
        argument["type"] = number(kind, **_bounds(info))
        argument["metavar"] = metavar or ("N" if kind is int else "X")
    elif kind in (str, Path):
        argument["type"] = kind
        argument["metavar"] = metavar or ("NAME" if kind is str else "FILE")
    else:
        raise TypeError(f"{field}: no option is made of a {kind}")
    return argument


def _without_none(annotation: Any) -> Any:
    """`int | None` -> int."""
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(annotation) if part is not types.NoneType)
        return kind
    return annotation


def _bounds(info: FieldInfo) -> dict[str, Any]:
    """As arguments of `number`."""
    bounds: dict[str, Any] = {"least": -math.inf}
    for part in info.metadata:
        match part:
            case Ge():
                bounds["least"] = part.ge
            case Gt():
                bounds.update(least=part.gt, above=True)
            case Le():
                bounds["most"] = part.le
            case Lt():
                bounds.update(most=part.lt, below=True)
    return bounds


def _sentences(error: ValidationError) -> Iterator[str]:
    """What pydantic found, in terms of options."""
    for detail in error.errors(include_url=False):
        message = detail["msg"].removeprefix("Value error, ")
        if not detail["loc"]:
            yield message
            continue
        option = option_name(str(detail["loc"][0]))
        if detail["type"] == "missing":
            yield f"{option} is missing"
        elif detail["type"] == "extra_forbidden":
            yield f"{option} is unknown"
        else:
            given = textwrap.shorten(str(detail["input"]), 60, placeholder=" ...")
            yield f"{option} {given}: {message[0].lower()}{message[1:]}"
