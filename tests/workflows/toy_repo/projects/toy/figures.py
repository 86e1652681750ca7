"""Figures of the toy paper."""

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pandas import DataFrame


def squares(squares: DataFrame) -> Figure:
    """Squares grow & <grow>.

    This paragraph is not part of the caption.
    """
    figure, axes = plt.subplots()
    axes.plot(squares["number"], squares["square"], marker="o", label="squares")
    axes.legend()
    return figure
