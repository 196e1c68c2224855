"""The pictures of a results directory: what a lookup costs, where it wins, where it does not."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gpu_embed.plot import PLAIN_TEXT, draw_legend

from .compare import (
    NOISY_MEANS,
    by_cell,
    is_ours,
    noise_of,
    our_row,
    ratio_of,
    time_of,
)
from .results import Key, Row, header_or_empty, rows_to_show
from .shapes import STEPS

T = TypeVar("T")

DPI = 110
GREY = "#666666"
# Panels beside each other; more go into the next picture.
PANELS = 3
# A curve over the vocabulary needs this many points.
FEWEST_POINTS = 3
GROWTH_RANGE = (10_000, 50_000_000)
# The growth picture wants the vocabulary to grow by at least this factor.
GROWTH_SPAN = 100
# What the names of the providers say of a step.
STEP_CAPTION = (
    "A step is forward, backward and the optimizer's update. -sparse: a sparse gradient · "
    "in-backward, fbgemm-gpu: updated inside the backward pass · the others: a gradient as large as the table"
)
# In place of the ratio of two times of which one is too noisy.
NOISY = "noisy"
# Ratios beyond this factor share the darkest colours of the heat map.
RATIO_LIMIT = 8.0


@dataclass(frozen=True)
class Style:
    """How a provider looks in every picture."""

    colour: str
    marker: str
    line: str = "-"


# Okabe and Ito's colours, told apart by colour-blind readers too. Ours are the blues.
STYLES = {
    "gpu_embed": Style("#0072B2", "o"),
    "gpu_embed-atomic": Style("#56B4E9", "<", "--"),
    "gpu_embed-sorted": Style("#003B73", ">", "--"),
    "gpu_embed-sparse": Style("#7A8FE0", "p", ":"),
    "gpu_embed-in-backward": Style("#00A6C7", "d", "-."),
    "torch": Style("#D55E00", "s"),
    "torch-sparse": Style("#8F2D00", "h", ":"),
    "torch.compile": Style("#E69F00", "D"),
    "index_add_": Style("#CC79A7", "v"),
    "liger-kernel": Style("#009E73", "^"),
    "flag-gems": Style("#000000", "X"),
    "fbgemm-gpu": Style("#8C6D00", "P"),
    "fbgemm-gpu-cpu": Style("#5C4A00", "P", "--"),
}
OTHER_OURS = ("#14507A", "#4D5B9E", "#8AB6D6", "#2E5A88", "#6C8EBF", "#1F77B4")
OTHER_RIVALS = ("#A6761D", "#7F7F7F", "#882255", "#44AA99", "#B2182B")


@dataclass(frozen=True)
class Picture:
    """A drawn figure, and the words a page puts beside it."""

    name: str  # file name without .png
    title: str
    figure: Figure


@dataclass(frozen=True)
class Skipped:
    """A kind of picture that was not drawn, or not of everything."""

    kind: str
    reason: str


def plot_directory(directory: Path) -> list[Path]:
    """Draw the directory's results into it; print what was skipped and why."""
    rows = rows_to_show(directory)
    paths = []
    skipped = []
    for item in pictures(rows, header_or_empty(directory)):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        path = directory / f"{item.name}.png"
        _save(item.figure, path)
        paths.append(path)
    for item in skipped:
        print(f"not drawn: {item.kind}: {item.reason}")
    return paths


def pictures(rows: Sequence[Row], header: Mapping[str, Any]) -> Iterator[Picture | Skipped]:
    """Every picture that the rows allow, one at a time, and why the others are missing."""
    styles = choose_styles(row.provider for row in rows)
    caption = describe_run(rows, header)
    for draw in (
        vocabulary_pictures,
        ratio_pictures,
        contention_pictures,
        growth_pictures,
        step_pictures,
    ):
        yield from draw(rows, styles, caption)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    target = io.BytesIO()
    FigureCanvasAgg(figure).print_png(target)
    return target.getvalue()


