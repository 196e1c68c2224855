"""Single changed instructions of the compiled gather and scatter_add: which of them the target ptx-cpu notices.

    python tests/support/ptx_mutations.py [--tier default] [--each N] [--write]

runs the tier's tests of that target, takes each program of these kernels that they launch, draws N changes of it, and
asks two questions of each:

* Is it noticed? It is where `check` of ptx_backend.py fails, which follows the first launch of each such program. What
  the tests themselves compare comes on top, and is not counted.
* If not, is it live: does it leave other bits than the kernel's own, or a fault, on one of the inputs below? Those that
  are not live are left out.

Exits with 1 if the survivors are not those of ptx_survivors.csv; --write writes that file anew and keeps the reasons
that it has. No GPU is needed.
"""

import argparse
import csv
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import ptx_backend
import pytest
from ptx_launches import (
    Input,
    Launches,
    Specialization,
    bad_id_at,
    different_ids,
    good_ids,
    some_bad_ids,
)
from ptx_mutants import Mutant, sample

from gpu_embed.bench.ptx.machine import Program
from gpu_embed.bench.ptx.parse import PtxError

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("ptx_survivors.csv")
NO_REASON = "?"
ENOUGH = 0.9
WHAT_TO_DO = (
    f"A change of a kernel or of its tests moves these. Let an input in ptx_backend.py notice what survives, or run "
    f"python tests/support/ptx_mutations.py --write and give each {NO_REASON} in {SURVIVORS.name} its reason."
)
# Tests that launch these kernels.
DEFAULT_FILES = ("tests/bench/test_ptx_target.py",)
FULL_FILES = (
    *(f"tests/api/test_{name}.py" for name in ("forward", "gradient", "bounds", "bag")),
    "tests/backends/test_in_place.py",
    "tests/kernels/test_shards.py",
)
# Changes of each program; those of the list are of the full tier.
EACH = 3

# Other draws than those of `check`, and more of them.
INPUTS = (
    Input("few ids", good_ids, programs=0),
    Input("a program's ids", some_bad_ids, programs=1, more=0),
    Input("one id more", some_bad_ids, programs=1, more=1),
    Input("one id less than four programs'", some_bad_ids, programs=4, more=-1),
    Input("many programs", some_bad_ids, programs=20.5, rows=40),
    Input("special values", different_ids, rows=250, special=True, programs=0.1, more=20),
    *(
        Input(f"a table of {rows} rows", some_bad_ids, rows=rows, padding=rows // 2)
        for rows in (0, 1, 2, 17, 127, 255, 256, 300, 40_000, 70_000)
    ),
    *(
        Input(f"padding {padding}", some_bad_ids, rows=40, padding=padding)
        for padding in (-1, 0, 3, 16)
    ),
    Input("overlapping rows", some_bad_ids, gap=-3),
    Input("rows apart", some_bad_ids, gap=17),
    Input("columns apart", some_bad_ids, columns=5),
    Input("a last row past 2**31 items", some_bad_ids, rows=7, programs=1.4, far_rows=True),
    Input("a last column past 2**31 items", some_bad_ids, far_columns=True),
    Input("ids past 2**31 items", good_ids, far_ids=True, rows=30),
    Input("a table's end past 2**31 items", some_bad_ids, far_table=True, programs=1.2),
    Input("a record that was claimed", some_bad_ids, rows=5, claimed=True),
    *(
        Input(f"one bad id, at {place}", bad_id_at(place), programs=2.3)
        for place in (0, 0.03, 0.11, 0.17, 0.21, 0.29, 0.34, 0.41, 0.53, 0.59, 0.77, 0.99)
    ),
)


class Row(NamedTuple):
    """Of the list: a change that no test notices."""

    kernel: str
    line: str  # of the source
    instruction: str  # without the registers' numbers
    change: str
    shown_by: str  # one of INPUTS
    count: str
    reason: str


@dataclass
class Found:
    """What became of one program's changes."""

    noticed: list[Mutant] = field(default_factory=list)
    survivors: list[tuple[Mutant, str]] = field(default_factory=list)  # and the input that shows it
    equivalent: int = 0


def judge(of: Specialization, mutants: list[Mutant]) -> Found:
    found = Found()
    checked, others = Launches(of, ptx_backend.INPUTS), Launches(of, INPUTS)
    right: dict[str, bytes] = {}
    for mutant in mutants:
        changed = mutant.of(of.program)
        if is_noticed(changed, checked):
            found.noticed.append(mutant)
        elif name := _shown_by(of.program, changed, others, right):
            found.survivors.append((mutant, name))
        else:
            found.equivalent += 1
    return found


def is_noticed(changed: Program, launches: Launches) -> bool:
    try:
        ptx_backend.check(changed, launches)
    except (AssertionError, PtxError):
        return True
    return False


def _shown_by(
    program: Program, changed: Program, launches: Launches, right: dict[str, bytes]
) -> str | None:
    """The name of the first input on which the two differ."""
    for launch in launches:
        name = launch.given.name
        if name not in right:
            right[name] = launch.run(program)
        try:
            if launch.run(changed) != right[name]:
                return name
        except PtxError:
            return name
    return None


def launched(tier: str) -> list[Specialization]:
    """Each program of these kernels that the tier's tests launch; they run in this process."""
    full = tier == "full"
    files = (*DEFAULT_FILES, *(FULL_FILES if full else ()))
    arguments = ["-q", "-n0", "-p", "no:cacheprovider", "--no-header", "-k", "ptx-cpu"]
    ptx_backend.seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        # It is what is judged here.
        patch.setattr(ptx_backend, "check", lambda program, launches: None)
        ended = pytest.main([*arguments, *["--full"] * full, *(str(ROOT / file) for file in files)])
    if ended != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {ended!r}")
    return sorted(ptx_backend.seen.values(), key=lambda of: of.kernel)


def read_survivors() -> dict[tuple[str, ...], Row]:
    with SURVIVORS.open(newline="") as file:
        rows = [Row(*line) for line in list(csv.reader(file))[1:]]
    return {row[:5]: row for row in rows}


def write_survivors(rows: dict[tuple[str, ...], Row]) -> None:
    with SURVIVORS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Row._fields, *sorted(rows.values())])


