"""Results for people: one HTML page that needs no network, and the Markdown that is committed."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compare import (
    NOISY_MEANS,
    best_rival,
    by_cell,
    describe,
    geometric_mean,
    is_ours,
    noise_of,
    our_row,
    ratio_of,
    time_of,
)
from .results import Key, Row, header_or_empty, rows_to_show
from .shapes import SETS

if TYPE_CHECKING:
    from .plots import Picture, Skipped

REPORT = "report.html"

# Header entry, and what it is called. What a header holds beyond these is shown by its own name.
HEADER_LABELS = {
    "device": "device",
    "driver": "driver",
    "capability": "compute capability",
    "copy_gbps": "measured copy bandwidth (GB/s, read plus written)",
    "clocks": "clocks",
    "load": "load of the CPU before, 1 and 5 minutes",
    "torch": "torch",
    "cuda": "CUDA",
    "triton": "triton",
    "python": "Python",
    "gpu_embed": "gpu_embed",
    "backend": "backend",
    "commit": "commit",
    "date": "date",
    "command": "command",
    "seed": "seed",
}

RATIO_MEANS = (
    "The best rival is, cell by cell, the fastest provider with the right result that is not gpu_embed. "
    "A ratio is its time / gpu_embed's time, from the same run: above 1, gpu_embed is faster. "
    "gpu_embed is the layer with the kernels of its own choice; in a step, the fastest of that, of sparse=True "
    "with gpu_embed.optim, and of updates in the backward pass. "
    f"A noisy time ({NOISY_MEANS}) has no ratio: measure it again on a quiet machine."
)

STATUS_TEXTS = {
    "ok": "ok",
    "wrong": "WRONG result",
    "missing": "not available",
    "error": "ERROR",
    "oom": "out of memory",
}

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 1280px; padding: 1.5rem; }
h1 { margin: 0 0 .3rem; }
h2 { margin: 2.2rem 0 .5rem; border-bottom: 2px solid #0072B2; padding-bottom: .2rem; }
p.lead, .quiet { color: #555; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table { font-size: 13px; }
th, td { padding: .15rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
td.text, th.text { text-align: left; }
td.wrap, td.why { white-space: normal; overflow-wrap: anywhere; }
td.wrap { min-width: 10rem; max-width: 26rem; }
thead th { white-space: normal; vertical-align: bottom; background: #eef3f7; position: sticky; top: 0; }
tbody tr:hover td { background: #f6f9fb; }
th.cell { text-align: left; padding-top: .8rem; border-bottom: 1px solid #999; font-weight: 600; }
tr.ours td { background: #e9f2fa; }
tr.ours td.text:first-child { font-weight: 600; }
td.ahead { background: #cfe4f5 !important; font-weight: 600; }
td.behind { background: #fbd9b5 !important; font-weight: 600; }
td.bad { color: #8a2b00; font-weight: 700; }
table.header th { text-align: left; font-weight: 600; }
table.header { font-size: 15px; margin-top: 1rem; }
table.header td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0 2rem; }
figure img { max-width: 100%; height: auto; border: 1px solid #ddd; }
summary { cursor: pointer; margin: .6rem 0; }
.scroll { overflow-x: auto; }
nav a { margin-right: .9rem; }
@media print { details > * { display: block; } thead th { position: static; } }
"""


@dataclass(frozen=True)
class Standing:
    """How gpu_embed stands against the best rival, over the cells of one set and mode."""

    set: str
    mode: str
    ratios: list[float]
    lowest_cell: Key | None
    lowest_rival: str
    # Cells where we have no time, and cells where no rival has one.
    ours_failed: int
    unrivalled: int
    noisy: int  # cells whose times are too noisy to be compared

    @property
    def behind(self) -> int:
        return sum(ratio < 1 for ratio in self.ratios)


def write_report(directory: Path) -> Path:
    """Write DIR/report.html: header, standings, pictures and every row."""
    from .plots import Picture, pictures, png

    rows = rows_to_show(directory)
    header = _header(directory)
    drawn: list[tuple[Picture, str]] = []
    skipped: list[Skipped] = []
    for item in pictures(rows, header):
        if isinstance(item, Picture):
            # Encoded at once: the figures of many cells would fill the memory.
            drawn.append((item, base64.b64encode(png(item.figure)).decode()))
        else:
            skipped.append(item)
    path = directory / REPORT
    _write(path, _page(rows, header, drawn, skipped))
    return path


