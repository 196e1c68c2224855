"""The pictures of a results directory: what a lookup costs, where it wins, where it does not."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gpu_embed.plot import PLAIN_TEXT, draw_legend

from .compare import NOISY_MEANS, by_cell, is_ours, noise_of, our_row, ratio_of, state_of, time_of
from .growth import FEWEST_POINTS, FIT_MEANS, growths
from .results import Key, Row, complete_header, header_or_empty, rows_to_show, write_whole
from .shapes import ACCUMULATE, STEPS

Curves = Mapping[str, Sequence[Row]]  # each provider's rows, in the order of the x axis

DPI = 110
GREY = "#666666"
# Panels beside each other; more go into the next picture.
PANELS = 3
GROWTH_RANGE = (10_000, 50_000_000)
# The growth picture wants the vocabulary to grow by at least this factor.
GROWTH_SPAN = 100
# What the names of the providers say of a step.
STEP_CAPTION = (
    "A step is forward, backward and the optimizer's update. -sparse: a sparse gradient · "
    "in-backward, fbgemm-gpu: updated inside the backward pass · the others: a gradient as large as the table"
)
ACCUMULATION_CAPTION = (
    "The backward of a lookup whose table has a gradient already. -in-place: accumulate_in_place adds to its rows · "
    "the others make a gradient as large as the table, and add that"
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
    "gpu_embed-in-place": Style("#009FE3", "*", "-."),
    "torch": Style("#D55E00", "s"),
    "torch-sparse": Style("#8F2D00", "h", ":"),
    "torch.compile": Style("#E69F00", "D"),
    "index_add_": Style("#CC79A7", "v"),
    "liger-kernel": Style("#009E73", "^"),
    "flag-gems": Style("#000000", "X"),
    "fbgemm-gpu": Style("#8C6D00", "P"),
    "fbgemm-gpu-cpu": Style("#5C4A00", "P", "--"),
}
_BLUES = ("#14507A", "#4D5B9E", "#8AB6D6", "#2E5A88", "#6C8EBF", "#1F77B4")
OTHER_OURS = [Style(*look, "--") for look in zip(_BLUES, "<>ph*d", strict=True)]
_WARM = ("#A6761D", "#7F7F7F", "#882255", "#44AA99", "#B2182B")
OTHER_RIVALS = [Style(*look) for look in zip(_WARM, "*hp<>", strict=True)]


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


Styles = Mapping[str, Style]  # by provider, ours first
Pictures = Iterator[Picture | Skipped]


def plot_directory(directory: Path) -> list[Path]:
    """Draw the directory's results into it; print what was skipped and why."""
    rows = rows_to_show(directory)
    paths = []
    for item in pictures(rows, header_or_empty(directory)):
        if isinstance(item, Skipped):
            print(f"not drawn: {item.kind}: {item.reason}")
        else:
            paths.append(directory / f"{item.name}.png")
            write_whole(paths[-1], png(item.figure))
    return paths


def pictures(rows: Sequence[Row], header: Mapping[str, Any]) -> Pictures:
    """Every picture that the rows allow, one at a time, and why the others are missing."""
    styles = choose_styles(row.provider for row in rows)
    caption = describe_run(rows, header)
    kinds = (
        vocabulary_pictures,
        ratio_pictures,
        contention_pictures,
        growth_pictures,
        step_pictures,
        accumulation_pictures,
    )
    for draw in kinds:
        yield from draw(rows, styles, caption)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    target = io.BytesIO()
    FigureCanvasAgg(figure).print_png(target)
    return target.getvalue()


def choose_styles(providers: Iterable[str]) -> dict[str, Style]:
    """A style for each provider: the known ones always have the same, others by name."""
    spare = {True: itertools.cycle(OTHER_OURS), False: itertools.cycle(OTHER_RIVALS)}
    return {
        name: STYLES.get(name) or next(spare[is_ours(name)])
        for name in sorted(set(providers), key=_rank)
    }