def differences(old: dict[tuple[str, ...], Row], new: dict[tuple[str, ...], Row]) -> list[str]:
    """What the list does not say, and what it says and is not so."""
    return [
        *(f"not listed: {', '.join(new[key][:6])}" for key in new.keys() - old.keys()),
        *(f"listed, but noticed: {', '.join(key)}" for key in old.keys() - new.keys()),
        *(
            f"{old[k].count} listed, {new[k].count} survive: {k}"
            for k in old.keys() & new.keys()
            if old[k].count != new[k].count
        ),
        *(f"no reason: {', '.join(key)}" for key, row in old.items() if row.reason == NO_REASON),
    ]


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tier", choices=("default", "full"), default="full")
    parser.add_argument("--each", type=int, default=EACH, help="changes of each program")
    parser.add_argument("--write", action="store_true", help=f"write {SURVIVORS.name} anew")
    options = parser.parse_args(args)
    counts: Counter[tuple[str, str]] = Counter()
    survivors: Counter[tuple[str, ...]] = Counter()
    for of in launched(options.tier):
        found = judge(of, sample(of.program, options.each))
        counts[of.kernel, "programs"] += 1
        counts[of.kernel, "noticed"] += len(found.noticed)
        counts[of.kernel, "not noticed"] += len(found.survivors)
        counts[of.kernel, "not live"] += found.equivalent
        survivors.update((*mutant.key, name) for mutant, name in found.survivors)
    problems = []
    for kernel in ptx_backend.KERNELS:
        noticed, missed = (counts[kernel, name] for name in ("noticed", "not noticed"))
        share = noticed / max(noticed + missed, 1)
        print(
            f"{kernel}: {counts[kernel, 'programs']} programs; of {noticed + missed} live changes {noticed} noticed "
            f"({share:.1%}); {counts[kernel, 'not live']} not live"
        )
        if share < ENOUGH:
            problems.append(f"{kernel}: less than {ENOUGH:.0%} are noticed")
    old = read_survivors()
    new = {
        key: Row(*key, str(count), old[key].reason if key in old else NO_REASON)
        for key, count in survivors.items()
    }
    if options.write:
        write_survivors(new)
    if (options.tier, options.each) == ("full", EACH):
        problems += differences(new if options.write else old, new)
    else:
        print(*(", ".join(row[:6]) for row in sorted(new.values())), sep="\n")
    if problems:
        print(*problems, WHAT_TO_DO, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
