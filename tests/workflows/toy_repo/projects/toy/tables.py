"""Tables of the toy paper."""

from pandas import DataFrame

from shared.tables import Column, Table, paper_numbers


def squares(squares: DataFrame) -> Table:
    columns = {"number": "number", "square": Column("its square", "{:,}"), "mode": "<mode>"}
    return Table(
        "Squares",
        "Squares & <numbers>.",
        squares,
        columns,
        paper_numbers("toy", "squares"),
        notes=["a note"],
    )


def both(squares: DataFrame, slow: DataFrame) -> Table:
    return Table(
        "Both", "Two experiments.", squares.assign(slept_seconds=slow["slept_seconds"].iloc[0])
    )