def choose_styles(providers: Iterable[str]) -> dict[str, Style]:
    """A style for each provider: the known ones always have the same, others by name."""
    found = sorted(set(providers), key=lambda name: (not is_ours(name), name))
    styles = {name: STYLES[name] for name in found if name in STYLES}
    unknown = {
        True: itertools.cycle(zip(OTHER_OURS, "<>ph*d", strict=True)),
        False: itertools.cycle(zip(OTHER_RIVALS, "*hp<>", strict=True)),
    }
    for name in found:
        if name not in styles:
            colour, marker = next(unknown[is_ours(name)])
            styles[name] = Style(colour, marker, "--" if is_ours(name) else "-")
    return {name: styles[name] for name in sorted(found, key=lambda name: _rank(name))}


def describe_run(rows: Sequence[Row], header: Mapping[str, Any]) -> str:
    """The machine, the versions and the commit, for under each picture."""

    def known(name: str) -> str:
        values = [header[name]] if header.get(name) else {getattr(row, name) for row in rows}
        return " + ".join(sorted(str(value) for value in values if value)) or "unknown"

    commit = " + ".join(part[:12] for part in known("commit").split(" + "))
    if header.get("dirty"):
        commit += " with uncommitted changes"
    parts = [known("device")]
    parts += [f"driver {header['driver']}"] if header.get("driver") else []
    parts += [f"{name} {known(name)}" for name in ("torch", "triton") if known(name) != "unknown"]
    parts.append(f"commit {commit}")
    if header.get("date"):
        parts.append(str(header["date"]))
    return " · ".join(parts)


