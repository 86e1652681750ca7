"""Claims of the toy paper."""

from pandas import DataFrame

from shared.claims import Verdict, claim


@claim(
    id="toy.squares",
    claim="Squares are <b>squares</b>.",
    source="abstract",
    bound="square = number * number in every row",
    needs="the rows of toy/squares",
    paper="all",
)
def squares(squares: DataFrame) -> Verdict:
    wrong = int((squares["square"] != squares["number"] ** 2).sum())
    return Verdict("holds" if wrong == 0 else "fails", f"{wrong} wrong rows")


@claim(
    id="toy.card",
    claim="It fits.",
    source="section 3",
    bound="a row",
    needs="a GPU: --config scale=gpu",
)
def card(card: DataFrame) -> Verdict:
    return Verdict("holds" if len(card) else "fails", f"{len(card)} rows")


@claim(
    id="toy.clock",
    claim="Nothing takes no time.",
    source="section 4",
    bound="less than 1 ms",
    needs="the rows of toy/clock",
)
def clock(clock: DataFrame) -> Verdict:
    slowest = clock["step_seconds"].max()
    return Verdict("holds" if slowest < 1e-3 else "fails", f"{slowest:.2g} s")