def write_results_markdown(directory: Path, target: Path) -> None:
    """Write the committed page: machine, versions, command, commit, standings and every row."""
    rows = rows_to_show(directory)
    header = _header(directory)
    lines = [
        "# Results",
        "",
        "Generated from a results directory by the benchmark; not edited by hand. A wrong result gets no time.",
        "",
        *_markdown_table(
            ["", ""], [[label, _code(value)] for label, value in _header_lines(rows, header)]
        ),
        "",
        f"Every column of every row: {_link(directory, target)}.",
        "",
        "## Against the best rival",
        "",
        RATIO_MEANS,
        "",
        *_markdown_table(STANDING_COLUMNS, [_standing_texts(item) for item in standings(rows)]),
    ]
    for name, found in _sets(rows).items():
        lines += ["", f"## {_set_title(name)}", "", *_markdown_table(*_markdown_rows(found))]
    _write(target, "\n".join(lines) + "\n")


def standings(rows: Sequence[Row]) -> list[Standing]:
    """A standing for each set and mode, in the order of the rows."""
    groups: dict[tuple[str, str], dict[Key, dict[str, Row]]] = {}
    for cell, providers in by_cell(rows).items():
        groups.setdefault((cell.set, cell.mode), {})[cell] = providers
    found = []
    for (set_, mode), cells in groups.items():
        ratios: dict[Key, tuple[float, str]] = {}
        ours_failed = unrivalled = noisy = 0
        for cell, providers in cells.items():
            ours, rival = our_row(providers), best_rival(providers)
            ratio = ratio_of(rival, ours)
            if ratio is not None and rival is not None:
                ratios[cell] = (ratio, rival.provider)
            elif ours is None or time_of(ours) is None:
                ours_failed += 1
            elif rival is None:
                unrivalled += 1
            else:
                noisy += 1
        lowest = min(ratios, key=lambda cell: ratios[cell][0], default=None)
        found.append(
            Standing(
                set_,
                mode,
                [ratio for ratio, _ in ratios.values()],
                lowest,
                ratios[lowest][1] if lowest else "",
                ours_failed,
                unrivalled,
                noisy,
            )
        )
    return found


STANDING_COLUMNS = [
    "set",
    "mode",
    "cells compared",
    "geometric mean",
    "lowest",
    "cells below 1",
    "no time of ours",
    "no rival's time",
    "noisy",
    "lowest at",
]


def _standing_texts(item: Standing) -> list[str]:
    return [
        item.set,
        item.mode,
        str(len(item.ratios)),
        f"{geometric_mean(item.ratios):.2f}" if item.ratios else "",
        f"{min(item.ratios):.2f}" if item.ratios else "",
        str(item.behind),
        str(item.ours_failed),
        str(item.unrivalled),
        str(item.noisy),
        f"{item.lowest_rival}: {describe(item.lowest_cell)}" if item.lowest_cell else "",
    ]


# The page


def _page(
    rows: Sequence[Row],
    header: Mapping[str, Any],
    drawn: Sequence[tuple[Picture, str]],
    skipped: Sequence[Skipped],
) -> str:
    sets = _sets(rows)
    device = dict(_header_lines(rows, header))["device"]
    links = [("rivals", "Against the best rival"), ("pictures", "Pictures")]
    links += [(_anchor(i), f"Set {name}") for i, name in enumerate(sets)]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        # The browser itself refuses anything that is not in the page.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>gpu_embed benchmark: {escape(device)}</title>",
        f"<style>{STYLE}</style></head><body>",
        "<h1>gpu_embed benchmark</h1>",
        f'<p class="lead">{len(rows):,} rows, {_count_of_states(rows)}{_noisy(rows)}, on {escape(device)}.</p>',
        "<nav>",
        *(f'<a href="#{to}">{escape(text)}</a>' for to, text in links),
        "</nav>",
        '<table class="header"><tbody>',
        *(
            f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>"
            for label, value in _header_lines(rows, header)
        ),
        "</tbody></table>",
        '<h2 id="rivals">Against the best rival</h2>',
        f'<p class="quiet">{escape(RATIO_MEANS)}</p>',
        _standing_table(standings(rows)),
        '<h2 id="pictures">Pictures</h2>',
        *(_figure(picture, data) for picture, data in drawn),
        *(
            f'<p class="quiet">Not drawn: {escape(item.kind)}: {escape(item.reason)}.</p>'
            for item in skipped
        ),
    ]
    for i, (name, found) in enumerate(sets.items()):
        parts.append(f'<h2 id="{_anchor(i)}">{escape(_set_title(name))}</h2>')
        parts.append(_set_table(found, opened=len(rows) <= 400))
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _figure(picture: Picture, data: str) -> str:
    title = escape(picture.title)
    return f'<figure><img alt="{title}" src="data:image/png;base64,{data}"></figure>'