def short_number(value: float) -> str:
    """10000 is 10k, 1677721 is 1.68M: three digits, as on an axis."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999,999 rounds to 1M, not to 1000k.
        if abs(value) >= unit * 0.9995:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


# 1. Time and bandwidth against the vocabulary


def vocabulary_pictures(
    rows: Sequence[Row], styles: Mapping[str, Style], caption: str
) -> Iterator[Picture | Skipped]:
    """ms above, % of copy bandwidth below; a column for each shape, a picture for each mode.

    Steps have a picture of their own.
    """
    curves = _curves(
        [row for row in rows if row.mode not in STEPS],
        lambda key: key._replace(vocab=0),
        lambda row: row.vocab,
        FEWEST_POINTS,
    )
    if not curves:
        yield Skipped(
            "time against vocabulary",
            f"no shape was timed at {FEWEST_POINTS} or more vocabularies",
        )
    for (set_, mode, dtype), group in _grouped(curves, lambda key: (key.set, key.mode, key.dtype)):
        pages = _pages(group)
        for page, shapes in enumerate(pages, start=1):
            title = f"Set {set_}, {mode}, {dtype}: time against vocabulary"
            figure = _vocabulary_figure(shapes, styles)
            yield _finish(
                figure,
                styles,
                title,
                _with_failures(caption, shapes),
                "vocabulary",
                set_,
                mode,
                dtype,
                page,
                len(pages),
            )


def _vocabulary_figure(
    shapes: Mapping[Key, Mapping[str, list[Row]]], styles: Mapping[str, Style]
) -> Figure:
    has_bandwidth = any(
        row.percent_of_copy is not None and time_of(row)
        for curves in shapes.values()
        for rows in curves.values()
        for row in rows
    )
    figure, axes = _figure(2 if has_bandwidth else 1, len(shapes))
    for column, (key, curves) in enumerate(shapes.items()):
        above = axes[0][column]
        _draw_curves(above, curves, styles, lambda row: row.vocab, time_of, band=True)
        above.set_title(_shape_title(key, "vocab", "set", "mode", "dtype"), fontsize=10)
        _log_axis(above, "y", _values(curves, time_of), "{:g}".format)
        if has_bandwidth:
            below = axes[1][column]
            _draw_curves(below, curves, styles, lambda row: row.vocab, _percent)
            below.axhline(100, color=GREY, linewidth=1, linestyle=":")
            below.set_ylim(0, 1.08 * max([100.0, *_values(curves, _percent)]))
        for axis in axes[:, column]:
            _log_axis(axis, "x", _values(curves, lambda row: row.vocab), short_number)
        axes[-1][column].set_xlabel("vocabulary V (rows of the table)")
    axes[0][0].set_ylabel("time (ms), median and p20 to p80")
    if has_bandwidth:
        axes[1][0].set_ylabel("DRAM byte floor / time\n(% of measured copy bandwidth)")
    return figure


# 2. Ratio against each rival over (V, N)


def ratio_pictures(
    rows: Sequence[Row], styles: Mapping[str, Style], caption: str
) -> Iterator[Picture | Skipped]:
    """A heat map for each mode and rival; a square pools the dtypes, dims and distributions."""
    drawn = False
    rivals = [name for name in styles if not is_ours(name)]
    for operation, mode in _in_order((_operation(row), row.mode) for row in rows):
        what = mode if operation == "embedding" else f"{operation} {mode}"
        cells = by_cell(row for row in rows if (_operation(row), row.mode) == (operation, mode))
        for rival in rivals:
            squares = _squares(cells, rival)
            noisy = sum(square.failures.count(NOISY) for square in squares.values())
            compared = any(square.ratios for square in squares.values())
            if not (compared or noisy):
                continue
            drawn = True
            title = (
                f"How many times faster gpu_embed is than {rival}\n{mode}"
                if compared
                else f"gpu_embed and {rival}: too noisy to compare\n{mode}"
            )
            title += "" if operation == "embedding" else f", {operation}"
            said = f"{_noisy_line([f'{noisy} cells'])}\n{caption}" if noisy else caption
            yield _finish(_heat_map(squares), {}, title, said, "ratio", what, rival)
    if not drawn:
        yield Skipped("ratio against each rival", "no cell was timed by both gpu_embed and a rival")


def _operation(row: Row) -> str:
    return f"{row.operation}, many tables" if row.tables > 1 else row.operation


@dataclass
class Square:
    """All cells with the same V and N: the ratios, and the states of those that have none."""

    ratios: list[float]
    failures: list[str]

    def text(self) -> str:
        """Geometric mean, and beneath it the worst one, if there are several."""
        if not self.ratios:
            return "\n".join(_in_order(self.failures))
        mean = f"{_ratio_text(geometric_mean(self.ratios))}x"
        if len(self.ratios) == 1:
            return mean
        return f"{mean}\n{_ratio_text(min(self.ratios))} of {len(self.ratios)}"


def _squares(cells: Mapping[Key, Mapping[str, Row]], rival: str) -> dict[tuple[int, int], Square]:
    squares: dict[tuple[int, int], Square] = {}
    for key, providers in cells.items():
        ours, theirs = our_row(providers), providers.get(rival)
        if ours is None or theirs is None:
            continue
        square = squares.setdefault((key.vocab, key.num_ids), Square([], []))
        ratio = ratio_of(theirs, ours)
        if ratio is not None:
            square.ratios.append(ratio)
        elif time_of(ours) is None:
            square.failures.append(f"ours:\n{ours.status}")
        elif time_of(theirs) is not None:
            square.failures.append(NOISY)
        else:
            square.failures.append(theirs.status)
    return squares


def _heat_map(squares: Mapping[tuple[int, int], Square]) -> Figure:
    vocabs = sorted({vocab for vocab, _ in squares})
    counts = sorted({count for _, count in squares})
    # A square has to hold its text.
    figure = Figure(
        figsize=(max(7.5, 2.4 + 0.72 * len(vocabs)), 2.6 + 0.52 * len(counts)),
        dpi=DPI,
        layout="constrained",
    )
    axes = figure.subplots()
    values = np.full((len(counts), len(vocabs)), np.nan)  # [N, V]
    for (vocab, count), square in squares.items():
        if square.ratios:
            mean = geometric_mean(square.ratios)
            values[counts.index(count), vocabs.index(vocab)] = math.log2(mean)
    limit = math.log2(RATIO_LIMIT)
    image = axes.imshow(
        values,
        cmap="PuOr",
        norm=TwoSlopeNorm(0, -limit, limit),
        aspect="auto",
        origin="lower",
    )
    for (vocab, count), square in squares.items():
        row, column = counts.index(count), vocabs.index(vocab)
        dark = square.ratios and _luminance(image.to_rgba(values[row, column])) < 0.4
        axes.text(
            column,
            row,
            square.text(),
            ha="center",
            va="center",
            fontsize=8,
            linespacing=1.3,
            color="white" if dark else GREY if not square.ratios else "black",
            # The worst of the square loses, though its mean may win.
            fontweight="bold" if square.ratios and min(square.ratios) < 1 else "normal",
        )
    axes.set_xticks(range(len(vocabs)), _short_numbers(vocabs))
    axes.set_yticks(range(len(counts)), _short_numbers(counts))
    axes.set_xlabel("vocabulary V (rows of the table)")
    axes.set_ylabel("ids N in a call")
    axes.set_title(
        "Geometric mean over the cells of a square; beneath it the lowest, of how many.\n"
        "Bold: somewhere in the square the rival is faster. Blank: not measured.",
        fontsize=9,
        loc="left",
    )
    _white_grid(axes, len(vocabs), len(counts))
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend="both")
    steps = [step for step in range(-3, 4) if abs(step) <= limit]
    bar.set_ticks(steps, labels=[f"{2.0**step:g}x" for step in steps])
    bar.set_label("rival's time / gpu_embed's time\n(above 1: gpu_embed is faster)")
    return figure


def _luminance(colour: Any) -> float:
    red, green, blue = np.ravel(colour)[:3]
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def _white_grid(axes: Axes, columns: int, rows: int) -> None:
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


# 3. Contention: many ids on one row


def contention_pictures(
    rows: Sequence[Row], styles: Mapping[str, Style], caption: str
) -> Iterator[Picture | Skipped]:
    """ms against the share of ids that are one and the same; a picture for each set and mode."""
    hot = [row for row in rows if hot_fraction(row.distribution) is not None]
    # Two fractions are uniform ids and something hotter, at least.
    curves = _curves(hot, lambda key: key._replace(distribution=""), _hot, fewest=2)
    if not curves:
        yield Skipped(
            "contention",
            "no shape was timed at two or more hot fractions (distributions hot:F, equal, uniform)",
        )
    for (set_, mode), group in _grouped(curves, lambda key: (key.set, key.mode)):
        pages = _pages(group)
        for page, shapes in enumerate(pages, start=1):
            figure, axes = _figure(1, len(shapes))
            for panel, (key, found) in zip(axes[0], shapes.items(), strict=True):
                _draw_curves(panel, found, styles, _hot, time_of, band=True)
                panel.set_title(_shape_title(key, "distribution", "set", "mode"), fontsize=10)
                _log_axis(panel, "y", _values(found, time_of), "{:g}".format)
                _share_axis(panel)
                panel.set_xlabel("ids that are one and the same row\n(0 %: uniform)")
            axes[0][0].set_ylabel("time (ms), median and p20 to p80")
            title = f"Set {set_}, {mode}: contention on a hot row"
            yield _finish(
                figure,
                styles,
                title,
                _with_failures(caption, shapes),
                "contention",
                set_,
                mode,
                page,
                len(pages),
            )


def _share_axis(axes: Axes) -> None:
    """From 0 to 100 %, stretched at the left: a few ids in a hundred on one row matter already."""
    axes.set_xscale("function", functions=(np.cbrt, lambda root: root**3))
    axes.set_xlim(-0.0001, 1.15)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.01, 0.1, 0.25, 0.5, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.xaxis.set_minor_locator(NullLocator())


def hot_fraction(distribution: str) -> float | None:
    """The share of ids on one row; None where the distribution does not say."""
    known = {"equal": 1.0, "uniform": 0.0}
    if distribution in known:
        return known[distribution]
    name, _, share = distribution.partition(":")
    try:
        fraction = float(share) if name == "hot" else math.nan
    except ValueError:
        return None
    return fraction if 0 <= fraction <= 1 else None


def _hot(row: Row) -> float:
    return hot_fraction(row.distribution) or 0.0


# 4. How the cost grows with the vocabulary


def growth_pictures(
    rows: Sequence[Row], styles: Mapping[str, Style], caption: str
) -> Iterator[Picture | Skipped]:
    """Time as a multiple of the smallest vocabulary's; a panel for each mode at the same N."""
    low, high = GROWTH_RANGE
    curves = _curves(
        [row for row in rows if low <= row.vocab <= high],
        lambda key: key._replace(vocab=0),
        lambda row: row.vocab,
        FEWEST_POINTS,
    )
    curves = {
        key: found
        for key, found in curves.items()
        if max(vocabs := _values(found, lambda row: row.vocab)) >= GROWTH_SPAN * min(vocabs)
    }
    if not curves:
        yield Skipped(
            "cost growth",
            f"no shape with fixed N was timed at {FEWEST_POINTS} vocabularies between "
            f"{short_number(low)} and {short_number(high)} that span a factor of {GROWTH_SPAN}",
        )
    for shape, group in _grouped(curves, lambda key: key._replace(mode="")):
        pages = _pages(group, 4)
        for page, modes in enumerate(pages, start=1):
            figure = _growth_figure(modes, styles)
            title = f"Set {shape.set}: growth of the cost with the vocabulary"
            subtitle = _shape_title(shape, "vocab", "set", "mode").replace("\n", ", ")
            yield _finish(
                figure,
                styles,
                f"{title}\n{subtitle}",
                _with_failures(caption, modes),
                "growth",
                shape.set,
                *(part for part in subtitle.split(", ")),
                page,
                len(pages),
            )


