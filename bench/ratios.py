"""One picture of many ratios, from committed rows alone: how many times faster than torch, and where slower."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory
from PIL import Image

from gpu_embed.plot import PLAIN_TEXT

from . import host_time, row_csv
from .compare import NOISY_MEANS, by_cell, noise_of, time_of
from .plots import describe_run, log_axis, png, short_number, wrapped
from .results import HOST_TIME, Key, ResultsError, Row, header_or_empty, rows_to_show, write_whole
from .shapes import ACCUMULATE, MICRO_STEPS, MODES, STEPS

WIDTH, DPI, COLOURS = 8.6, 150, 64  # the width in inches
BAR, HEADING, MARGIN = 0.165, 0.3, 1.1  # inches of the height
TITLE = "How many times faster than torch, on one thread of a CPU"
LABEL = "torch's time / gpu_embed's time"


@dataclass(frozen=True)
class Theme:
    """Colours on a page."""

    name: str  # file name without .png
    page: str
    text: str
    faint: str
    faster: str
    slower: str


# Okabe and Ito's blues and oranges, and the pages of GitHub's themes.
THEMES = (
    Theme("ratios", "#ffffff", "#1f2328", "#59636e", "#0072B2", "#D55E00"),
    Theme("ratios_dark", "#0d1117", "#f0f6fc", "#9198a1", "#56B4E9", "#E69F00"),
)


@dataclass(frozen=True)
class Bar:
    """A ratio and what it is of."""

    label: str
    ratio: float
    noisy: bool = False


@dataclass(frozen=True)
class Section:
    """Cells that two providers were timed on."""

    title: str
    ours: str
    rival: str
    shows: Callable[[Key], bool]
    label: Callable[[Key], str]

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """One for each such cell, by mode, else in the order of the rows."""
        bars = []
        shown = sorted(filter(self._is_shown, rows), key=lambda row: MODES.index(row.mode))
        for cell, providers in by_cell(shown).items():
            ours, theirs = providers.get(self.ours), providers.get(self.rival)
            if ours and theirs and (fast := time_of(ours)) and (slow := time_of(theirs)):
                noisy = bool(noise_of(ours) or noise_of(theirs))
                bars.append(Bar(self.label(cell), slow / fast, noisy))
        return bars

    def _is_shown(self, row: Row) -> bool:
        return row.provider in (self.ours, self.rival) and self.shows(row.key)


def _accumulation_label(key: Key) -> str:
    gradient = ", fp32 gradient" if key.mode == "accumulate_fp32" else ""
    return f"{key.vocab:,} x {key.dim:,} {SHORT[key.dtype]}{gradient}, {key.num_ids:,} ids"


def _tables_label(key: Key) -> str:
    widths = ", D 8 to 64" if key.operation == "embedding_bag_mixed" else ""
    bags = f" in bags of {key.hotness}" if key.hotness > 1 else ""
    backward = "" if key.mode == "forward" else ", with backward"
    return f"{key.tables} tables{widths}, {key.num_ids // key.tables:,} ids each{bags}{backward}"


SHORT = {"float32": "fp32", "bfloat16": "bf16"}
# The picture of steps has those between.
STEP_ROWS = (10_000, 1_000_000, 10_000_000, 50_000_000)
_MICRO_STEPS = {(cell.vocab, cell.dim, cell.num_ids) for cell in MICRO_STEPS}
SECTIONS = (
    Section(
        "The backward of a micro-step, added in place to the gradient that is there",
        "gpu_embed-in-place",
        "torch",
        lambda key: key.mode in ACCUMULATE and (key.vocab, key.dim, key.num_ids) in _MICRO_STEPS,
        _accumulation_label,
    ),
    Section(
        "A step on a sparse gradient, updated in backward, beside torch's sparse step",
        "gpu_embed-in-backward",
        "torch-sparse",
        lambda key: (
            key.mode in STEPS
            and key.distribution.startswith("spread:")
            and key.num_ids == 65_536
            and key.vocab in STEP_ROWS
        ),
        lambda key: f"{STEPS[key.mode]}, {short_number(key.vocab)} rows",
    ),
    Section(
        "The sums of many tables, beside a loop over torch.nn.EmbeddingBag and torch.cat",
        "gpu_embed",
        "torch-together",
        # Bags of one id come out alike.
        lambda key: key.set == "M" and key.hotness > 1,
        _tables_label,
    ),
)
HOST = f"The host's time of a lookup of {host_time.NUM_IDS} ids, rows of {host_time.DIM}"


def bars_of(rows: Sequence[Row], times: Iterable[host_time.HostTime]) -> dict[str, list[Bar]]:
    """By the titles of the sections that have any."""
    found = {section.title: section.bars(rows) for section in SECTIONS}
    found[HOST] = [
        Bar(f"{entry.who.removeprefix('gpu_embed, ')}, {entry.mode}", 1 / entry.times_torch)
        for entry in times
        if entry.who.startswith("gpu_embed") and entry.mode != "inference"
    ]
    return {title: bars for title, bars in found.items() if bars}


def draw_ratios(directories: Sequence[Path], target: Path) -> list[Path]:
    """Draw the directories' ratios into the target, one picture for each theme.

    Raises ResultsError if they hold none, or what cannot be read.
    """
    rows = [row for directory in directories for row in rows_to_show(directory)]
    times = [
        entry
        for directory in directories
        if (path := directory / HOST_TIME).exists()
        for entry in row_csv.read(path, host_time.HostTime, "the columns are not of host times")
    ]
    bars = bars_of(rows, times)
    if not bars:
        listed = ", ".join(map(str, directories))
        raise ResultsError(f"{listed}: no time there stands beside torch's: measure `figures`")
    # Several directories may be of several commits, which the rows name.
    header = header_or_empty(directories[0]) if len(directories) == 1 else {}
    caption = describe_run(rows, header)
    if any(bar.noisy for found in bars.values() for bar in found):
        caption = f"Hollow: noisy ({NOISY_MEANS}) · {caption}"
    paths = []
    for theme in THEMES:
        paths.append(target / f"{theme.name}.png")
        write_whole(paths[-1], _small_png(draw(bars, caption, theme)))
    return paths


def _small_png(figure: Figure) -> bytes:
    """Of few colours, as the file is committed."""
    small = io.BytesIO()
    whole = Image.open(io.BytesIO(png(figure)))
    whole.convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
    return small.getvalue()


def _ratio_text(ratio: float) -> str:
    """To two digits; near 1 to three, which say whether it is a gain."""
    if ratio < 2:
        return f"{ratio:.2f}x"
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{float(f'{ratio:.2g}'):,.0f}x"


def draw(sections: Mapping[str, list[Bar]], caption: str, theme: Theme) -> Figure:
    """Bars from 1 to each ratio, beneath the titles of their sections."""
    number = sum(map(len, sections.values()))
    height = MARGIN + BAR * number + HEADING * len(sections)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor=theme.page)
    axes = figure.subplots()
    axes.set_facecolor(theme.page)
    text: dict[str, Any] = {"color": theme.text, **PLAIN_TEXT}
    ratios = [bar.ratio for bars in sections.values() for bar in bars]
    # Room for the numbers at the ends of the bars.
    log_axis(axes, [*(ratio / 1.6 for ratio in ratios), *(ratio * 1.6 for ratio in ratios), 1], "x")
    at_the_left = blended_transform_factory(figure.transFigure, axes.transData)
    places, labels = [], []
    place = 0.0
    for title, bars in sections.items():
        place += HEADING
        look = {**text, "fontsize": 9, "fontweight": "bold", "va": "bottom", "zorder": 4}
        # Over the line at 1, from the figure's edge.
        look["bbox"] = {"facecolor": theme.page, "edgecolor": "none", "pad": 1}
        heading = axes.text(0.01, place - 0.6 * BAR, title, transform=at_the_left, **look)
        heading.set_in_layout(False)
        for bar in bars:
            colour = theme.faster if bar.ratio >= 1 else theme.slower
            fill = theme.page if bar.noisy else colour
            axes.barh(
                place, bar.ratio - 1, 0.72 * BAR, left=1, color=fill, edgecolor=colour, zorder=2
            )
            side, shift = ("left", 1.04) if bar.ratio >= 1 else ("right", 1 / 1.04)
            look = {**text, "fontsize": 8, "ha": side, "va": "center"}
            axes.text(bar.ratio * shift, place, _ratio_text(bar.ratio), **look)
            places.append(place)
            labels.append(bar.label)
            place += BAR
    axes.set_ylim(place - 0.4 * BAR, 0)
    axes.set_yticks(places, labels, fontsize=8, **text)
    axes.tick_params(colors=theme.faint, labelcolor=theme.text, labelsize=8, left=False)
    axes.axvline(1, color=theme.text, linewidth=1.2, zorder=3)
    axes.grid(axis="x", color=theme.faint, alpha=0.25, zorder=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"{LABEL} (left of 1: slower)", fontsize=9, **text)
    left: dict[str, Any] = {"x": 0.01, "ha": "left"}
    figure.suptitle(TITLE, fontweight="bold", fontsize=11, **left, **text)
    room = int(15 * WIDTH)
    look = {"fontsize": 7.5, "color": theme.faint, **PLAIN_TEXT}
    figure.supxlabel(wrapped(caption, room, " · "), **left, **look)
    return figure
