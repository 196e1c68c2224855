"""Two results side by side: did anything get slower, or stop being right?

A CI runner calls it through ``python -m gpu_embed.bench compare NEW.csv --fail-below 0.95``.
The first half, what a cell is and which rows are ours, serves the plots and the report too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from . import machine
from .console import make_console, make_table, print_table
from .results import RESULTS, Key, ResultsError, Row, read_header, read_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OURS = "gpu_embed"
# What a user of the layer gets: the kernel of our own choice, sparse=True, updates in the backward pass, and
# gradients added to in place.
OFFERED = (OURS, f"{OURS}-sparse", f"{OURS}-in-backward", f"{OURS}-in-place")
# Broken and slower rows are always printed; of the others this many.
SHOWN = 40
# p80 / p20 of a time: beyond it the median is no measure.
LARGEST_SPREAD = 2.0
NOISY_MEANS = f"p80 above {LARGEST_SPREAD:g} times p20, or more processes than cores"
# Where results are committed, in a checkout.
ROOT = Path(__file__).resolve().parent / "results"
REGRESSION = 1
UNUSABLE = 2


def is_ours(provider: str) -> bool:
    """gpu_embed, or gpu_embed with one of its methods forced."""
    return provider.startswith(OURS)


def time_of(row: Row) -> float | None:
    """The median in ms; None unless the row is right and was timed."""
    if row.status == "ok" and row.ms_p50 is not None and 0 < row.ms_p50 < math.inf:
        return row.ms_p50
    return None


def state_of(row: Row) -> str:
    """What stands in place of a time."""
    return "not timed" if row.status == "ok" else row.status


def noise_of(row: Row) -> str:
    """Why a time is too noisy to be called faster or slower than another; empty where it is not."""
    if time_of(row) is None:
        return ""
    if row.ms_p20 and row.ms_p80 is not None and row.ms_p80 > LARGEST_SPREAD * row.ms_p20:
        return f"noisy: p80 is {row.ms_p80 / row.ms_p20:.1f} times p20"
    if row.load is not None and row.load > 1:
        return f"noisy: {row.load:.1f} processes wanted each core"
    return ""


def cell_of(row: Row) -> Key:
    """What was measured, without by whom."""
    return row.key._replace(provider="")


def by_cell(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """For each cell its rows by provider, both in the order of the file."""
    cells: dict[Key, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(cell_of(row), {})[row.provider] = row
    return cells


def our_row(providers: Mapping[str, Row]) -> Row | None:
    """The row that stands for us: the faster of what is offered, else the fastest forced method.

    gpu_embed's own choice without a time is a failure that no other row hides.
    """
    default = providers.get(OURS)
    if default is not None and time_of(default) is None:
        return default
    offered = [providers[name] for name in OFFERED if name in providers]
    forced = [row for name, row in providers.items() if is_ours(name)]
    return min(offered or forced, key=lambda row: time_of(row) or math.inf, default=None)


def best_rival(providers: Mapping[str, Row]) -> Row | None:
    """The fastest provider that is not ours, among those that are right."""
    timed = [row for name, row in providers.items() if not is_ours(name) and time_of(row)]
    return min(timed, key=lambda row: time_of(row) or math.inf, default=None)


def ratio_of(slow: Row | None, fast: Row | None) -> float | None:
    """How many times faster the second is; None unless both were timed, and without noise."""
    above = time_of(slow) if slow and not noise_of(slow) else None
    below = time_of(fast) if fast and not noise_of(fast) else None
    return above / below if above and below else None


def describe(cell: Key) -> str:
    """A cell in one line; what is the same almost everywhere is left out."""
    parts = [
        cell.set,
        cell.operation if cell.operation != "embedding" else "",
        cell.mode,
        cell.dtype,
        f"{cell.tables} tables" if cell.tables > 1 else "",
        f"V={cell.vocab:,}" if cell.vocab else "",
        f"D={cell.dim:,}",
        f"N={cell.num_ids:,}" if cell.num_ids else "",
        f"bags of {cell.hotness}" if cell.hotness > 1 else "",
        cell.distribution,
        cell.id_dtype if cell.id_dtype != "int64" else "",
        f"padding {cell.padding:.0%}" if cell.padding else "",
    ]
    return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Pair:
    """The same cell and provider in both results."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float | None:
        """old ms / new ms: 1.0 is the same, below 1 is slower."""
        return ratio_of(self.old, self.new)

    @property
    def broke(self) -> bool:
        """There was a time, and now there is none."""
        return time_of(self.old) is not None and time_of(self.new) is None

    @property
    def noisy(self) -> bool:
        """Both have a time, and one of them is too noisy for a verdict."""
        timed = time_of(self.old) and time_of(self.new)
        return bool(timed and (noise_of(self.old) or noise_of(self.new)))

    @property
    def mended(self) -> bool:
        return time_of(self.old) is None and time_of(self.new) is not None

    @property
    def judged(self) -> bool:
        """Decides the exit code: ours, and with an old time to hold on to."""
        return is_ours(self.new.provider) and time_of(self.old) is not None

    def regressed(self, fail_below: float) -> bool:
        return self.broke or (self.ratio is not None and self.ratio < fail_below)

    def verdict(self, fail_below: float) -> str:
        if self.regressed(fail_below):
            return "BROKEN" if self.broke else "SLOWER"
        if self.noisy:
            return "noisy"
        return "mended" if self.mended else ""