def _growth_figure(
    modes: Mapping[Key, Mapping[str, list[Row]]], styles: Mapping[str, Style]
) -> Figure:
    columns = min(2, len(modes))
    figure, axes = _figure(math.ceil(len(modes) / columns), columns)
    for panel in axes.flat[len(modes) :]:
        panel.set_visible(False)
    for panel, (key, found) in zip(axes.flat, modes.items(), strict=False):
        first = {name: _first_time(rows) for name, rows in found.items()}

        def multiple(row: Row, first: Mapping[str, float] = first) -> float | None:
            time = time_of(row)
            return None if time is None else time / first[row.provider]

        _draw_curves(panel, found, styles, lambda row: row.vocab, multiple)
        vocabs = _values(found, lambda row: row.vocab)
        multiples = _values(found, multiple)
        _log_axis(panel, "x", vocabs, short_number)
        _log_axis(panel, "y", [*multiples, 1.0, 10.0], lambda value: f"{value:g}x")
        # Clipped by the frame: it shows the slope.
        panel.plot(
            [min(vocabs), max(vocabs)],
            [1, max(vocabs) / min(vocabs)],
            color=GREY,
            linestyle=":",
            linewidth=1.5,
            scalex=False,
            scaley=False,
        )
        panel.set_title(key.mode, fontsize=10)
        panel.set_xlabel("vocabulary V (rows of the table)\ndotted: in proportion to V")
    for panel in axes[:, 0]:
        panel.set_ylabel("time, as a multiple of\nthe smallest vocabulary's")
    return figure


