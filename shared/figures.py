"""One look for every figure, and files that are the same byte for byte when the rows are.

A paper's `figures.py` has one plain function per figure: experiments' rows in, matplotlib `Figure`
out.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

from cycler import cycler
from matplotlib import rc_context

from shared import manifest, tables
from shared.errors import UserError
from shared.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; yellow is left out, as it vanishes on
# white.
PALETTE = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "amber": "#E69F00",
    "black": "#222222",
}

STYLE: dict[str, Any] = {
    "figure.figsize": (6.0, 3.7),  # at a phone's width the labels still come out near 9 px
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    # ships with matplotlib, so that every machine draws the same glyphs
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=list(PALETTE.values())),
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 2.2,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "svg.hashsalt": "twelve-papers",  # otherwise element ids are random
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save inside this context to have the common look."""
    with rc_context(STYLE):  # type: ignore[arg-type]
        yield


def save(figure: "Figure", path: Path) -> list[Path]:
    """Write `path` as SVG and as PNG (its suffix is replaced), without dates or versions inside."""
    written = []
    with style():
        for suffix, metadata in (
            (".svg", {"Date": None, "Creator": None}),
            (".png", {"Software": None}),
        ):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], metadata=metadata, dpi=200)
            atomic_write(path.with_suffix(suffix), buffer.getvalue())
            written.append(path.with_suffix(suffix))
    return written


def make(paper: str, name: str, scale: str, results_dir: Path) -> "Figure":
    """One figure of a paper from the rows at `scale`, in the common style."""
    from matplotlib.figure import Figure

    function = manifest.bound_function(paper, "figures", name)
    measured = tables.frames(paper, scale, manifest.manifest(paper).figures[name], results_dir)
    with style():
        figure = function(**measured)
    if not isinstance(figure, Figure):
        raise UserError(
            f"projects/{paper}/figures.py: {name} must return a matplotlib Figure, not"
            f" {type(figure).__name__}"
        )
    return figure


def build(paper: str, scale: str, results_dir: Path) -> list[Path]:
    """Write every figure whose experiments run at `scale`, as `figures/<name>.{svg,png}` in the
    paper's results.

    Raises:
        UserError: rows are missing; the figures that do not need them are written all the same.
    """
    from matplotlib import pyplot

    written = []
    complete, missing = tables.with_rows(paper, scale, "figures", results_dir)
    for name in complete:
        figure = make(paper, name, scale, results_dir)
        written += save(figure, results_dir / scale / paper / "figures" / name)
        pyplot.close(figure)
    if missing:
        raise UserError(missing)
    return written
