"""Tables: what was measured first, the paper's own numbers under it, in Markdown, CSV, LaTeX and
HTML.

A paper's `tables.py` has one plain function per table: experiments' rows in, `Table` out. It reads
no files and measures nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from shared import manifest, paths, provenance, rows
from shared.errors import UserError
from shared.files import atomic_write

NOT_AVAILABLE = "paper: not available"
Format = str | Callable[[float], str]


class Column(NamedTuple):
    """How to show one column: its heading, and a format ("{:.3f}" or a function); without one, the
    unit in its name decides.
    """

    label: str
    format: Format | None = None


@dataclass(frozen=True)
class Table:
    """A table of measured rows, and the paper's own numbers for it.

    Attributes:
        frame: what was measured, one row per line, raw numbers.
        columns: the columns to show, in order, by name in `frame`; empty shows all. A plain text is
            a heading.
        paper: the paper's own numbers (`paper_numbers`), or None where we had no access to them.
        predicted: the frame was computed from a model, and nothing in it was measured; the table
            says so.
        scale, device: filled in by `build` from the rows' provenance.
    """

    title: str
    caption: str
    frame: pd.DataFrame
    columns: Mapping[str, Column | str] = field(default_factory=dict)
    paper: pd.DataFrame | None = None
    notes: Sequence[str] = ()
    predicted: bool = False
    scale: str = ""
    device: str = ""

    def __post_init__(self) -> None:
        absent = [name for name in self.columns if name not in self.frame.columns]
        if absent:
            raise ValueError(
                f"table '{self.title}' shows columns that its frame lacks: {', '.join(absent)}"
            )

    @property
    def heading(self) -> str:
        """Scale and device: what a reader must know before comparing a number."""
        if self.predicted:
            return "Predicted, not measured"
        return f"Measured at scale {self.scale} on {self.device}" if self.scale else "Measured"

    def to_markdown(self) -> str:
        """GitHub Markdown."""
        parts = [
            f"### {self.title}",
            self.caption,
            f"**{self.heading}**",
            _markdown(*self.shown(self.frame)),
        ]
        if self.paper is None:
            parts.append(f"*{NOT_AVAILABLE}*")
        else:
            parts += ["**The paper's own numbers**", _markdown(*self.shown(self.paper))]
        return "\n\n".join([*parts, *(f"- {note}" for note in self.notes)]) + "\n"

    def to_csv(self) -> str:
        """Raw numbers, unformatted; the first column says `measured` (or `predicted`) or
        `paper`.
        """
        frames = [self.frame[list(self.columns)] if self.columns else self.frame]
        origins = ["predicted" if self.predicted else "measured"]
        if self.paper is not None:
            frames.append(self.paper)
            origins.append("paper")
        for frame, origin in zip(frames, origins, strict=True):
            if "origin" in frame.columns:
                raise ValueError(
                    f"table '{self.title}': the column name 'origin' is taken ({origin})"
                )
        # without attrs, which concat would compare
        plain = [pd.DataFrame(frame.to_dict("list")) for frame in frames]
        return str(
            pd.concat(plain, keys=origins, names=["origin", None])
            .reset_index(level=0)
            .to_csv(index=False, lineterminator="\n")
        )

    def to_latex(self) -> str:
        """A booktabs table, ready to \\input."""
        parts = [_latex(*self.shown(self.frame))]
        if self.paper is not None:
            parts += [r"\par\medskip The paper's own numbers\par", _latex(*self.shown(self.paper))]
        else:
            parts.append(rf"\par {_latex_escape(NOT_AVAILABLE)}")
        notes = " ".join([self.caption, self.heading + ".", *self.notes])
        body = "\n".join(parts)
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{_latex_escape(self.title)}."
            f" {_latex_escape(notes)}}}\n{body}\n\\end{{table}}\n"
        )

    def to_html(self) -> str:
        """A fragment for the report; every text is escaped."""
        parts = [
            f"<h4>{escape(self.title)}</h4>",
            f'<p class="caption">{escape(self.caption)}</p>',
            f'<p class="where">{escape(self.heading)}</p>',
        ]
        parts.append(_html(*self.shown(self.frame)))
        if self.paper is None:
            parts.append(f'<p class="where absent">{NOT_AVAILABLE}</p>')
        else:
            parts += [
                '<p class="where">The paper’s own numbers</p>',
                _html(*self.shown(self.paper)),
            ]
        if self.notes:
            parts.append(
                '<ul class="notes">'
                + "".join(f"<li>{escape(note)}</li>" for note in self.notes)
                + "</ul>"
            )
        return "\n".join(parts) + "\n"

    def shown(self, frame: pd.DataFrame) -> tuple[list[str], list[list[str]], list[bool]]:
        """Headings, formatted cells, and which columns are numbers. The paper's frame has columns
        of its own beside shared ones.
        """
        names = (
            [name for name in self.columns if name in frame.columns]
            if self.columns
            else list(frame.columns)
        )
        if frame is self.paper:
            names += [name for name in frame.columns if name not in names]
        styles = [self.columns.get(name, name) for name in names]
        columns = [
            style if isinstance(style, Column) else Column(style if style != name else _label(name))
            for name, style in zip(names, styles, strict=True)
        ]
        numeric = [
            pd.api.types.is_numeric_dtype(frame[name])
            and not pd.api.types.is_bool_dtype(frame[name])
            for name in names
        ]
        cells = [
            [_cell(value, column.format, name) for value in frame[name]]
            for name, column in zip(names, columns, strict=True)
        ]
        return (
            [column.label for column in columns],
            [list(line) for line in zip(*cells, strict=True)],
            numeric,
        )


def human_bytes(value: float) -> str:
    """1500000 -> '1.50 MB' (powers of 1000)."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{_short(value / size)} {unit}"
    return f"{value:.0f} B"


