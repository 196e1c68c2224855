"""The table of what the kernels compile to: one row a kernel, configuration and architecture.

The committed table is bench/codegen.csv. `worse` compares with it, for the test suite and for
`python -m gpu_embed.bench codegen --check bench/codegen.csv`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import row_csv
from ..console import make_table
from ..occupancy import MULTIPROCESSORS, occupancy
from .compile import Compiled
from .instructions import ACCESSES, ATOMICS, BULK

if TYPE_CHECKING:
    from rich.table import Table

# Four registers of a thread, which another assembler may put aside around a loop; the test suite looks that
# it does not do so in one.
OTHER_TRITON_SPILLS = 16
REGENERATE = "python -m gpu_embed.bench codegen --out bench/codegen.csv"


class Key(NamedTuple):
    kernel: str
    config: str
    sm: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.config} sm_{self.sm}"


@dataclass(frozen=True)
class Row:
    """One binary. The fields are the CSV's columns, in this order."""

    kernel: str
    config: str  # the first case that launches it; `:2` where that is the case's second launch of the kernel
    sm: int  # compute capability times ten
    settings: str  # the launch's constants, as `D=128 VEC=4 BLOCK=256`
    num_warps: int  # a block's
    registers: int  # a thread's
    spilled_bytes: int  # a thread's stack and local memory
    shared_bytes: int  # a block's
    resident_warps: int  # on one multiprocessor
    max_warps: int
    limit: str  # what allows no more: "warps", "blocks", "registers" or "shared memory"
    # The widest access to global memory of a thread; 0: there is none.
    load_bytes: int
    store_bytes: int
    atomic_bytes: int
    bulk: str  # what the copy engine does instead: "load", "store", "add", or several of them
    accesses: str  # the narrowest of each pointer, as `load weight 16, store output 16`
    # Of the longest innermost loop, in machine code; 0: there is none.
    loop_instructions: int
    loop_accesses: int  # those of them that access memory of any kind
    triton: str  # version

    @property
    def key(self) -> Key:
        return Key(self.kernel, self.config, self.sm)


def table_rows(launches: Iterable[Compiled], triton: str) -> list[Row]:
    """One row for each binary, sorted."""
    rows: dict[tuple[int, str], Row] = {}
    seen: Counter[tuple[int, str, str]] = Counter()
    for launch in launches:
        place = (launch.architecture, launch.case, launch.kernel)
        seen[place] += 1
        again = f":{seen[place]}" if seen[place] > 1 else ""
        row = _row(launch, launch.case + again, triton)
        rows.setdefault((launch.architecture, launch.binary), row)
    return sorted(rows.values(), key=lambda row: row.key)


def _row(launch: Compiled, config: str, triton: str) -> Row:
    machine = launch.machine

    def widest(*operations: str) -> int:
        sizes = (i.num_bytes for i in machine.instructions if i.operation in operations)
        return max(sizes, default=0)

    arguments = (launch.architecture, launch.num_warps, launch.registers, launch.shared_bytes)
    resident = occupancy(*arguments)
    used = {i.operation for i in machine.instructions}
    same = ("kernel", "num_warps", "registers", "spilled_bytes", "shared_bytes")
    copied: dict[str, Any] = {name: getattr(launch, name) for name in same}
    return Row(
        **copied,
        config=config,
        sm=launch.architecture,
        settings=" ".join(f"{name}={value}" for name, value in launch.settings.items()),
        resident_warps=resident.warps,
        max_warps=MULTIPROCESSORS[launch.architecture].warps,
        limit=resident.limit,
        load_bytes=widest("load"),
        store_bytes=widest("store"),
        atomic_bytes=widest(*ATOMICS),
        bulk=" ".join(name.removeprefix("bulk ") for name in BULK if name in used),
        accesses=", ".join(f"{access} {width}" for access, width in _narrowest(launch).items()),
        loop_instructions=machine.loop_instructions,
        loop_accesses=machine.loop_accesses,
        triton=triton,
    )


def _narrowest(launch: Compiled) -> dict[str, int]:
    """Bytes by access, as `load weight`, sorted; the widest alone would hide a narrow one beside it."""
    found: dict[str, int] = {}
    for i in sorted(launch.instructions, reverse=True, key=lambda i: i.num_bytes):
        if i.operation in ACCESSES:
            found[f"{i.operation} {i.pointer.removesuffix('_ptr')}".strip()] = i.num_bytes
    return dict(sorted(found.items()))


def write_table(path: Path, rows: Iterable[Row]) -> None:
    row_csv.write(path, Row, rows)


def read_table(path: Path) -> list[Row]:
    """Raises ResultsError where the file is no such table."""
    return row_csv.read(path, Row, f"the columns are not codegen's: {REGENERATE} writes it")


def _parse_accesses(accesses: str) -> dict[str, int]:
    pairs = (access.rpartition(" ") for access in accesses.split(", ") if access)
    return {name: int(width) for name, _, width in pairs}