@dataclass(frozen=True)
class Comparison:
    """Both results, matched: worst pair first."""

    pairs: list[Pair]
    only_old: list[Row]
    only_new: list[Row]

    @property
    def lost(self) -> list[Row]:
        """Ours that had a time and are gone."""
        return [row for row in self.only_old if is_ours(row.provider) and time_of(row)]

    def providers(self) -> dict[str, list[Pair]]:
        """The pairs by provider, ours first."""
        names = {pair.new.provider for pair in self.pairs}
        return {
            name: [pair for pair in self.pairs if pair.new.provider == name]
            for name in sorted(names, key=lambda name: (not is_ours(name), name))
        }


def compare(old: Iterable[Row], new: Iterable[Row]) -> Comparison:
    """Match the rows by what identifies them. If a file holds a row twice, the last one counts."""
    old_rows = {row.key: row for row in old}
    new_rows = {row.key: row for row in new}
    pairs = [Pair(old_rows[key], row) for key, row in new_rows.items() if key in old_rows]
    return Comparison(
        pairs=sorted(pairs, key=_badness),
        only_old=[row for key, row in old_rows.items() if key not in new_rows],
        only_new=[row for key, row in new_rows.items() if key not in old_rows],
    )


def reference_of(new: Path) -> Path:
    """The newest committed results of the same device and with a row in common: what CI holds a run against.

    Raises ResultsError if there are none.
    """
    measured = {(row.device, row.key) for row in read_rows(new)}
    file = (new / RESULTS if new.is_dir() else new).resolve()
    # What lies there and is not committed may be the new results themselves, or an earlier try.
    committed = [ROOT / name for name in machine.tracked_files(ROOT, f"*/{RESULTS}")]
    comparable = [
        path
        for path in committed
        if path.resolve() != file
        and any((row.device, row.key) in measured for row in read_rows(path))
    ]
    if not comparable:
        device = _listed({device for device, _ in measured})
        raise ResultsError(
            f"{ROOT} holds no committed results of {device} with these rows: name OLD before NEW, or commit the "
            "directory of NEW there, and the next run is compared with it"
        )
    return max(comparable, key=lambda path: str(read_header(path).get("date", "")))


def main_compare(old: Path | None, new: Path, fail_below: float) -> int:
    """Print the comparison; return 0, REGRESSION or UNUSABLE, for a shell.

    Without old results the committed ones of the same device stand for them.

    Only gpu_embed's own rows decide: a rival that got slower is no fault of ours. A row of ours that had a time
    and is not there any more counts too: a run that ended early must not pass. A noisy row gets no verdict; where
    all of ours are noisy, there is none at all.

    Raises ResultsError for files that cannot be compared, or a ratio that is none.
    """
    if not 0 < fail_below < math.inf:
        raise ResultsError(f"--fail-below {fail_below}: expected a ratio above 0, such as 0.95")
    console = make_console()
    if old is None:
        old = reference_of(new)
        console.print(f"compared with {old}, the newest committed results of this device")
    comparison = compare(read_rows(old), read_rows(new))
    if not comparison.pairs:
        raise ResultsError(f"{old} and {new} have no row in common")
    _print_versions(console, comparison)
    print_table(console, _pair_table(comparison.pairs, fail_below))
    print_table(console, _provider_table(comparison, fail_below))
    for name, rows in (("old", comparison.only_old), ("new", comparison.only_new)):
        _print_unmatched(console, name, rows)
    return _conclude(console, comparison, fail_below)