def describe_run(rows: Sequence[Row], header: Mapping[str, Any]) -> str:
    """The machine, the versions and the commit, for under each picture."""
    known = complete_header(header, rows)
    parts = [known["device"]]
    parts += [f"driver {known['driver']}"] if known.get("driver") else []
    parts += [f"{name} {known[name]}" for name in ("torch", "triton") if known[name] != "unknown"]
    # Twelve digits tell a commit apart.
    parts.append(re.sub(r"\b(\w{12})\w+", r"\1", f"commit {known['commit']}"))
    parts += [str(known["date"])] if known.get("date") else []
    return " · ".join(parts)


def short_number(value: float) -> str:
    """10000 is 10k, 1677721 is 1.68M: three digits, as on an axis."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999,999 rounds to 1M, not to 1000k.
        if abs(value) >= unit * 0.9995:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


# 1. Time and bandwidth against the vocabulary


def vocabulary_pictures(rows: Sequence[Row], styles: Styles, caption: str) -> Pictures:
    """ms above, % of copy bandwidth below; a column for each shape, a picture for each mode.

    Steps and accumulation have pictures of their own.
    """
    others = [row for row in rows if row.mode not in (*STEPS, *ACCUMULATE)]
    reason = f"no shape was timed at {FEWEST_POINTS} or more vocabularies"
    share = "DRAM byte floor / time\n(% of measured copy bandwidth)"
    yield from _curve_pictures(
        _curves(others, BY_VOCABULARY),
        styles,
        caption,
        Skipped("time against vocabulary", reason),
        lambda key: (
            f"Set {key.set}, {key.mode}, {key.dtype}: time against vocabulary",
            *("vocabulary", key.set, key.mode, key.dtype),
        ),
        lambda key: _shape_title(key, "vocab", "set", "mode", "dtype"),
        BY_VOCABULARY,
        TIME,
        Axis(lambda row: row.percent_of_copy if time_of(row) else None, share, _percent_axis),
    )


def _percent_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.axhline(100, color=GREY, linewidth=1, linestyle=":")
    axes.set_ylim(0, 1.08 * max([100.0, *values]))


# 2. Ratio against each rival over (V, N)


def ratio_pictures(rows: Sequence[Row], styles: Styles, caption: str) -> Pictures:
    """A heat map for each mode and rival; a square pools the dtypes, dims and distributions."""
    drawn = False
    rivals = [name for name in styles if not is_ours(name)]
    for operation, mode in dict.fromkeys((_operation(row), row.mode) for row in rows):
        what = mode if operation == "embedding" else f"{operation} {mode}"
        cells = by_cell(row for row in rows if (_operation(row), row.mode) == (operation, mode))
        for rival in rivals:
            squares = _squares(cells, rival)
            noisy = sum(square.failures.count(NOISY) for square in squares.values())
            compared = any(square.ratios for square in squares.values())
            if not (compared or noisy):
                continue
            drawn = True
            title = f"How many times faster gpu_embed is than {rival}"
            if not compared:
                title = f"gpu_embed and {rival}: too noisy to compare"
            title += f"\n{mode}" + ("" if operation == "embedding" else f", {operation}")
            said = f"{_noisy_line(f'{noisy} cells')}\n{caption}" if noisy else caption
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
            return "\n".join(dict.fromkeys(self.failures))
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
        if (ratio := ratio_of(theirs, ours)) is not None:
            square.ratios.append(ratio)
        elif time_of(ours) is None:
            square.failures.append(f"ours:\n{ours.status}")
        else:
            square.failures.append(NOISY if time_of(theirs) is not None else theirs.status)
    return squares


def _heat_map(squares: Mapping[tuple[int, int], Square]) -> Figure:
    vocabs = sorted({vocab for vocab, _ in squares})
    counts = sorted({count for _, count in squares})
    # A square has to hold its text.
    size = (max(7.5, 2.4 + 0.72 * len(vocabs)), 2.6 + 0.52 * len(counts))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    values = np.full((len(counts), len(vocabs)), np.nan)  # [N, V]
    places = {key: (counts.index(key[1]), vocabs.index(key[0])) for key in squares}
    for key, square in squares.items():
        if square.ratios:
            values[places[key]] = math.log2(geometric_mean(square.ratios))
    limit = math.log2(RATIO_LIMIT)
    image = axes.imshow(
        values, cmap="PuOr", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto", origin="lower"
    )
    for key, square in squares.items():
        row, column = places[key]
        colour = np.ravel(image.to_rgba(values[row, column]))[:3]
        dark = colour @ (0.2126, 0.7152, 0.0722) < 0.4
        look: dict[str, Any] = {"fontsize": 8, "linespacing": 1.3, "ha": "center", "va": "center"}
        if square.ratios:
            look["color"] = "white" if dark else "black"
            # The worst of the square loses, though its mean may win.
            look["fontweight"] = "bold" if min(square.ratios) < 1 else "normal"
        axes.text(column, row, square.text(), **{"color": GREY, **look})
    axes.set_xticks(range(len(vocabs)), _short_numbers(vocabs))
    axes.set_yticks(range(len(counts)), _short_numbers(counts))
    axes.set(xlabel=VOCABULARY, ylabel="ids N in a call")
    axes.set_title(
        "Geometric mean over the cells of a square; beneath it the lowest, of how many.\n"
        "Bold: somewhere in the square the rival is faster. Blank: not measured.",
        fontsize=9,
        loc="left",
    )
    # A white grid between the squares.
    axes.set_xticks(np.arange(len(vocabs) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(counts) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend="both")
    steps = [step for step in range(-3, 4) if abs(step) <= limit]
    bar.set_ticks(steps, labels=[f"{2.0**step:g}x" for step in steps])
    bar.set_label("rival's time / gpu_embed's time\n(above 1: gpu_embed is faster)")
    return figure


# 3. Contention: many ids on one row


def contention_pictures(rows: Sequence[Row], styles: Styles, caption: str) -> Pictures:
    """ms against the share of ids that are one and the same; a picture for each set and mode."""
    hot = [row for row in rows if hot_fraction(row.distribution) is not None]
    label = "ids that are one and the same row\n(0 %: uniform)"
    x = Axis(lambda row: hot_fraction(row.distribution) or 0.0, label, _share_axis, "distribution")
    fractions = "two or more hot fractions (distributions hot:F, equal, uniform)"
    yield from _curve_pictures(
        # Two fractions are uniform ids and something hotter, at least.
        _curves(hot, x, fewest=2),
        styles,
        caption,
        Skipped("contention", f"no shape was timed at {fractions}"),
        lambda key: (
            f"Set {key.set}, {key.mode}: contention on a hot row",
            *("contention", key.set, key.mode),
        ),
        lambda key: _shape_title(key, "distribution", "set", "mode"),
        x,
        TIME,
    )


def _share_axis(axes: Axes, places: Sequence[float]) -> None:
    """From 0 to 100 %, stretched at the left: a few ids in a hundred on one row matter already."""
    axes.set_xscale("function", functions=(np.cbrt, lambda root: root**3))
    axes.set_xlim(-0.0001, 1.15)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.01, 0.1, 0.25, 0.5, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.xaxis.set_minor_locator(NullLocator())


def hot_fraction(distribution: str) -> float | None:
    """The share of ids on one row; None where the distribution does not say."""
    usual = {"equal": "hot:1", "uniform": "hot:0"}
    name, _, share = usual.get(distribution, distribution).partition(":")
    try:
        fraction = float(share) if name == "hot" else math.nan
    except ValueError:
        return None
    return fraction if 0 <= fraction <= 1 else None


# 4. How the cost grows with the vocabulary


def growth_pictures(rows: Sequence[Row], styles: Styles, caption: str) -> Pictures:
    """Time as a multiple of the smallest vocabulary's; a panel for each mode at the same N."""
    low, high = GROWTH_RANGE
    inside = [row for row in rows if low <= row.vocab <= high]
    curves = {
        key: {name: _multiples(own) for name, own in found.items()}
        for key, found in _curves(inside, BY_VOCABULARY).items()
        if max(vocabs := _values(found, _vocab)) >= GROWTH_SPAN * min(vocabs)
    }
    yield from _curve_pictures(
        curves,
        styles,
        caption,
        Skipped(
            "cost growth",
            f"no shape with fixed N was timed at {FEWEST_POINTS} vocabularies between "
            f"{short_number(low)} and {short_number(high)} that span a factor of {GROWTH_SPAN}",
        ),
        lambda key: (
            f"Set {key.set}: growth of the cost with the vocabulary\n{_subtitle(key)}",
            *("growth", key.set, *_subtitle(key).split(", ")),
        ),
        attrgetter("mode"),
        Axis(_vocab, f"{VOCABULARY}\ndotted: in proportion to V", _slope_axis, "vocab"),
        Axis(
            time_of, f"time, as a multiple of\nthe smallest vocabulary's,\n{SPREAD}", _multiple_axis
        ),
    )


