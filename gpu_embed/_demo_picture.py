"""The demo's picture: a 2-D table that learns, and two loss curves with their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .plot import place_labels

GREY = "#777777"
TORCH_COLOUR = "#f4a582"
OUR_COLOUR = "#0b3c6f"


def draw(
    words: Sequence[str],
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    losses: Mapping[str, Sequence[float]],
    guessing: float,
) -> Figure:
    """Draw the words' rows before and after, and the losses: torch's first, then ours."""
    figure = Figure(figsize=(13, 6.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(
        [["table", "loss"], ["table", "difference"]], height_ratios=[3, 1.2]
    )
    draw_losses(axes["loss"], losses, guessing)
    draw_difference(axes["difference"], *losses.values())
    draw_moves(axes["table"], before, after)
    # Only now are all places final, in pixels.
    canvas.draw()
    label_moves(axes["table"], canvas, words, np.asarray(before), np.asarray(after))
    return figure


def draw_moves(
    axes: Axes, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> None:
    """Draw an arrow for each row, from where it started to where it ended."""
    for i, (start, end) in enumerate(zip(before, after, strict=True)):
        axes.plot(*start, "o", color=f"C{i}", markerfacecolor="white", markersize=7)
        axes.plot(*end, "o", color=f"C{i}", markersize=9)
        axes.annotate(
            "",
            xy=(end[0], end[1]),
            xytext=(start[0], start[1]),
            arrowprops={"arrowstyle": "->", "color": f"C{i}", "shrinkA": 4, "shrinkB": 5},
        )
    axes.plot(
        [], [], "o", color=GREY, markerfacecolor="white", markersize=7, label="before training"
    )
    axes.plot([], [], "o", color=GREY, markersize=9, label="after training")
    axes.set_title("The rows of Embedding(7, 2): words with the same neighbours meet")
    axes.set_xlabel("first value of the row")
    axes.set_ylabel("second value of the row")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)


def label_moves(
    axes: Axes, canvas: FigureCanvasAgg, words: Sequence[str], before: np.ndarray, after: np.ndarray
) -> None:
    """Write each word beside its row after the training, where nothing else stands."""
    along = np.linspace(0, 1, 40)[:, None, None]
    drawn = axes.transData.transform((before + along * (after - before)).reshape(-1, 2))
    colours = [f"C{i}" for i in range(len(words))]
    place_labels(axes, canvas, words, after, drawn, colours, fontsize=13)


def draw_losses(axes: Axes, losses: Mapping[str, Sequence[float]], guessing: float) -> None:
    """Draw both curves, the second thin on top of the first, and what guessing would give."""
    styles = ((TORCH_COLOUR, 4.0), (OUR_COLOUR, 0.9))
    for (name, values), (colour, width) in zip(losses.items(), styles, strict=True):
        draw_steps(axes, values, color=colour, linewidth=width, label=name)
    axes.axhline(
        guessing, color=GREY, linestyle="--", linewidth=1, label="guessing by word frequency"
    )
    axes.set_title("Guessing the next word of Python's documentation")
    axes.set_ylabel("loss (nats per word)")
    axes.tick_params(labelbottom=False)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


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


def draw_steps(axes: Axes, values: Sequence[float] | np.ndarray, **style: Any) -> None:
    """Draw one value per training step."""
    # A line through one point is invisible.
    axes.plot(range(1, len(values) + 1), values, marker="o" if len(values) == 1 else None, **style)
