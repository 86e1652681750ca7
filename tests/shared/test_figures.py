"""Figures: one look, and the same bytes for the same rows."""

import subprocess
import sys

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from shared import figures
from shared.errors import UserError
from shared.experiment import run_experiment


def draw():
    with figures.style():
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3], [1, 4, 9], label="a")
        axes.fill_between([1, 2, 3], [1, 2, 3], alpha=0.2)
        axes.legend()
    return figure


def test_the_same_figure_is_the_same_bytes_in_another_process(tmp_path):
    here = [file.read_bytes() for file in figures.save(draw(), tmp_path / "here")]
    code = (
        "import sys, runpy; sys.argv = ['x']; m = runpy.run_path(%r);"
        " m['figures'].save(m['draw'](), __import__('pathlib').Path(%r))"
    )
    environment = {"SOURCE_DATE_EPOCH": "0", "PYTHONHASHSEED": "1"}
    subprocess.run(
        [sys.executable, "-c", code % (__file__, str(tmp_path / "there"))],
        check=True,
        env={**__import__("os").environ, **environment},
    )
    there = [(tmp_path / f"there{suffix}").read_bytes() for suffix in (".svg", ".png")]
    assert here == there


def test_no_date_and_no_version_inside(tmp_path):
    svg, png = (file.read_bytes() for file in figures.save(draw(), tmp_path / "figure"))
    assert b"<dc:date>" not in svg
    assert b"matplotlib v" not in svg.lower()
    assert b"tEXtSoftware" not in png
    assert svg.lstrip().startswith(b"<?xml")


def test_colours_are_told_apart_and_seen_on_white():
    def luminance(colour):
        red, green, blue = (
            (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in to_rgb(colour)
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert len(set(figures.PALETTE.values())) == len(figures.PALETTE)
    for colour in figures.PALETTE.values():
        assert 1.05 / (luminance(colour) + 0.05) > 2  # contrast with white


def test_build_writes_both_formats(toy, tmp_path):
    before = set(plt.get_fignums())
    run_experiment("toy", "squares", "smoke", None, tmp_path)
    written = figures.build("toy", "smoke", tmp_path)
    assert [file.name for file in written] == ["squares.svg", "squares.png"]
    assert not set(plt.get_fignums()) - before


def test_build_names_missing_rows(toy, tmp_path):
    with pytest.raises(UserError, match="no rows of squares for the other figures"):
        figures.build("toy", "smoke", tmp_path)


def test_a_function_that_returns_no_figure_is_told(write_paper, tmp_path):
    manifest = (
        "name: one\ndisplay: One\ntitle: T\nexperiments:\n  e: {title: A, minutes: 1, memory_gb:"
        " 1}\nfigures: {f: [e]}\n"
    )
    experiment = (
        "from shared import experiment\nclass Config(experiment.Config): pass\ndef run(config,"
        " run): run.row(n=1)\n"
    )
    write_paper(
        "one",
        {
            "paper.yaml": manifest,
            "scales/cpu.yaml": "e:",
            "experiments/e.py": experiment,
            "figures.py": "def f(e): return 3",
        },
    )
    run_experiment("one", "e", "cpu", None, tmp_path / "results")
    with pytest.raises(UserError, match="must return a matplotlib Figure, not int"):
        figures.make("one", "f", "cpu", tmp_path / "results")
