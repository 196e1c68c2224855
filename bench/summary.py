"""The answer to no arguments: what this machine shows in one minute."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import host_time
from .byte_floor import COPY_SHARE, LAUNCH_MS, PREDICTION, Card, bytes_moved, count, predicted_ms
from .compare import noise_of, ratio_of
from .console import make_table, print_table
from .measure import Bench, draw_ids, places
from .providers import PROVIDERS
from .results import Row
from .shapes import CPU_CELLS, HEADLINE, SETS, Cell
from .timing import Effort

# No cell is begun later than this, so that all ends within a minute.
LAST_START_SECONDS = 45.0
# For each shape and mode on a CPU.
CPU_SECONDS = 1.0


def summarize_gpu(bench: Bench, console: Console, progress: Progress) -> list[Row]:
    """The headline shapes against every installed rival; returns the rows."""
    bench.effort = Effort(seconds=0.2, max_samples=50, cold=False, host_seconds=0)
    providers = [
        p for p in PROVIDERS.values() if not p.candidate and p.missing_reason(bench.device) is None
    ]
    modes = ("forward", "backward")
    end = time.monotonic() + LAST_START_SECONDS
    rows: dict[Cell, list[Row]] = {cell: [] for _, cell in HEADLINE}
    task = progress.add_task("measuring", total=len(HEADLINE) * len(modes) * len(providers))
    for number, (name, cell) in enumerate(HEADLINE):
        if time.monotonic() > end:
            console.print(
                f"{len(HEADLINE) - number} of {len(HEADLINE)} shapes left out: the minute is over"
            )
            break
        if (full := bench.does_not_fit(cell, "backward")) is not None:
            console.print(f"{cell}: left out, {full}")
            continue
        problem = bench.problem(cell)
        for mode in modes:
            for provider in providers:
                progress.advance(task)
                if provider.refuses(cell, mode) is None and time.monotonic() <= end:
                    row = bench.row(name, cell, mode, provider.name)
                    rows[cell].append(bench.measure(problem, provider, mode, row))
    progress.remove_task(task)
    for cell, shown in rows.items():
        if shown:
            print_table(console, rows_table(str(cell), shown))
    return list(itertools.chain(*rows.values()))


def rows_table(title: str, rows: Iterable[Row]) -> Table:
    """Providers by mode: time, bandwidth, verdict."""
    table = make_table(title, "mode", "provider", ">ms", ">GB/s", ">% of copy", "result")
    for row in rows:
        figures = map(number, (row.ms_p50, row.gbps_dram, row.percent_of_copy))
        table.add_row(row.mode, row.provider, *figures, verdict(row))
    return table


def summarize_cpu(bench: Bench, console: Console, progress: Progress, card: Card) -> list[Row]:
    """The layer against torch's on the CPU, the host's time, and predictions for a card; returns the rows."""
    bench.effort = Effort(seconds=CPU_SECONDS, max_samples=200, cold=False, host_seconds=0)
    modes = ("forward", "backward", "full")
    ours, theirs = PROVIDERS["gpu_embed"], PROVIDERS["torch"]
    task = progress.add_task("lookups on the CPU", total=len(CPU_CELLS) * len(modes))
    rows: list[Row] = []
    for cell in CPU_CELLS:
        problem = bench.problem(cell)
        for mode in modes:
            blank = [bench.row("", cell, mode, provider.name) for provider in (ours, theirs)]
            rows += bench.measure_together(problem, (ours, theirs), mode, blank)
            progress.advance(task)
    progress.remove_task(task)
    print_table(console, cpu_table(rows))
    task = progress.add_task("host time", total=None)
    times = host_time.measure_host_time()
    progress.remove_task(task)
    print_table(console, host_table(times))
    print_table(console, prediction_table(card))
    return rows


def cpu_table(rows: Sequence[Row]) -> Table:
    """Ours and torch's side by side; the rows come in such pairs."""
    numbers = (">gpu_embed", ">torch", ">torch / gpu_embed", ">% of copy")
    title = "On this CPU, the layer against torch's (ms, median)"
    table = make_table(title, "shape", "mode", *numbers, "result")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        ratio = ratio_of(theirs, ours)
        shape = f"{ours.vocab:,} x {ours.dim} {ours.dtype}, {ours.num_ids:,} ids"
        times = (number(ours.ms_p50), number(theirs.ms_p50))
        faster = "" if ratio is None else f"{ratio:.2f}x"
        share = number(ours.percent_of_copy)
        table.add_row(shape, ours.mode, *times, faster, share, verdict(ours, theirs))
    return table


def verdict(row: Row, other: Row | None = None) -> str:
    """Whether a row is right, and why its time, or the one that it stands beside, is noisy."""
    if row.status != "ok":
        return f"{row.status}: {row.match or row.note}"
    noise = noise_of(row) or (noise_of(other) if other is not None else "")
    return "; ".join(text for text in (row.match, noise) if text)


def host_table(times: Sequence[host_time.HostTime]) -> Table:
    """Microseconds per call, by mode."""
    title = f"The host's time per call (us; {host_time.NUM_IDS} ids, rows of {host_time.DIM})"
    table = make_table(title, "lookup", *(f">{mode}" for mode in host_time.MODES))
    for who in dict.fromkeys(entry.who for entry in times):
        own = {entry.mode: entry for entry in times if entry.who == who}
        cells = [
            f"{own[mode].us:.1f}" + ("" if who == "torch" else f" ({own[mode].times_torch:.1f}x)")
            for mode in host_time.MODES
        ]
        table.add_row(who, *cells)
    return table


def prediction_table(card: Card) -> Table:
    """What a card would need at the least, from bytes alone."""
    says = PREDICTION.format(share=COPY_SHARE, bandwidth=card.bandwidth)
    numbers = (">floor, MB", ">predicted ms")
    table = make_table(f"{card.name}, {says}", "set", "shape", "mode", *numbers)
    steps = [("D", cell) for cell in SETS["D"].cells]
    for name, cell in (*HEADLINE, *steps):
        counts = count(places(cell, draw_ids(cell, seed=0)), cell.padding_idx)
        for mode in ("step",) if (name, cell) in steps else ("forward", "backward"):
            moved = bytes_moved(cell, mode, counts).dram
            ms = predicted_ms(card, moved)
            shown = number(ms) if ms >= LAUNCH_MS else f"< {LAUNCH_MS:g}, the launch counts"
            table.add_row(name, str(cell), mode, number(moved / 1e6), shown)
    return table


def number(value: float | None) -> str:
    """Three digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
