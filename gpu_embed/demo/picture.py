"""The demo's picture: a 2-D table that learns, and two loss curves with their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from .. import plot
from ..plot import GREY, draw_legend

TORCH_COLOUR = "#f4a582"
OUR_COLOUR = "#0b3c6f"


def draw(
    words: Sequence[str],
    before: Tensor,
    after: Tensor,
    losses: Mapping[str, Sequence[float]],
    guessing: float,
) -> Figure:
    """Draw the words' rows before and after, and the losses: torch's first, then ours."""
    figure = Figure(figsize=(13, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(
        [["table", "loss"], ["table", "difference"]], height_ratios=[3, 1.2]
    )
    draw_losses(axes["loss"], losses, guessing)
    draw_difference(axes["difference"], *losses.values())
    # Last, as labels find their places in a picture that is done.
    plot.table(
        after,
        words,
        before=before,
        axes=axes["table"],
        title="The rows of Embedding(7, 2): words with the same neighbours meet",
    )
    return figure


def draw_losses(axes: Axes, losses: Mapping[str, Sequence[float]], guessing: float) -> None:
    """Draw both curves, the second thin on top of the first, and what guessing would give."""
    styles = ((TORCH_COLOUR, 4.0), (OUR_COLOUR, 0.9))
    entries = []
    for (name, values), (colour, width) in zip(losses.items(), styles, strict=True):
        entries.append((draw_steps(axes, values, color=colour, linewidth=width), name))
    level = axes.axhline(guessing, color=GREY, linestyle="--", linewidth=1)
    entries.append((level, "guessing by word frequency"))
    axes.set_title("Guessing the next word of Python's documentation")
    axes.set_ylabel("loss (nats per word)")
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.3)
    draw_legend(axes, entries, loc="upper right")


def draw_difference(axes: Axes, theirs: Sequence[float], ours: Sequence[float]) -> None:
    """Draw our loss minus torch's, step by step."""
    difference = np.asarray(ours) - np.asarray(theirs)
    largest = float(np.abs(difference).max())
    draw_steps(axes, difference, color=OUR_COLOUR, linewidth=1)
    if largest == 0:
        axes.set_title("Difference of the two: none, bit-identical at every step", fontsize=11)
        axes.set_yticks([0])
    else:
        axes.set_title(f"Difference of the two: at most {largest:.2g}", fontsize=11)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.set_xlabel("training step")
    axes.set_ylabel("loss difference\n(nats)")
    axes.grid(alpha=0.3)


def draw_steps(axes: Axes, values: Sequence[float] | np.ndarray, **style: Any) -> Line2D:
    """Draw one value per training step."""
    # A line through one point is invisible.
    marker = "o" if len(values) == 1 else None
    (line,) = axes.plot(range(1, len(values) + 1), values, marker=marker, **style)
    return line