def _multiples(rows: Sequence[Row]) -> list[Row]:
    """Times as multiples of the one at the smallest vocabulary that has one."""
    first = next((time for row in rows if (time := time_of(row))), math.nan)
    times = ("ms_p20", "ms_p50", "ms_p80")
    return [
        replace(row, **{name: ms and ms / first for name in times for ms in [getattr(row, name)]})
        for row in rows
    ]


def _slope_axis(axes: Axes, vocabs: Sequence[float]) -> None:
    _vocabulary_axis(axes, vocabs)
    low, high = min(vocabs), max(vocabs)
    # Clipped by the frame: it shows the slope.
    look: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 1.5}
    axes.plot([low, high], [1, high / low], scalex=False, scaley=False, **look)


def _multiple_axis(axes: Axes, multiples: Sequence[float]) -> None:
    log_axis(axes, [*multiples, 1.0, 10.0], "y", "{:g}x".format)


# 5. What a training step costs


def step_pictures(rows: Sequence[Row], styles: Styles, caption: str) -> Pictures:
    """ms above, peak memory below, against the vocabulary, then against the ids; a column for each optimizer."""
    steps = sorted((row for row in rows if row.mode in STEPS), key=lambda r: [*STEPS].index(r.mode))
    reason = f"no step was timed at {FEWEST_POINTS} or more vocabularies"
    for x, what in ((BY_VOCABULARY, "table"), (BY_IDS, "batch")):
        curves = _curves(steps, x)
        if not curves and x is BY_IDS:
            return
        yield from _curve_pictures(
            curves,
            styles,
            f"{STEP_CAPTION}\n{FIT_MEANS}\n{caption}",
            Skipped("cost of a training step", reason),
            partial(_step_title, x, what),
            lambda key: STEPS[key.mode],
            x,
            # Optimizers are compared along a line of panels.
            Axis(time_of, f"time of a step (ms),\n{SPREAD}", _short_axis, common=True, fitted=True),
            Axis(
                lambda row: row.step_peak_bytes / 2**20 if row.step_peak_bytes else None,
                "memory at the step's peak (MiB),\ntable and state included",
                _short_axis,
                common=True,
            ),
        )