def _standing_table(items: Sequence[Standing]) -> str:
    lines = ['<div class="scroll"><table><thead><tr>']
    lines += [_tag("th", name, "text") for name in STANDING_COLUMNS]
    lines.append("</tr></thead><tbody>")
    for item in items:
        texts = _standing_texts(item)
        figures = (geometric_mean(item.ratios), min(item.ratios)) if item.ratios else (None, None)
        classes = [
            "text",
            "text",
            "",
            _ratio_class(figures[0]),
            _ratio_class(figures[1]),
            "",
            "bad" if item.ours_failed else "",
            "",
            "bad" if item.noisy else "",
            "text wrap",
        ]
        lines.append(_tr(zip(texts, classes, strict=True)))
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


SET_COLUMNS = [
    "provider",
    "status",
    "ms, median",
    "best rival / this",
    "p20 to p80",
    "ms, cold L2",
    "GB/s DRAM",
    "GB/s logical",
    "% of copy",
    "host us",
    "extra MiB",
    "step's peak MiB",
    "check and notes",
]


def _set_table(rows: Sequence[Row], opened: bool) -> str:
    cells = by_cell(rows)
    lines = [
        f"<details{' open' if opened else ''}><summary>{len(rows):,} rows of {len(cells):,} cells, "
        "fastest first</summary>",
        "<table><thead><tr>",
        *(
            _tag("th", name, "text" if name in ("provider", "status", "check and notes") else "")
            for name in SET_COLUMNS
        ),
        "</tr></thead>",
    ]
    for cell, providers in cells.items():
        unique = next((row.unique_ids for row in providers.values() if row.unique_ids), None)
        text = describe(cell) + (f", {unique:,} different ids" if unique else "")
        text += _gradient_parts(providers.values())
        lines.append(
            f'<tbody><tr><th class="cell" colspan="{len(SET_COLUMNS)}">{escape(text)}</th></tr>'
        )
        rival = best_rival(providers)
        for row in _fastest_first(providers.values()):
            lines.append(_set_row(row, rival))
        lines.append("</tbody>")
    lines.append("</table></details>")
    return "\n".join(lines)


def _gradient_parts(rows: Iterable[Row]) -> str:
    """What the zero-fill of the cell's gradient and its cast from fp32 take on their own."""
    row = next((row for row in rows if row.zero_fill_ms is not None), None)
    if row is None:
        return ""
    cast = "" if row.cast_ms is None else f", its cast from fp32 {_number(row.cast_ms)} ms"
    return f"; zero-fill of the gradient {_number(row.zero_fill_ms)} ms{cast}"


def _set_row(row: Row, rival: Row | None) -> str:
    """A row of the table; one without a time says why across the columns that it leaves empty."""
    cells = _set_cells(row, rival)
    kind = "ours" if is_ours(row.provider) else ""
    if time_of(row) is not None:
        return _tr(cells, kind)
    (provider, status, *_, (why, _)) = cells
    wide = f'<td class="text why" colspan="{len(SET_COLUMNS) - 2}">{escape(why)}</td></tr>'
    return _tr([provider, status], kind).removesuffix("</tr>") + wide


def _set_cells(row: Row, rival: Row | None) -> list[tuple[str, str]]:
    """Text and CSS class of each column. A row that is not ok shows no time, whatever it holds."""
    ratio = ratio_of(rival, row) if is_ours(row.provider) else None
    timed = time_of(row) is not None
    versus = f"{ratio:.2f} ({rival.provider})" if ratio is not None and rival is not None else ""
    noise = noise_of(row)
    if is_ours(row.provider) and timed and rival is not None and ratio is None:
        versus = "noisy"
    extra, peak = (
        None if size is None else size / 2**20
        for size in (row.peak_extra_bytes, row.step_peak_bytes)
    )
    return [
        (row.provider, "text"),
        (STATUS_TEXTS[row.status], "text" if row.status == "ok" else "text bad"),
        (_number(row.ms_p50 if timed else None), ""),
        (versus, _ratio_class(ratio)),
        (_range(row) if timed else "", "bad" if noise else ""),
        (_number(row.cold_ms_p50 if timed else None), ""),
        (_number(row.gbps_dram if timed else None, ",.0f"), ""),
        (_number(row.gbps_logical if timed else None, ",.0f"), ""),
        (_number(row.percent_of_copy if timed else None, ".1f"), ""),
        (_number(row.host_us if timed else None, ".1f"), ""),
        (_number(extra, ",.1f"), ""),
        (_number(peak, ",.1f"), ""),
        ("; ".join(text for text in (row.match, row.note, noise) if text), "text wrap"),
    ]