def worse(old: Collection[Row], new: Collection[Row]) -> list[str]:
    """What is worse in `new` than in `old`, one sentence each; also rows that one of them lacks.

    Another version of Triton brings another assembler, which allocates registers and orders instructions in
    its own way, and may tell binaries apart by other arguments. What it must keep is what the kernels are
    written for: wide accesses and next to no spills. So where the versions differ, these alone are compared.
    """
    old_rows = {row.key: row for row in old}
    new_rows = {row.key: row for row in new}
    found = [
        f"{key}: {problem}"
        for key, row in new_rows.items()
        if key in old_rows
        for problem in _worse(old_rows[key], row)
    ]
    if {row.triton for row in old} == {row.triton for row in new}:
        found += _lacks(new_rows, old_rows, "the table lacks")
        found += _lacks(old_rows, new_rows, "nothing compiles to")
    return found


def _lacks(rows: Collection[Key], others: Collection[Key], said: str) -> Iterator[str]:
    """A sentence for each kernel with rows that the others do not have."""
    missing = sorted(set(rows) - set(others))
    for kernel, keys in groupby(missing, key=lambda key: key.kernel):
        first, *more = keys
        yield f"{kernel}: {said} {first.config} sm_{first.sm}" + (
            f" and {len(more)} more of its rows" if more else ""
        )


def verdict(old: Sequence[Row], new: Sequence[Row], problems: Sequence[str]) -> Iterator[str]:
    """The problems, after which versions met and before what to do."""
    versions = [" + ".join(sorted({row.triton for row in rows})) for rows in (old, new)]
    if versions[0] != versions[1]:
        yield (
            f"the table is of triton {versions[0]}, this is {versions[1]}: "
            "only spills and widths are compared"
        )
    yield from problems
    if problems:
        yield f"if that is meant: {REGENERATE}"
    else:
        yield f"none of {len(new)} rows is worse than in the table"


def _worse(old: Row, new: Row) -> Iterator[str]:
    allowed = old.spilled_bytes
    if old.triton != new.triton:
        allowed = max(allowed, OTHER_TRITON_SPILLS)
    if new.spilled_bytes > allowed:
        yield f"spills {new.spilled_bytes} bytes a thread, was {old.spilled_bytes}"
    for access in ("load", "store", "atomic"):
        was, now = getattr(old, f"{access}_bytes"), getattr(new, f"{access}_bytes")
        if now < was:
            yield f"the widest {access} is {now} bytes, was {was}"
    was_narrowest, narrowest = _parse_accesses(old.accesses), _parse_accesses(new.accesses)
    for name, width in narrowest.items():
        if width < was_narrowest.get(name, 0):
            yield f"{name} has an access of {width} bytes, had none under {was_narrowest[name]}"
    if lost := sorted({*old.bulk.split()} - {*new.bulk.split()}):
        yield f"no bulk {' or '.join(lost)} any more"
    if old.triton != new.triton:
        return
    if new.resident_warps < old.resident_warps:
        yield (
            f"{new.resident_warps} warps fit on a multiprocessor, were {old.resident_warps}: "
            f"{new.limit} allow no more ({new.registers} registers, {new.shared_bytes} shared bytes)"
        )
    # The same code compiles to the same instructions. A change elsewhere in the kernel may keep a value out of
    # the loop's registers, and cost an instruction for each access that needs it; more was added to the loop.
    if new.loop_instructions > old.loop_instructions + old.loop_accesses:
        yield (
            f"{new.loop_instructions} instructions in the innermost loop, were "
            f"{old.loop_instructions}, and {old.loop_accesses} accesses allow as many more"
        )


def rich_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One a kernel: for each configuration its name, its settings, and a line an architecture beside them."""
    from rich.box import SIMPLE_HEAD

    numbers = (">sm", ">regs", ">spilled", ">shared", ">warps")
    for kernel, rows_of_kernel in groupby(rows, key=lambda row: row.kernel):
        columns = ("configuration", *numbers, "limit", "access", ">loop")
        table = make_table(kernel, *columns, box=SIMPLE_HEAD, collapse_padding=True)
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.no_wrap = column.header != "limit"
        by_config = groupby(rows_of_kernel, key=lambda row: (row.config, row.settings))
        for labels, lines in by_config:
            cells = [_cells(row) for row in lines]
            for i in range(max(len(labels), len(cells))):
                label = labels[i] if i < len(labels) else ""
                table.add_row(label, *(cells[i] if i < len(cells) else ()))
        yield table


def _cells(row: Row) -> list[str]:
    access = f"{row.load_bytes}/{row.store_bytes}/{row.atomic_bytes}"
    return [
        *map(str, (row.sm, row.registers, row.spilled_bytes, row.shared_bytes)),
        f"{row.resident_warps}/{row.max_warps}",
        row.limit,
        f"{access} bulk {row.bulk}" if row.bulk else access,
        str(row.loop_instructions),
    ]


def to_json(
    triton: str, rows: Iterable[Row], launches: Iterable[Compiled], failures: dict[str, str]
) -> str:
    """The rows, each launch of each case with its instructions, and what did not compile, by name."""
    return json.dumps(
        {
            "triton": triton,
            "rows": [asdict(row) for row in rows],
            "launches": [launch.to_json() for launch in launches],
            "failures": failures,
        }
    )