def _step_title(x: Axis, what: str, key: Key) -> tuple[str, ...]:
    shape = _shape_title(key, x.column, "set", "mode").replace("\n", ", ")
    title = f"Set {key.set}: what a training step costs as the {what} grows\n{shape}"
    return title, "step", key.set, *shape.split(", ")


# 6. What it costs to add to a gradient that exists


def accumulation_pictures(rows: Sequence[Row], styles: Styles, caption: str) -> Pictures:
    """ms above, memory beyond the gradient below, against the vocabulary; a column for each dtype of the gradient."""
    reason = f"no backward into a gradient was timed at {FEWEST_POINTS} or more vocabularies"
    yield from _curve_pictures(
        _curves([row for row in rows if row.mode in ACCUMULATE], BY_VOCABULARY),
        styles,
        f"{ACCUMULATION_CAPTION}\n{caption}",
        Skipped("gradient accumulation", reason),
        lambda key: (
            f"Set {key.set}: adding to a gradient as the table grows\n{_subtitle(key)}",
            *("accumulation", key.set, *_subtitle(key).split(", ")),
        ),
        lambda key: f"gradient in {'float32' if key.mode == 'accumulate_fp32' else key.dtype}",
        BY_VOCABULARY,
        Axis(time_of, f"time of a backward (ms),\n{SPREAD}", _short_axis, common=True),
        Axis(
            lambda row: row.peak_extra_bytes / 2**20 if row.peak_extra_bytes else None,
            "memory at its peak beyond\ntable and gradient (MiB)",
            _short_axis,
            common=True,
        ),
    )


# What the pictures share


VOCABULARY = "vocabulary V (rows of the table)"
SPREAD = "median and p20 to p80"
_vocab = attrgetter("vocab")


