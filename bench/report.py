"""Results for people: one HTML page that needs no network, and the Markdown that is committed."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from .compare import (
    NOISY_MEANS,
    best_rival,
    by_cell,
    describe,
    is_ours,
    noise_of,
    our_row,
    ratio_of,
    time_of,
)
from .results import COLUMNS, Key, Row, complete_header, header_or_empty, rows_to_show, write_whole
from .shapes import SETS

REPORT = "report.html"

# Names by which nobody would know a header's entry.
HEADER_LABELS = {
    "capability": "compute capability",
    "copy_gbps": "measured copy bandwidth (GB/s, read plus written)",
    "no_clocks": "no clocks, since",
    "load": "load of the CPU before, 1 and 5 minutes",
    "cuda": "CUDA",
    "python": "Python",
}

RATIO_MEANS = (
    "The best rival is, cell by cell, the fastest provider with the right result that is not gpu_embed. "
    "A ratio is its time / gpu_embed's time, from the same run: above 1, gpu_embed is faster. "
    "gpu_embed is the layer with the kernels of its own choice; in a step, the fastest of that, of sparse=True "
    "with gpu_embed.optim, and of updates in the backward pass; where a gradient exists, the faster of that and of "
    "accumulate_in_place. "
    f"A noisy time ({NOISY_MEANS}) has no ratio: measure it again on a quiet machine."
)

STATUS_TEXTS = {
    "ok": "ok",
    "wrong": "WRONG result",
    "missing": "not available",
    "error": "ERROR",
    "oom": "out of memory",
}

# From ms_p20 to host_us: what a row shows only where it has a time.
TIMES = COLUMNS[COLUMNS.index("ms_p20") : COLUMNS.index("match")]
NO_TIMES: dict[str, Any] = dict.fromkeys(TIMES)

# Of each column of a table: the text, and the CSS class.
Columns = dict[str, tuple[str, str]]


def write_report(directory: Path) -> Path:
    """Write DIR/report.html: header, standings, pictures and every row."""
    from .plots import Skipped, pictures, png

    rows = rows_to_show(directory)
    header = header_or_empty(directory)
    drawn, skipped = [], []
    for item in pictures(rows, header):
        if isinstance(item, Skipped):
            skipped.append(item)
        else:
            # Encoded at once: the figures of many cells would fill the memory.
            drawn.append((item.title, base64.b64encode(png(item.figure)).decode()))
    return _write(
        directory / REPORT,
        "report.html.j2",
        rows,
        header,
        drawn=drawn,
        skipped=skipped,
        summary=_summary(rows),
        # A page of many rows opens at its standings.
        opened=len(rows) <= 400,
    )


def write_results_markdown(directory: Path, target: Path) -> None:
    """Write the committed page: machine, versions, command, commit, standings and every row."""
    rows, header = rows_to_show(directory), header_or_empty(directory)
    _write(target, "results.md.j2", rows, header, link=_link(directory, target))


def _write(
    path: Path, template: str, rows: Sequence[Row], header: Mapping[str, Any], **more: Any
) -> Path:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(text=_markdown_text, code=_code)
    for function in (cell_title, describe, is_ours, noise_of, set_title, time_of):
        environment.globals[function.__name__] = function
    known = complete_header(header, rows)
    if not header:
        known["header.json"] = "missing or unreadable; the rows say what stands here"
    text = environment.get_template(template).render(
        device=known["device"],
        header_lines=_header_lines(known),
        ratio_means=RATIO_MEANS,
        standings=[item.columns() for item in standings(rows)],
        sets=_sets(rows),
        **more,
    )
    write_whole(path, text.encode())
    return path


@dataclass
class Standing:
    """How gpu_embed stands against the best rival, over the cells of one set and mode."""

    set: str
    mode: str
    ratios: list[float] = field(default_factory=list)
    lowest_at: str = ""  # the rival and the cell of the lowest ratio
    # Cells where we have no time, where no rival has one, and where times are too noisy to be compared.
    ours_failed: int = 0
    unrivalled: int = 0
    noisy: int = 0

    @property
    def behind(self) -> int:
        return sum(ratio < 1 for ratio in self.ratios)

    def columns(self) -> Columns:
        mean = geometric_mean(self.ratios) if self.ratios else None
        lowest = min(self.ratios, default=None)
        return {
            "set": (self.set, "text"),
            "mode": (self.mode, "text"),
            "cells compared": (str(len(self.ratios)), ""),
            "geometric mean": (_number(mean, ".2f"), _ratio_class(mean)),
            "lowest": (_number(lowest, ".2f"), _ratio_class(lowest)),
            "cells below 1": (str(self.behind), ""),
            "no time of ours": (str(self.ours_failed), "bad" if self.ours_failed else ""),
            "no rival's time": (str(self.unrivalled), ""),
            "noisy": (str(self.noisy), "bad" if self.noisy else ""),
            "lowest at": (self.lowest_at, "text wrap"),
        }


def standings(rows: Sequence[Row]) -> list[Standing]:
    """A standing for each set and mode, in the order of the rows."""
    found: dict[tuple[str, str], Standing] = {}
    for cell, providers in by_cell(rows).items():
        standing = found.setdefault((cell.set, cell.mode), Standing(cell.set, cell.mode))
        ours, rival = our_row(providers), best_rival(providers)
        ratio = ratio_of(rival, ours)
        if ratio is not None and rival is not None:
            if ratio < min(standing.ratios, default=math.inf):
                standing.lowest_at = f"{rival.provider}: {describe(cell)}"
            standing.ratios.append(ratio)
        elif ours is None or time_of(ours) is None:
            standing.ours_failed += 1
        elif rival is None:
            standing.unrivalled += 1
        else:
            standing.noisy += 1
    return list(found.values())


def _sets(rows: Iterable[Row]) -> dict[str, dict[Key, list[tuple[Row, Columns]]]]:
    """The cells of each set; those of a cell by time, and at the end what has none, ours first."""
    sets: dict[str, dict[Key, list[tuple[Row, Columns]]]] = {}
    for cell, providers in by_cell(rows).items():
        rival = best_rival(providers)
        ordered = sorted(
            providers.values(),
            key=lambda row: (time_of(row) or math.inf, not is_ours(row.provider)),
        )
        sets.setdefault(cell.set, {})[cell] = [(row, _columns(row, rival)) for row in ordered]
    return sets


def _columns(row: Row, rival: Row | None) -> Columns:
    """A row that is not ok shows no time, whatever it holds."""
    ratio = ratio_of(rival, row) if is_ours(row.provider) else None
    noise = noise_of(row)
    versus = times = ""
    if time_of(row) is None:
        row = replace(row, **NO_TIMES)
    elif is_ours(row.provider) and rival is not None:
        versus = "noisy" if ratio is None else f"{ratio:.2f} ({rival.provider})"
    if row.ms_p20 is not None and row.ms_p80 is not None:
        times = f"{row.ms_p20:.4g} to {row.ms_p80:.4g}"
    sizes = (row.peak_extra_bytes, row.step_peak_bytes)
    extra, peak = (None if size is None else size / 2**20 for size in sizes)
    said = "; ".join(text for text in (row.match, row.note, noise) if text)
    return {
        "provider": (row.provider, "text"),
        "status": (STATUS_TEXTS[row.status], "text" if row.status == "ok" else "text bad"),
        "ms, median": (_number(row.ms_p50), ""),
        "best rival / this": (versus, _ratio_class(ratio)),
        "p20 to p80": (times, "bad" if noise else ""),
        "ms, cold L2": (_number(row.cold_ms_p50), ""),
        "GB/s DRAM": (_number(row.gbps_dram, ",.0f"), ""),
        "GB/s logical": (_number(row.gbps_logical, ",.0f"), ""),
        "% of copy": (_number(row.percent_of_copy, ".1f"), ""),
        "host us": (_number(row.host_us, ".1f"), ""),
        "extra MiB": (_number(extra, ",.1f"), ""),
        "step's peak MiB": (_number(peak, ",.1f"), ""),
        "check and notes": (said, "text wrap"),
    }


def cell_title(cell: Key, lines: Iterable[tuple[Row, Columns]]) -> str:
    """The cell, its different ids, and what zero-fill and cast of its gradient take on their own."""
    rows = [row for row, _ in lines]
    text = describe(cell)
    if unique := next((row.unique_ids for row in rows if row.unique_ids), None):
        text += f", {unique:,} different ids"
    if filled := next((row for row in rows if row.zero_fill_ms is not None), None):
        text += f"; zero-fill of the gradient {_number(filled.zero_fill_ms)} ms"
        if filled.cast_ms is not None:
            text += f", its cast from fp32 {_number(filled.cast_ms)} ms"
    return text


def set_title(name: str) -> str:
    return f"Set {name}: {SETS[name].description}" if name in SETS else f"Set {name}"


def _summary(rows: Sequence[Row]) -> str:
    """How many rows there are in which state."""
    counts = Counter(row.status for row in rows)
    states = ", ".join(f"{counts[s]:,} {text}" for s, text in STATUS_TEXTS.items() if counts[s])
    noisy = sum(bool(noise_of(row)) for row in rows)
    return f"{len(rows):,} rows, {states}" + (f" ({noisy:,} noisy)" if noisy else "")


def _ratio_class(ratio: float | None) -> str:
    return "" if ratio is None else "ahead" if ratio >= 1 else "behind"


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def _header_lines(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each entry; a CPU has no capability and no driver."""
    return [
        (HEADER_LABELS.get(name, name), _header_text(value))
        for name, value in header.items()
        if value not in (None, "", [], {})
    ]


def _header_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_header_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        joint = "." if all(isinstance(item, int) for item in value) else " "
        return joint.join(map(str, value))
    return str(value)


def _markdown_text(text: str) -> str:
    """Nothing in a message may end the cell or begin a tag."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("_", "\\_")


def _code(text: str) -> str:
    """As it is, in code quotes; a pipe would still end the table's cell."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else ""


def _link(directory: Path, target: Path) -> str:
    """A link, where the results lie beneath the page; else their folder's name."""
    try:
        inside = directory.resolve().relative_to(target.resolve().parent).as_posix()
    except ValueError:
        return f"`results.csv` in {_code(directory.resolve().name)}"
    return f"[`{inside}/results.csv`]({inside}/results.csv)"