def human_seconds(value: float) -> str:
    """0.00123 -> '1.23 ms'."""
    if value == 0 or abs(value) >= 1:
        return f"{_short(value)} s"
    for size, unit in ((1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= size:
            return f"{_short(value / size)} {unit}"
    return f"{_short(value / 1e-9)} ns"


def human_share(value: float) -> str:
    """0.1234 -> '12.3 %'."""
    return f"{100 * value:.1f} %"


_BY_UNIT: dict[str, Format] = {
    "bytes": human_bytes,
    "seconds": human_seconds,
    "share": human_share,
    "accuracy": human_share,
    "ratio": "{:.3f}",
    "tokens_per_second": "{:,.0f}",
}


def paper_numbers(paper: str, name: str) -> pd.DataFrame:
    """The paper's own numbers, from `projects/<paper>/paper/<name>.csv`. Every row must say where
    its numbers stand in `source`.
    """
    file = paths.PROJECTS / paper / "paper" / f"{name}.csv"
    try:
        frame = pd.read_csv(file, skipinitialspace=True)
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing; without the paper's numbers give the table paper=None"
        ) from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{file}: not a CSV table: {' '.join(str(error).split())}") from None
    if "source" not in frame.columns:
        raise UserError(
            f"{file} has no column 'source'; every number of a paper names where it stands"
        )
    empty = frame["source"].isna() | (frame["source"].astype(str).str.strip() == "")
    if empty.any():
        raise UserError(f"{file}: line {empty.tolist().index(True) + 2} has no source")
    return frame


def frames(
    paper: str, scale: str, experiments: Sequence[str], results_dir: Path
) -> dict[str, pd.DataFrame]:
    """The rows of experiments, by name, validated. UserError for a missing or broken file."""
    return {
        name: rows.read_frame(rows.rows_path(results_dir, scale, paper, name))
        for name in experiments
    }


def make(paper: str, name: str, scale: str, results_dir: Path) -> Table:
    """One table of a paper from the rows at `scale`."""
    function = manifest.bound_function(paper, "tables", name)
    measured = frames(paper, scale, manifest.manifest(paper).tables[name], results_dir)
    table = function(**measured)
    if not isinstance(table, Table):
        raise UserError(
            f"projects/{paper}/tables.py: {name} must return a shared.tables.Table, not"
            f" {type(table).__name__}"
        )
    devices = dict.fromkeys(
        provenance.device(frame.attrs["provenance"]) for frame in measured.values()
    )
    return replace(table, scale=scale, device="; ".join(devices))


def build(paper: str, scale: str, results_dir: Path) -> list[Path]:
    """Write every table whose experiments run at `scale`, as `tables/<name>.{md,csv,tex,html}` in
    the paper's results.

    Raises:
        UserError: rows are missing; the tables that do not need them are written all the same.
    """
    written = []
    complete, missing = with_rows(paper, scale, "tables", results_dir)
    for name in complete:
        table = make(paper, name, scale, results_dir)
        for suffix, text in (
            ("md", table.to_markdown()),
            ("csv", table.to_csv()),
            ("tex", table.to_latex()),
            ("html", table.to_html()),
        ):
            path = results_dir / scale / paper / "tables" / f"{name}.{suffix}"
            atomic_write(path, text.encode())
            written.append(path)
    if missing:
        raise UserError(missing)
    return written


def with_rows(paper: str, scale: str, kind: str, results_dir: Path) -> tuple[list[str], str]:
    """Names of the tables or figures (`kind`) of a scale whose rows are all there, and a sentence
    about the others, or nothing.
    """
    complete, missing = [], {}
    for name, experiments in manifest.ready(paper, scale, kind).items():
        absent = [
            one
            for one in experiments
            if not rows.rows_path(results_dir, scale, paper, one).exists()
        ]
        if absent:
            missing.update(dict.fromkeys(absent, name))
        else:
            complete.append(name)
    if not missing:
        return complete, ""
    first = next(iter(missing))
    return (
        complete,
        (
            f"no rows of {', '.join(missing)} for the other {kind}; make them: repro run"
            f" {paper}/{first} --scale {scale}"
        ),
    )


def _short(value: float) -> str:
    """Three or four significant digits, without an exponent."""
    return (
        f"{value:.2f}"
        if abs(value) < 100
        else f"{value:.1f}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )


def _label(name: str) -> str:
    """A heading for a column that was given none: its name without the unit that the cells show
    themselves.
    """
    for unit in ("bytes", "seconds"):
        name = name.removesuffix("_" + unit)
    return name.replace("_", " ")


def _cell(value: object, style: Format | None, name: str) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return (
            {True: "yes", False: "no"}[value]
            if isinstance(value, bool)
            else str(value)
            if style is None or callable(style)
            else style.format(value)
        )
    if style is None:
        units = sorted(
            (unit for unit in _BY_UNIT if name == unit or name.endswith("_" + unit)), key=len
        )
        style = _BY_UNIT[units[-1]] if units else ("{:,}" if isinstance(value, int) else "{:.4g}")
    return style(value) if callable(style) else style.format(value)


def _markdown(headings: list[str], lines: list[list[str]], numeric: list[bool]) -> str:
    table = [headings, ["---:" if number else "---" for number in numeric], *lines]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in table
    )


def _html(headings: list[str], lines: list[list[str]], numeric: list[bool]) -> str:
    kinds = [' class="number"' if number else "" for number in numeric]
    head = "".join(
        f"<th{kind}>{escape(text)}</th>" for text, kind in zip(headings, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(text)}</td>" for text, kind in zip(line, kinds, strict=True))
        + "</tr>"
        for line in lines
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _latex(headings: list[str], lines: list[list[str]], numeric: list[bool]) -> str:
    text = [" & ".join(map(_latex_escape, line)) + r" \\" for line in (headings, *lines)]
    shape = "".join("r" if number else "l" for number in numeric)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{shape}}}",
            r"\toprule",
            text[0],
            r"\midrule",
            *text[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
        "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "µ": r"\textmu{}",
        "’": "'",
    }
)  # fmt: skip


def _latex_escape(text: str) -> str:
    return text.translate(_LATEX)