@dataclass(frozen=True)
class Axis:
    """What the panels of a picture, or a line of them, have on an axis."""

    of: Callable[[Row], Any]  # a number; None where a row has none
    label: str
    scale: Callable[[Axes, Sequence[float]], None]  # fits the axis to these values
    column: str = ""  # of an x axis: a shape is a cell without it
    common: bool = False  # of a y axis: one scale for the whole line
    fitted: bool = (
        False  # of a y axis of times: the exponents of their growth are written above the curves
    )


def _curves(rows: Iterable[Row], x: Axis, fewest: int = FEWEST_POINTS) -> dict[Key, Curves]:
    """For each shape its rows by provider, if it was timed at the fewest number of places."""
    blank: dict[str, Any] = {"provider": "", x.column: None}
    shapes: dict[Key, dict[str, list[Row]]] = {}
    for row in rows:
        shape = row.key._replace(**blank)
        shapes.setdefault(shape, {}).setdefault(row.provider, []).append(row)
    return {
        shape: {name: sorted(own, key=x.of) for name, own in found.items()}
        for shape, found in shapes.items()
        if len(set(_values(found, x.of))) >= fewest
    }


def _curve_pictures(
    curves: Mapping[Key, Curves],
    styles: Styles,
    caption: str,
    skipped: Skipped,
    group_of: Callable[[Key], tuple[str, ...]],
    title_of: Callable[[Key], str],
    x: Axis,
    *ys: Axis,
) -> Pictures:
    """A column of panels for each shape, a line for each y that was measured.

    Args:
        skipped: what is said where there is no curve.
        group_of: the title of the picture that a shape is part of, and what the file is named after.
        title_of: the title of a column.
    """
    if not curves:
        yield skipped
    groups: dict[tuple[str, ...], list[tuple[Key, Curves]]] = {}
    for key, found in curves.items():
        groups.setdefault(group_of(key), []).append((key, found))
    for (title, *names), group in groups.items():
        for start in range(0, len(group), PANELS):
            shapes = group[start : start + PANELS]
            measured = [y for y in ys if any(_values(found, y.of) for _, found in shapes)]
            size = (3.4 + 4.0 * len(shapes), 1.6 + 3.2 * len(measured))
            figure = Figure(figsize=size, dpi=DPI, layout="constrained")
            axes = figure.subplots(len(measured), len(shapes), squeeze=False)
            for y, line in zip(measured, axes, strict=True):
                together = [value for _, found in shapes for value in _values(found, y.of)]
                for panel, (_, found) in zip(line, shapes, strict=True):
                    _draw_curves(panel, found, styles, x.of, y.of)
                    y.scale(panel, together if y.common else _values(found, y.of))
                    if y.fitted:
                        _write_exponents(panel, found, styles, x.column)
                    x.scale(panel, _values(found, x.of))
                line[0].set_ylabel(y.label)
            for top, bottom, (key, _) in zip(axes[0], axes[-1], shapes, strict=True):
                top.set_title(title_of(key), fontsize=10)
                bottom.set_xlabel(x.label)
            said = _with_failures(
                caption, (row for _, c in shapes for own in c.values() for row in own)
            )
            page = [start // PANELS + 1] if len(group) > PANELS else []
            yield _finish(figure, styles, title, said, *names, *page)


def _draw_curves(
    axes: Axes,
    curves: Curves,
    styles: Styles,
    place_of: Callable[[Row], float],
    value_of: Callable[[Row], float | None],
) -> None:
    """A line for each provider, ours on top; it is broken where a row has no value."""

    def array(values: Iterable[float | None]) -> np.ndarray:
        return np.array(list(values), float)  # None is NaN

    for name in reversed(list(styles)):
        rows = curves.get(name, [])
        places, heights = array(map(place_of, rows)), array(map(value_of, rows))
        if np.isnan(heights).all():
            continue
        style = styles[name]
        look: dict[str, Any] = {"color": style.colour, "marker": style.marker, "markersize": 5}
        width = 2.2 if is_ours(name) else 1.4
        axes.plot(places, heights, linestyle=style.line, linewidth=width, label=name, **look)
        # Hollow where the time says little.
        if any(noisy := [bool(noise_of(row)) for row in rows]):
            look |= {"linestyle": "none", "markerfacecolor": "white"}
            axes.plot(places[noisy], heights[noisy], **look)
        if value_of is time_of:
            low, high = (array(map(attrgetter(end), rows)) for end in ("ms_p20", "ms_p80"))
            axes.fill_between(places, low, high, color=style.colour, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def _write_exponents(axes: Axes, curves: Curves, styles: Styles, column: str) -> None:
    """Whose time grows by which power, from the top left corner down."""
    rows = [row for name in styles for row in curves.get(name, ())]
    found = [growth for growth in growths(rows) if growth.column == column]
    for line, growth in enumerate(found):
        where = (0.03, 0.97 - 0.07 * line)
        colour = styles[growth.key.provider].colour
        axes.text(*where, str(growth), transform=axes.transAxes, color=colour, fontsize=8, va="top")


def _finish(figure: Figure, styles: Styles, title: str, caption: str, *name: object) -> Picture:
    """Title above, providers at the right, the machine beneath."""
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    entries = [(drawn[provider], provider) for provider in styles if provider in drawn]
    width = figure.get_figwidth()
    # An inch holds about 10 bold letters of the title, and 15 of 8 points; the legend takes 2.5 inches.
    room = int(10 * (width - 2.5 if entries else width))
    at_the_left: dict[str, Any] = {"x": 0.01, "ha": "left", **PLAIN_TEXT}
    figure.suptitle(wrapped(title, room, ", "), fontweight="bold", **at_the_left)
    figure.supxlabel(
        wrapped(caption, int(15 * width), " · "), fontsize=8, color=GREY, **at_the_left
    )
    for axes in figure.axes:
        for text in (axes.title, *axes.texts):
            text.set(**PLAIN_TEXT)
    if entries:
        draw_legend(figure, entries, loc="outside right upper", frameon=False)
    slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(part)).strip("_") for part in name)
    return Picture(slug, title.replace("\n", ": "), figure)