def _tr(cells: Iterable[tuple[str, str]], kind: str = "") -> str:
    start = f'<tr class="{kind}">' if kind else "<tr>"
    return start + "".join(_tag("td", text, name) for text, name in cells) + "</tr>"


def _tag(tag: str, text: str, kind: str = "") -> str:
    """An element with a text and, if there is one, a CSS class."""
    start = f'<{tag} class="{kind}">' if kind else f"<{tag}>"
    return f"{start}{escape(text)}</{tag}>"


def _ratio_class(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "ahead" if ratio >= 1 else "behind"


def _count_of_states(rows: Sequence[Row]) -> str:
    counts = {status: sum(row.status == status for row in rows) for status in STATUS_TEXTS}
    return ", ".join(
        f"{count:,} {STATUS_TEXTS[status]}" for status, count in counts.items() if count
    )


def _noisy(rows: Sequence[Row]) -> str:
    count = sum(bool(noise_of(row)) for row in rows)
    return f" ({count:,} noisy)" if count else ""


def _anchor(index: int) -> str:
    return f"set-{index}"


# The Markdown


def _markdown_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    columns = [
        "cell",
        "provider",
        "status",
        "ms",
        "p20 to p80",
        "% of copy",
        "host us",
        "best rival / this",
        "notes",
    ]
    lines = []
    for cell, providers in by_cell(rows).items():
        rival = best_rival(providers)
        for row in _fastest_first(providers.values()):
            texts = dict(
                zip(SET_COLUMNS, (text for text, _ in _set_cells(row, rival)), strict=True)
            )
            lines.append(
                [
                    describe(cell),
                    texts["provider"],
                    texts["status"],
                    texts["ms, median"],
                    texts["p20 to p80"],
                    texts["% of copy"],
                    texts["host us"],
                    texts["best rival / this"],
                    noise_of(row) if row.status == "ok" else texts["check and notes"],
                ]
            )
    return columns, lines


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_markdown_text(text) for text in row)} |" for row in rows),
    ]


def _markdown_text(text: str) -> str:
    """Nothing in a message may end the cell or begin a tag."""
    if text.startswith("`"):
        return text
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("_", "\\_")


def _code(text: str) -> str:
    """As it is, in code quotes; a pipe would still end the table's cell."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else ""


def _link(directory: Path, target: Path) -> str:
    """A link, where the results lie beneath the page; else their folder's name."""
    try:
        inside = directory.resolve().relative_to(target.resolve().parent)
    except ValueError:
        return f"`results.csv` in {_code(directory.resolve().name)}"
    return f"[`{inside.as_posix()}/results.csv`]({inside.as_posix()}/results.csv)"


# What both share


def _header_lines(rows: Sequence[Row], header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each entry. What a lost header would have said is read off the rows."""
    known = dict(header)
    for name in ("device", "torch", "triton", "commit"):
        if not known.get(name):
            values = sorted({getattr(row, name) for row in rows} - {""})
            known[name] = " + ".join(values) or "unknown"
    if known.pop("dirty", False):
        known["commit"] = f"{known['commit']} with uncommitted changes"
    # A CPU has no capability and no driver.
    known = {name: value for name, value in known.items() if value not in (None, "", [], {})}
    names = [name for name in HEADER_LABELS if name in known]
    names += [name for name in known if name not in HEADER_LABELS]
    return [(HEADER_LABELS.get(name, name), _header_text(known[name])) for name in names]


def _header_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_header_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        joint = "." if all(isinstance(item, int) for item in value) else " "
        return joint.join(map(str, value))
    return str(value)


def _sets(rows: Iterable[Row]) -> dict[str, list[Row]]:
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault(row.set, []).append(row)
    return sets


def _set_title(name: str) -> str:
    return f"Set {name}: {SETS[name].description}" if name in SETS else f"Set {name}"


def _fastest_first(rows: Iterable[Row]) -> list[Row]:
    """By time; those that have none at the end, ours before the others."""
    return sorted(rows, key=lambda row: (time_of(row) or math.inf, not is_ours(row.provider)))


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def _range(row: Row) -> str:
    if row.ms_p20 is None or row.ms_p80 is None:
        return ""
    return f"{row.ms_p20:.4g} to {row.ms_p80:.4g}"


def _header(directory: Path) -> dict[str, Any]:
    missing = {"header.json": "missing or unreadable; the rows say what follows"}
    return header_or_empty(directory) or missing


def _write(path: Path, text: str) -> None:
    """Write beside the path and move there, so that no half page is ever seen."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
