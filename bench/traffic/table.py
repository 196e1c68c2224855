"""The table of what kernels move: one row a kernel and case.

The committed table is bench/traffic.csv. `worse` compares with it, for the test suite and for
`python -m gpu_embed.bench traffic --check bench/traffic.csv`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import row_csv
from ..console import make_table
from ..ptx.counts import LaunchCounts, longest_path
from .cases import Ideal

if TYPE_CHECKING:
    from rich.table import Table

TRITON, CUPY = OWN = ("gpu_embed", "gpu_embed cupy")
REGENERATE = "python -m gpu_embed.bench traffic --out bench/traffic.csv"


class Key(NamedTuple):
    kernel: str
    config: str
    provider: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.provider}) {self.config}"


@dataclass(frozen=True)
class Row:
    """One kernel's launches in one case, added up. The fields are the CSV's columns, in this order."""

    kernel: str
    config: str  # the case
    provider: str  # of OWN, or a rival with its version
    launches: int
    # Sectors of 32 bytes, those of each request summed; and as many as there have to be.
    load_sectors: int
    ideal_load_sectors: int
    store_sectors: int
    ideal_store_sectors: int
    atomic_sectors: int
    ideal_atomic_sectors: int
    # Accesses to global memory, one for each warp and executed instruction.
    load_requests: int
    store_requests: int
    atomic_requests: int
    hottest_sector: int  # atomic operations on the sector that has most of them
    shared_requests: int
    shared_wavefronts: int
    barriers: int  # a warp's
    instructions: int  # of PTX, of all warps
    instructions_a_512_bytes: float  # of rows or ids, moved once; 0: the kernel has nothing to move
    longest_path: int  # instructions of the longest warp, one launch after another
    divergent_blocks: int  # basic blocks that a warp executed with a part of its lanes
    compiler: str  # with its version

    @property
    def key(self) -> Key:
        return Key(self.kernel, self.config, self.provider)


COLUMNS = row_csv.columns(Row)
SECTORS = ("load_sectors", "store_sectors", "atomic_sectors")
# Of these fewer is better, and the compiler has a say in each.
COUNTED = COLUMNS[COLUMNS.index("load_requests") : COLUMNS.index("compiler")]


def make_row(
    kernel: str,
    provider: str,
    config: str,
    launches: Sequence[LaunchCounts],
    ideal: Ideal | None,
    compiler: str,
) -> Row:
    """Add up launches of one kernel.

    Args:
        ideal: None: the kernel has nothing that it has to do.
    """
    ideal = ideal or Ideal()

    def total(name: str) -> int:
        return sum(getattr(launch, name) for launch in launches)

    instructions = total("instructions")
    moved = ideal.moved_bytes
    loads, stores, atomics = (
        [getattr(launch, kind) for launch in launches] for kind in ("loads", "stores", "atomics")
    )
    return Row(
        kernel=kernel,
        config=config,
        provider=provider,
        launches=len(launches),
        load_sectors=sum(access.sectors for access in loads),
        ideal_load_sectors=ideal.loads,
        store_sectors=sum(access.sectors for access in stores),
        ideal_store_sectors=ideal.stores,
        atomic_sectors=sum(access.sectors for access in atomics),
        ideal_atomic_sectors=ideal.atomics,
        load_requests=sum(access.requests for access in loads),
        store_requests=sum(access.requests for access in stores),
        atomic_requests=sum(access.requests for access in atomics),
        hottest_sector=max(launch.hottest_sector for launch in launches),
        shared_requests=total("shared_requests"),
        shared_wavefronts=total("shared_wavefronts"),
        barriers=total("barriers"),
        instructions=instructions,
        instructions_a_512_bytes=round(512 * instructions / moved, 1) if moved else 0.0,
        longest_path=longest_path(launches),
        divergent_blocks=total("divergent_blocks"),
        compiler=compiler,
    )


def write_table(path: Path, rows: Iterable[Row]) -> None:
    row_csv.write(path, Row, sorted(rows, key=lambda row: row.key))


def read_table(path: Path) -> list[Row]:
    """Raises ResultsError where the file is no such table."""
    return row_csv.read(path, Row, f"the columns are not those of traffic: {REGENERATE}")


def rivals_of(path: Path) -> list[Row]:
    """The rows of a table that are not ours; none where there is no table."""
    rows = read_table(path) if path.exists() else []
    return [row for row in rows if row.provider not in OWN]


def worse(old: Collection[Row], new: Collection[Row]) -> list[str]:
    """Where kernels of ours move or execute more in `new` than in `old`, one sentence each; also rows that one lacks.

    Another compiler makes other instructions, so of it sectors alone are compared.
    """
    old, new = ([row for row in rows if row.provider in OWN] for rows in (old, new))
    old_rows, new_rows = ({row.key: row for row in rows} for rows in (old, new))
    found = []
    for key, row in new_rows.items():
        was = old_rows.get(key)
        if was is None:
            found.append(f"{key}: the table lacks it")
            continue
        for name in (*SECTORS, *COUNTED) if row.compiler == was.compiler else SECTORS:
            before, now = getattr(was, name), getattr(row, name)
            if now > before:
                said = name.replace("_", " ")
                ideal = f", ideal {getattr(row, f'ideal_{name}')}" if name in SECTORS else ""
                found.append(f"{key}: {now} {said}, was {before}{ideal}")
    found += [f"{key}: nothing launches it" for key in old_rows if key not in new_rows]
    return found


def verdict(new: Sequence[Row], problems: Sequence[str]) -> Iterator[str]:
    """The problems, and what to do."""
    yield from problems
    if problems:
        yield f"if that is meant: {REGENERATE}"
    else:
        yield f"none of {len(new)} rows is worse than in the table"


def rich_tables(rows: Iterable[Row]) -> Iterator[Table]:
    """One a kernel."""
    from rich.box import SIMPLE_HEAD

    numbers = (">loads", ">stores", ">atomics", ">requests", ">hottest", ">shared", ">barriers")
    columns = ("case", *numbers, ">instructions", ">/ 512 B", ">longest", ">parted")
    in_order = sorted(rows, key=lambda row: (row.kernel, row.provider))
    for (kernel, provider), group in groupby(in_order, lambda row: (row.kernel, row.provider)):
        table = make_table(
            f"{kernel} ({provider})", *columns, box=SIMPLE_HEAD, collapse_padding=True
        )
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.no_wrap = True
        for row in group:
            table.add_row(row.config, *_cells(row))
        yield table


def _cells(row: Row) -> list[str]:
    return [
        _of_ideal(row.load_sectors, row.ideal_load_sectors),
        _of_ideal(row.store_sectors, row.ideal_store_sectors),
        _of_ideal(row.atomic_sectors, row.ideal_atomic_sectors),
        str(row.load_requests + row.store_requests + row.atomic_requests),
        str(row.hottest_sector),
        str(row.shared_wavefronts),
        str(row.barriers),
        str(row.instructions),
        f"{row.instructions_a_512_bytes:g}",
        str(row.longest_path),
        str(row.divergent_blocks),
    ]


def _of_ideal(sectors: int, ideal: int) -> str:
    return f"{sectors} ({sectors / ideal:.2f})" if ideal else str(sectors)