def _with_failures(caption: str, rows: Iterable[Row]) -> str:
    """The caption beneath lines that name the rows with no time to draw, "torch oom at 3 sizes", and the noisy ones."""
    failed: Counter[str] = Counter()
    noisy: Counter[str] = Counter()
    for row in rows:
        if time_of(row) is None:
            failed[f"{row.provider} {state_of(row)}"] += 1
        elif noise_of(row):
            noisy[row.provider] += 1
    lines = []
    if failed:
        at = (f"{what} at {n} size{'s' * (n > 1)}" for what, n in failed.items())
        lines.append("No point: " + " · ".join(at))
    if noisy:
        lines.append(_noisy_line(*(f"{name} at {n} hollow points" for name, n in noisy.items())))
    return "\n".join([*lines, caption])


def _noisy_line(*what: str) -> str:
    return " · ".join((f"NOISY ({NOISY_MEANS}), neither faster nor slower", *what))


def wrapped(text: str, room: int, joint: str) -> str:
    """Break lines of more characters than there is room for, between the parts."""
    lines: list[str] = []
    for line in text.splitlines():
        first, *parts = line.split(joint)
        lines.append(first)
        for part in parts:
            longer = f"{lines[-1]}{joint}{part}"
            lines[-1:] = [longer] if len(longer) <= room else [lines[-1], part]
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


def _subtitle(key: Key) -> str:
    return _shape_title(key, "vocab", "set", "mode").replace("\n", ", ")


def log_axis(
    axes: Axes, values: Sequence[float], name: str, text: Callable[[float], str] = "{:g}".format
) -> None:
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


_vocabulary_axis = partial(log_axis, name="x", text=short_number)
_time_axis = partial(log_axis, name="y")
_short_axis = partial(log_axis, name="y", text=short_number)
BY_VOCABULARY = Axis(_vocab, VOCABULARY, _vocabulary_axis, "vocab")
BY_IDS = Axis(attrgetter("num_ids"), "ids of a step N", _vocabulary_axis, "num_ids")
TIME = Axis(time_of, f"time (ms), {SPREAD}", _time_axis)


def _values(curves: Curves, value_of: Callable[[Row], float | None]) -> list[float]:
    """Every value that is drawn."""
    return [
        value
        for rows in curves.values()
        for row in rows
        if time_of(row) and (value := value_of(row)) is not None
    ]


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