def _conclude(console: Console, comparison: Comparison, fail_below: float) -> int:
    warn = partial(console.print, style="bold yellow")
    console.print("Rivals are shown for orientation; only gpu_embed's rows decide the exit code.")
    elsewhere = [pair for pair in comparison.pairs if pair.old.device != pair.new.device]
    if elsewhere:
        old, new = (
            _listed({getattr(p, side).device for p in elsewhere}) for side in ("old", "new")
        )
        warn(
            f"WARNING: this compares two machines ({old} and {new}), so the ratios say nothing about the "
            "code: no verdict."
        )
        return UNUSABLE
    judged = [pair for pair in comparison.pairs if pair.judged]
    if not judged:
        warn("No row of gpu_embed has a time in old and stands in new: nothing to judge.")
        return UNUSABLE
    noisy = sum(pair.noisy for pair in judged)
    if noisy:
        warn(
            f"{noisy} of {len(judged)} rows of gpu_embed are noisy ({NOISY_MEANS}): they are neither slower nor "
            "faster. Measure again on a quiet machine."
        )
    broke = sum(pair.broke for pair in judged)
    slower = sum(pair.regressed(fail_below) for pair in judged) - broke
    lost = len(comparison.lost)
    if broke or slower or lost:
        worse = "REGRESSION" if broke or slower else "INCOMPLETE"
        console.print(
            f"{worse}: of {len(judged) + lost} rows of gpu_embed, {slower} below {fail_below:g}, "
            f"{broke} no longer ok and {lost} missing in new.",
            style="bold red",
        )
        if broke or slower or noisy < len(judged):
            return REGRESSION
    if noisy == len(judged):
        return UNUSABLE
    said = f"OK: none of {len(judged) - noisy} rows of gpu_embed is below {fail_below:g}."
    console.print(said, style="bold green")
    return 0


def _print_versions(console: Console, comparison: Comparison) -> None:
    for side in ("old", "new"):
        rows = [getattr(pair, side) for pair in comparison.pairs]
        device, *versions = (
            _listed({getattr(row, name) for row in rows})
            for name in ("device", "torch", "triton", "commit")
        )
        console.print("{}: {}, torch {}, triton {}, commit {}".format(side, device, *versions))


def _pair_table(pairs: Sequence[Pair], fail_below: float) -> Table:
    from rich.box import SIMPLE_HEAD

    bad = [pair for pair in pairs if pair.regressed(fail_below)]
    shown = bad + [pair for pair in pairs if not pair.regressed(fail_below)][:SHOWN]
    left_out = len(pairs) - len(shown)
    table = make_table(
        f"old ms / new ms (1.0: the same; below 1: slower), worst of {len(pairs)} rows first",
        *("verdict", ">ratio", ">old ms", ">new ms", "provider"),
        caption=f"{left_out} more rows, none of them slower or broken" if left_out else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for column in table.columns:
        column.no_wrap = True
    table.add_column("cell", overflow="fold")
    for pair in shown:
        ratio = "" if pair.ratio is None else f"{pair.ratio:.3f}"
        figures = (ratio, _milliseconds(pair.old), _milliseconds(pair.new))
        cells = (pair.verdict(fail_below), *figures, pair.new.provider, describe(cell_of(pair.new)))
        table.add_row(*cells, style=_style(pair, fail_below))
    return table


def _provider_table(comparison: Comparison, fail_below: float) -> Table:
    from rich.box import SIMPLE_HEAD

    counts = (
        ">compared",
        ">geometric mean",
        ">worst",
        ">best",
        f">below {fail_below:g}",
        ">broken",
    )
    table = make_table("By provider", "provider", *counts, "decides", box=SIMPLE_HEAD)
    for provider, pairs in comparison.providers().items():
        ratios = [pair.ratio for pair in pairs if pair.ratio is not None]
        figures = [f"{of(ratios):.3f}" if ratios else "" for of in (geometric_mean, min, max)]
        slower = sum(ratio < fail_below for ratio in ratios)
        broken = sum(pair.broke for pair in pairs)
        decides = "yes" if is_ours(provider) else "no"
        counted = (str(slower), str(broken), decides)
        table.add_row(provider, str(len(ratios)), *figures, *counted)
    return table


def _print_unmatched(console: Console, name: str, rows: Sequence[Row]) -> None:
    if not rows:
        return
    ours = sum(is_ours(row.provider) for row in rows)
    console.print(f"{len(rows)} rows only in {name}, {ours} of them gpu_embed's:")
    for row in sorted(rows, key=lambda row: not is_ours(row.provider))[:SHOWN]:
        console.print(f"  {row.provider}: {describe(cell_of(row))}", soft_wrap=True)
    if len(rows) > SHOWN:
        console.print(f"  and {len(rows) - SHOWN} more")


def _badness(pair: Pair) -> tuple[int, float]:
    """Broken rows first, then by ratio, then those with no ratio."""
    return 0 if pair.broke else 1 if pair.ratio is not None else 2, pair.ratio or 0.0


def _style(pair: Pair, fail_below: float) -> str:
    if not pair.regressed(fail_below):
        return "green" if pair.mended else ""
    return "bold red" if pair.judged else "yellow"


def _milliseconds(row: Row) -> str:
    value = time_of(row)
    return state_of(row) if value is None else f"{value:.4g}"


def _listed(names: Iterable[str]) -> str:
    return " + ".join(sorted(name or "unknown" for name in names))