def _first_time(rows: Sequence[Row]) -> float:
    """The time at the smallest vocabulary that has one; NaN if none has."""
    return next((time for row in rows if (time := time_of(row))), math.nan)


# 5. What a training step costs


def step_pictures(
    rows: Sequence[Row], styles: Mapping[str, Style], caption: str
) -> Iterator[Picture | Skipped]:
    """ms above, peak memory below, against the vocabulary; a column for each optimizer."""
    curves = _curves(
        [row for row in rows if row.mode in STEPS],
        lambda key: key._replace(vocab=0),
        lambda row: row.vocab,
        FEWEST_POINTS,
    )
    if not curves:
        yield Skipped(
            "cost of a training step", f"no step was timed at {FEWEST_POINTS} or more vocabularies"
        )
    for shape, group in _grouped(curves, lambda key: key._replace(mode="")):
        modes = {key: group[key] for key in sorted(group, key=lambda key: [*STEPS].index(key.mode))}
        subtitle = _shape_title(shape, "vocab", "set", "mode").replace("\n", ", ")
        yield _finish(
            _step_figure(modes, styles),
            styles,
            f"Set {shape.set}: what a training step costs as the table grows\n{subtitle}",
            f"{STEP_CAPTION}\n{_with_failures(caption, modes)}",
            "step",
            shape.set,
            *subtitle.split(", "),
        )


