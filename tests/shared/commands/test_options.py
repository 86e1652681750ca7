"""Options are taken in bounds, and refused in one line."""

import argparse

import pytest

from shared.commands.options import Parser, number
from shared.errors import UserError


@pytest.mark.parametrize(
    ("kind", "least", "above", "text", "value"),
    [
        (int, 1, False, "1", 1),
        (int, 0, False, "0", 0),
        (float, 0, False, "0", 0.0),
        (float, 0, True, "1e-9", 1e-9),
        (float, -1, False, "-1", -1.0),
    ],
)
def test_a_number_in_bounds_is_taken(
    kind: type, least: float, above: bool, text: str, value: float
) -> None:
    found = number(kind, least, above)(text)
    assert found == value
    assert type(found) is kind


@pytest.mark.parametrize(
    ("kind", "least", "above", "text", "message"),
    [
        (int, 1, False, "0", "'0' is not an integer of at least 1"),
        (int, 1, False, "1.5", "'1.5' is not an integer of at least 1"),
        (float, 0, True, "0", "'0' is not a number above 0"),
        (float, 0.5, False, "0.4", "'0.4' is not a number of at least 0.5"),
        *(
            (float, 0, False, text, f"'{text}' is not a number of at least 0")
            for text in ("nan", "inf", "-inf", "-1", "many", "")
        ),
    ],
)
def test_a_number_out_of_bounds_is_refused(
    kind: type, least: float, above: bool, text: str, message: str
) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        number(kind, least, above)(text)
    assert str(caught.value) == message


def test_a_bad_option_is_one_line_that_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="tool")
    command = parser.add_subparsers(required=True, parser_class=Parser).add_parser("go")
    command.add_argument("--steps", type=number(int, 1))
    assert parser.parse_args(["go", "--steps", "3"]).steps == 3
    with pytest.raises(UserError) as caught:
        parser.parse_args(["go", "--steps", "0"])
    assert (
        str(caught.value)
        == "argument --steps: '0' is not an integer of at least 1 (see tool go --help)"
    )
    with pytest.raises(UserError, match=r"\(see tool --help\)$"):
        parser.parse_args(["stop"])
    assert capsys.readouterr() == ("", "")
