"""Options of a command, refused in one line. No torch before a device is asked for."""

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from shared.errors import UserError

if TYPE_CHECKING:
    import torch


LARGEST = 3.4e38  # a float of an option is within float32, and its square within float64


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and has `--debug`; so have the parsers of its
    commands. Descriptions and examples keep their line breaks.

    Raises UserError for a wrong option.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # a command's parser must not undo what stood before it
            help="show the traceback of an error",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def number(
    kind: type[int] | type[float],
    least: float = -math.inf,
    above: bool = False,
    most: float = math.inf,
    below: bool = False,
) -> Callable[[str], float]:
    """The `type` of an option that is a finite number.

    Args:
        kind: int or float.
        least: the number must be at least this, or with `above` more.
        most: the number must be at most this, or with `below` less.
    """
    if kind is int and most == math.inf:
        most = 2**63 - 1  # torch and numpy take no more
    bounds = []
    if least > -math.inf:
        bounds.append(f"above {least:g}" if above else f"of at least {least:g}")
    if most not in (math.inf, 2**63 - 1):
        bounds.append(f"below {most:g}" if below else f"at most {most:g}")
    wanted = f"a{'n integer' if kind is int else ' number'} {' and '.join(bounds)}".rstrip()

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if kind is float and value is not None and LARGEST < abs(value) < math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is beyond what float32 holds")
        if (
            value is None
            or (kind is float and not math.isfinite(value))
            or not (value > least if above else value >= least)
            or not (value < most if below else value <= most)
        ):
            raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}")
        return value

    return convert


def device_of(name: str) -> "torch.device":
    """The device of `--device`: cpu, or a GPU with its number (torch sets budgets on nothing else).

    Raises UserError for any other, and for a GPU where torch sees none.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch sees no GPU")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