def _step_figure(
    modes: Mapping[Key, Mapping[str, list[Row]]], styles: Mapping[str, Style]
) -> Figure:
    has_memory = any(_values(curves, _peak_mebibytes) for curves in modes.values())
    figure, axes = _figure(2 if has_memory else 1, len(modes))
    for column, (key, curves) in enumerate(modes.items()):
        above = axes[0][column]
        _draw_curves(above, curves, styles, lambda row: row.vocab, time_of, band=True)
        above.set_title(STEPS[key.mode], fontsize=10)
        if has_memory:
            _draw_curves(axes[1][column], curves, styles, lambda row: row.vocab, _peak_mebibytes)
        for panel in axes[:, column]:
            _log_axis(panel, "x", _values(curves, lambda row: row.vocab), short_number)
        axes[-1][column].set_xlabel("vocabulary V (rows of the table)")
    # Optimizers are compared along a row of panels.
    for panels, value_of in zip(axes, (time_of, _peak_mebibytes), strict=False):
        values = [value for curves in modes.values() for value in _values(curves, value_of)]
        for panel in panels:
            _log_axis(panel, "y", values, short_number)
    axes[0][0].set_ylabel("time of a step (ms),\nmedian and p20 to p80")
    if has_memory:
        axes[1][0].set_ylabel("memory at the step's peak (MiB),\ntable and state included")
    return figure


def _peak_mebibytes(row: Row) -> float | None:
    return row.step_peak_bytes / 2**20 if row.step_peak_bytes else None


# What the pictures share


def _curves(
    rows: Iterable[Row],
    shape_of: Callable[[Key], Key],
    place_of: Callable[[Row], float],
    fewest: int,
) -> dict[Key, dict[str, list[Row]]]:
    """For each shape its rows by provider, in the order of their places on the x axis.

    A shape stays if it was timed at the fewest number of places.
    """
    shapes: dict[Key, dict[str, list[Row]]] = {}
    for row in rows:
        shape = shape_of(row.key._replace(provider=""))
        shapes.setdefault(shape, {}).setdefault(row.provider, []).append(row)
    curves = {}
    for shape, providers in shapes.items():
        places = {place_of(row) for found in providers.values() for row in found if time_of(row)}
        if len(places) >= fewest:
            curves[shape] = {name: sorted(found, key=place_of) for name, found in providers.items()}
    return curves


def _grouped(
    curves: Mapping[Key, Mapping[str, list[Row]]], group_of: Callable[[Key], Any]
) -> list[tuple[Any, dict[Key, Mapping[str, list[Row]]]]]:
    groups: dict[Any, dict[Key, Mapping[str, list[Row]]]] = {}
    for key, found in curves.items():
        groups.setdefault(group_of(key), {})[key] = found
    return list(groups.items())


def _pages(
    group: Mapping[Key, Mapping[str, list[Row]]], size: int = PANELS
) -> list[dict[Key, Mapping[str, list[Row]]]]:
    items = list(group.items())
    return [dict(items[i : i + size]) for i in range(0, len(items), size)]


def _figure(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(3.4 + 4.0 * columns, 1.6 + 3.2 * rows), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_curves(
    axes: Axes,
    curves: Mapping[str, Sequence[Row]],
    styles: Mapping[str, Style],
    place_of: Callable[[Row], float],
    value_of: Callable[[Row], float | None],
    band: bool = False,
) -> None:
    """A line for each provider, ours on top; it is broken where a row has no value."""
    for name in reversed(list(styles)):
        rows = curves.get(name, [])
        values = [value_of(row) for row in rows]
        if not any(value is not None for value in values):
            continue
        style = styles[name]
        places = [place_of(row) for row in rows]
        heights = [math.nan if value is None else value for value in values]
        axes.plot(
            places,
            heights,
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            linewidth=2.2 if is_ours(name) else 1.4,
            markersize=5,
            label=name,
        )
        # Hollow where the time says little.
        noisy = [bool(noise_of(row)) for row in rows]
        if any(noisy):
            axes.plot(
                *(list(itertools.compress(values, noisy)) for values in (places, heights)),
                color=style.colour,
                marker=style.marker,
                markerfacecolor="white",
                markersize=5,
                linestyle="none",
            )
        if band:
            low = [math.nan if row.ms_p20 is None else row.ms_p20 for row in rows]
            high = [math.nan if row.ms_p80 is None else row.ms_p80 for row in rows]
            axes.fill_between(places, low, high, color=style.colour, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def _finish(
    figure: Figure, styles: Mapping[str, Style], title: str, caption: str, *name: object
) -> Picture:
    """Title above, providers at the right, the machine beneath."""
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    entries = [(drawn[provider], provider) for provider in styles if provider in drawn]
    width = figure.get_figwidth()
    # An inch holds about 10 bold letters of the title, and 15 of 8 points; the legend takes 2.5 inches.
    room = int(10 * (width - 2.5 if entries else width))
    at_the_left: dict[str, Any] = {"x": 0.01, "ha": "left", **PLAIN_TEXT}
    figure.suptitle(_wrapped(title, room, ", "), fontweight="bold", **at_the_left)
    figure.supxlabel(
        _wrapped(caption, int(15 * width), " · "), fontsize=8, color=GREY, **at_the_left
    )
    for axes in figure.axes:
        for text in (axes.title, *axes.texts):
            text.set(**PLAIN_TEXT)
    if entries:
        draw_legend(figure, entries, loc="outside right upper", frameon=False)
    *parts, page, pages = name if isinstance(name[-1], int) else (*name, 1, 1)
    if pages != 1:
        parts.append(page)
    slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(part)).strip("_") for part in parts)
    return Picture(slug, title.replace("\n", ": "), figure)


def _with_failures(caption: str, shapes: Mapping[Key, Mapping[str, Sequence[Row]]]) -> str:
    """The caption beneath lines that name the rows with no time to draw, "torch oom at 3", and the noisy ones."""
    counts: dict[str, int] = {}
    noisy: dict[str, int] = {}
    for curves in shapes.values():
        for provider, rows in curves.items():
            for row in rows:
                if time_of(row) is None:
                    state = "not timed" if row.status == "ok" else row.status
                    what = f"{provider} {state}"
                    counts[what] = counts.get(what, 0) + 1
                elif noise_of(row):
                    noisy[provider] = noisy.get(provider, 0) + 1
    failures = [f"{what} at {count}" for what, count in counts.items()]
    lines = [f"No point: {' · '.join(failures)}"] if failures else []
    lines += (
        [_noisy_line([f"{name} at {count} hollow points" for name, count in noisy.items()])]
        if noisy
        else []
    )
    return "\n".join([*lines, caption])


def _noisy_line(what: Sequence[str]) -> str:
    return " · ".join((f"NOISY ({NOISY_MEANS}), neither faster nor slower", *what))


def _wrapped(text: str, room: int, joint: str) -> str:
    """Break lines of more characters than there is room for, between the parts."""
    lines = []
    for line in text.splitlines():
        first, *parts = line.split(joint)
        lines.append(first)
        for part in parts:
            longer = f"{lines[-1]}{joint}{part}"
            if len(longer) <= room:
                lines[-1] = longer
            else:
                lines.append(part)
    return "\n".join(lines)


def _shape_title(key: Key, *known: str) -> str:
    """The shape of a panel in two lines, without what the picture's title or axis says."""
    sizes = {"vocab": "V", "dim": "D", "num_ids": "N"}
    first = [
        f"{letter} = {getattr(key, name):,}" for name, letter in sizes.items() if name not in known
    ]
    second = [
        getattr(key, name)
        for name in ("operation", "dtype", "distribution", "id_dtype")
        if name not in known and (name, getattr(key, name)) not in USUAL
    ]
    if key.tables > 1:
        first.insert(0, f"{key.tables} tables")
    if key.hotness > 1:
        first.append(f"bags of {key.hotness}")
    if key.padding:
        second.append(f"{key.padding:.0%} padding")
    return "\n".join(", ".join(line) for line in (first, second) if line)


# Not worth a word in a panel's title.
USUAL = {("operation", "embedding"), ("id_dtype", "int64")}


def _log_axis(axes: Axes, name: str, values: Sequence[float], text: Callable[[float], str]) -> None:
    """A logarithmic axis from one round number to another, labelled with plain numbers."""
    low, high = min(values), max(values)
    grid = [
        float(f"{digit}e{power}")
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        for digit in (1, 2, 5)
    ]
    start = max(i for i, tick in enumerate(grid) if tick <= low * 1.000001)
    end = min(i for i, tick in enumerate(grid) if tick >= high * 0.999999)
    ticks = grid[start : max(end, start + 1) + 1]
    margin = (ticks[-1] / ticks[0]) ** 0.03
    limits = (ticks[0] / margin, ticks[-1] * margin)
    axes.set(**{f"{name}scale": "log", f"{name}lim": limits})
    # Decades alone, if there are many; then every second of them. Labels stand closer on y than on x.
    room = 6 if name == "x" else 9
    if len(ticks) > room:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1.0")]
    if len(ticks) > room:
        ticks = ticks[::2]
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def _values(
    curves: Mapping[str, Sequence[Row]], value_of: Callable[[Row], float | None]
) -> list[float]:
    """Every value that is drawn."""
    return [
        value
        for rows in curves.values()
        for row in rows
        if time_of(row) and (value := value_of(row)) is not None
    ]


def _percent(row: Row) -> float | None:
    return row.percent_of_copy if time_of(row) else None


def _short_numbers(values: Sequence[int]) -> list[str]:
    """Short where that tells the values apart, else whole: 3072 and 3073 are not the same."""
    short = [short_number(value) for value in values]
    return [
        text if short.count(text) == 1 else f"{value:,}"
        for text, value in zip(short, values, strict=True)
    ]


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _rank(provider: str) -> tuple[bool, int, str]:
    """Ours first, then the known ones in the order of the table."""
    known = list(STYLES)
    place = known.index(provider) if provider in known else len(known)
    return not is_ours(provider), place, provider


def _in_order(names: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(names))


def _save(figure: Figure, path: Path) -> None:
    """Write beside the path and move there, so that no half picture is ever seen."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(png(figure))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
