"""The command line: python -m gpu_embed.bench."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

import torch

import gpu_embed
from gpu_embed.demo.running import describe_backend

from . import ids as ids_module
from . import machine, results
from .byte_floor import CARDS
from .compare import NOISY_MEANS, noise_of
from .console import (
    make_console,
    make_table,
    print_table,
    progress_bar,
    replace_what_cannot_be_shown,
)
from .headline import LAST_START_SECONDS, headline_jobs, results_directory
from .measure import Bench
from .occupancy import MULTIPROCESSORS, TARGETS
from .providers import PROVIDERS
from .run import Choice, Job, execute, plan
from .shapes import DTYPES, ID_DTYPES, MODES, SETS
from .timing import Effort, copy_gbps

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from .codegen.compile import Launch

PROG = "python -m gpu_embed.bench"
OWN = "gpu_embed"
SAME_RUN = ("device", "torch", "triton", "commit", "dirty", "seed")


class CannotRunError(Exception):
    """A reason not to start, in one sentence for the user."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise CannotRunError(f"{message} (see {self.prog} --help)")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROG,
        description="Measure embedding lookups and their gradients against everybody else's. Without a "
        "command: a summary of this machine in one minute.",
        epilog="Exit code: 0 done, 1 a result of gpu_embed's own is wrong or failed (compare: a "
        "regression; codegen, traffic: a kernel is worse; host-calls: more calls), 2 it cannot start or go on, "
        "130 interrupted.",
    )
    add_options(parser, MACHINE)
    card = "the GPU whose times the CPU summary predicts (default: %(default)s)"
    parser.add_argument("--card", default="h200", help=card)
    commands = parser.add_subparsers(dest="command", parser_class=Parser)
    for name, (text, options, _) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in ("run", "headline", "figures"):
            # Defaults of its own would undo what stands before the command.
            nested = {"default": argparse.SUPPRESS}
            add_options(
                command, [(option, said, {**how, **nested}) for option, said, how in MACHINE]
            )
        add_options(command, options)
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser, options: Options) -> None:
    for option, text, how in options:
        parser.add_argument(option, help=text, **how)


# Each with its help, and what else argparse has to know.
Options = Sequence[tuple[str, str | None, dict[str, Any]]]
MANY: dict[str, Any] = {"nargs": "+"}
FILE = {"type": Path, "metavar": "FILE"}
FLAG = {"action": "store_true"}
MACHINE: Options = (
    ("--device", "such as cpu or cuda:1 (default: cuda if there is one)", {}),
    (
        "--threads",
        "on the CPU (default: 1; on a busy machine they wait for each other)",
        {"type": int, "default": 1},
    ),
    ("--seed", "for ids and tables (default: 0)", {"type": int, "default": 0}),
)
AXES = {
    "dtype": "of the table",
    "id-dtype": "of the ids",
    "tables": "tables in one call",
    "vocab": "rows of a table: 65536, 2**16, 1e6, 10M",
    "dim": "columns of a table",
    "ids": "ids a call, in all tables",
    "distribution": "uniform, zipf:1.05, text, hot:0.5, spread:8192, ..., or a file of ids",
}
MAX_MEMORY: tuple[str, str | None, dict[str, Any]] = (
    "--max-memory",
    "such as 8G: larger cells are left out (default: half of what is free, on a GPU nine tenths)",
    {"metavar": "SIZE"},
)
RUN: Options = (
    ("--set", "A B ..., or all", {**MANY, "default": [], "metavar": "SET"}),
    ("--mode", f"{', '.join(MODES)} (default: the set's)", MANY),
    ("--providers", "names from `list` (default: all that can run)", MANY),
    *((f"--{name}", f"{text}, in place of the set's", MANY) for name, text in AXES.items()),
    ("--out", None, {"type": Path, "default": Path("bench-results"), "metavar": "DIR"}),
    MAX_MEMORY,
    ("--limit", "the first N shapes alone", {"type": int, "metavar": "N"}),
    ("--seconds", "for each measurement (default: %(default)s)", {"type": float, "default": 0.5}),
    (
        "--turns",
        "the providers of a cell take turns, N at least; all are in memory then (default: one after another)",
        {"type": int, "metavar": "N"},
    ),
    ("--resume", "measure what DIR lacks", FLAG),
)
HEADLINE: Options = (
    (
        "--out",
        "where <device>-<date>-<commit> is made (default: %(default)s)",
        {"type": Path, "default": Path("bench/results"), "metavar": "ROOT"},
    ),
    ("--page", "rewrite this page, such as bench/RESULTS.md", FILE),
)
FIGURES: Options = (HEADLINE[0], MAX_MEMORY)
RATIOS: Options = (
    ("directories", None, {"type": Path, "metavar": "DIR", "nargs": "+"}),
    (
        "--out",
        "where ratios.png and ratios_dark.png go (default: %(default)s)",
        {"type": Path, "default": Path("docs/pictures"), "metavar": "FOLDER"},
    ),
)
COMPARE: Options = (
    (
        "old",
        "results.csv, or its directory (default: the newest committed of the same device)",
        {"type": Path, "metavar": "OLD", "nargs": "?"},
    ),
    ("new", None, {"type": Path, "metavar": "NEW"}),
    (
        "--fail-below",
        "a cell is a regression below this share of its old speed (default: %(default)s)",
        {"type": float, "default": 0.95, "metavar": "RATIO"},
    ),
)
CODEGEN: Options = (
    (
        "--arch",
        f"compute capabilities times ten (default: {' '.join(map(str, TARGETS))})",
        {
            **MANY,
            "type": int,
            "choices": MULTIPROCESSORS,
            "default": list(TARGETS),
            "metavar": "SM",
        },
    ),
    ("--kernel", "such as gather_rows_kernel", {**MANY, "metavar": "NAME"}),
    ("--json", "print every launch and instruction", FLAG),
    ("--out", "write the whole table as CSV", FILE),
    ("--check", "exit 1 where a kernel is worse than in FILE", FILE),
)
TRAFFIC: Options = (
    ("--config", "cases whose names begin so, such as embedding-D50", {**MANY, "metavar": "CASE"}),
    ("--rivals", "Liger's kernels too, where they are installed", FLAG),
    ("--out", "write the whole table as CSV; rivals' rows stay in it without --rivals", FILE),
    ("--check", "exit 1 where a kernel moves or executes more than in FILE", FILE),
)
HOST_CALLS: Options = (
    ("--functions", "list the called functions in call order", FLAG),
    ("--write", "rewrite bench/host_calls.csv, against which more calls are an error", FLAG),
)
COLD_START: Options = (
    ("--starts", "processes for each row (default: %(default)s)", {"type": int, "default": 5}),
)
DISTRIBUTED: Options = (
    (
        "--pairs",
        "rowwise, distinct, exchange, bags-dense, bags-fused: the last three with TorchRec (default: rowwise)",
        {**MANY, "default": ["rowwise"]},
    ),
    ("--ranks", "processes; each number is a run (default: 2 4)", {**MANY, "default": ["2", "4"]}),
    ("--rows", "of the table, in all ranks (default: %(default)s)", {"default": "1_000_000"}),
    ("--dim", "columns of the table (default: %(default)s)", {"default": "64"}),
    ("--ids", "of each rank (default: %(default)s)", {"default": "4096"}),
    ("--rounds", "steps of each layer that are timed (default: %(default)s)", {"default": "9"}),
    ("--out", "write the figures as CSV", FILE),
)
WORD_VECTORS: Options = (
    ("--words", "in the files (default: %(default)s)", {"default": "400_000"}),
    ("--dim", "numbers a word (default: %(default)s)", {"default": "100"}),
    ("--rounds", "readings of each that are timed (default: %(default)s)", {"default": "3"}),
)
QUANTIZED: Options = (
    ("--rows", "of the table (default: %(default)s)", {"default": "100_000"}),
    ("--dim", "columns of the table (default: %(default)s)", {"default": "256"}),
    ("--ids", "of a lookup (default: %(default)s)", {"default": "4096"}),
    ("--rounds", "lookups of each that are timed (default: %(default)s)", {"default": "201"}),
)
DIRECTORY: Options = (("directory", None, {"type": Path, "metavar": "DIR"}),)


def known(what: str, values: Sequence[str] | None, names: Collection[str]) -> list[str] | None:
    """The values, if all are names. Raises CannotRunError for the first that is not."""
    for value in values or ():
        if value not in names:
            raise CannotRunError(f"unknown {what} {value!r}: choose from {', '.join(names)}")
    return list(values) if values else None


def whole_number(option: str, text: str) -> int:
    """65536, 65_536, 2**16, 1e6, 64k, 10M."""
    number = math.nan
    if match := re.fullmatch(r"(\d+)\*\*(\d{1,2})", text):
        number = int(match[1]) ** int(match[2])
    elif match := re.fullmatch(r"([\d_.]+(?:e\d{1,2})?)([kKM]?)", text):
        with contextlib.suppress(ValueError):
            number = float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6}[match[2]]
    if not 1 <= number < 2**63 or number != int(number):
        raise CannotRunError(
            f"{option} {text}: expected a whole number from 1, such as 65536 or 1e6"
        )
    return int(number)


def memory_size(text: str | None) -> int | None:
    """Bytes of 8G, 500M, 8GiB."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise CannotRunError(f"--max-memory {text}: expected a size such as 8G or 500M")
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2].upper()) + 1))


def choose_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise CannotRunError(f"--device {name}: choose cpu, cuda, or one GPU such as cuda:1")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # A torch built without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise CannotRunError(f"--device {name}: {reason}; --device cpu always works") from None
    if device.type == "cuda":
        device = torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
        # Events and the kernels of some rivals go to the current device.
        torch.cuda.set_device(device)
    return device


def check_extra(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise CannotRunError(
                f'this needs {name}: install the extra "bench" (from a clone: pip install ".[bench]")'
            )


def start(args: argparse.Namespace, console: Console) -> Bench:
    """The device and its copy bandwidth, measured and said."""
    if not 0 <= args.seed < 2**40:
        raise CannotRunError(f"--seed {args.seed}: choose a number from 0 to 2**40 - 1")
    if args.threads < 1:
        raise CannotRunError(f"--threads {args.threads}: at least 1 is needed")
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    try:
        gpu_embed.Embedding(1, 1, device=device)(torch.zeros(1, dtype=torch.int64, device=device))
    except (RuntimeError, ValueError) as problem:
        raise CannotRunError(str(problem).removeprefix("gpu_embed: ")) from problem
    name, dirty = machine.commit()
    versions = {"torch": torch.__version__, "triton": machine.version("triton"), "commit": name}
    facts = {"device": machine.device_name(device), **versions}
    memory = machine.usable_memory(device)
    console.print(f"gpu_embed bench on {facts['device']}")
    console.print(
        f"torch {facts['torch']}, triton {facts['triton'] or 'none'}, "
        f"{name}{' with changes' if dirty else ''}"
    )
    console.print(describe_backend(device))
    speed = copy_gbps(device, memory)
    console.print(f"measured copy bandwidth, read + write: {speed:,.3g} GB/s")
    return Bench(device, speed, facts, memory, args.seed)


def limit_memory(bench: Bench, memory: int | None) -> None:
    """Let cells take so many bytes; None: the usual share of what is free."""
    if memory is not None:
        bench.memory = min(memory, machine.free_memory(bench.device))


def summary(args: argparse.Namespace) -> int:
    from . import summary as summaries

    known("card", [args.card], CARDS)
    console = make_console()
    bench = start(args, console)
    with progress_bar(console) as progress:
        if bench.device.type == "cuda":
            rows = summaries.summarize_gpu(bench, console, progress)
        else:
            rows = summaries.summarize_cpu(bench, console, progress, CARDS[args.card])
    missing = [
        f"{provider.name}: {reason}"
        for provider in PROVIDERS.values()
        if (reason := provider.missing_reason(bench.device)) is not None
    ]
    if bench.device.type == "cuda" and missing:
        console.print(f"not measured: {'; '.join(missing)}")
    console.print(f"More: {PROG} list, {PROG} run --help")
    return own_failures(rows, console)


def run(args: argparse.Namespace) -> int:
    choice = read_choice(args)
    console = make_console()
    memory = memory_size(args.max_memory)
    if args.limit is not None and args.limit < 1:
        raise CannotRunError(f"--limit {args.limit}: at least 1 cell is needed")
    if not 0 < args.seconds <= 600:
        raise CannotRunError(f"--seconds {args.seconds:g}: choose a number above 0, at most 600")
    if args.turns is not None and args.turns < 1:
        raise CannotRunError(f"--turns {args.turns}: at least 1 is needed")
    device = choose_device(args.device)
    jobs = plan(choice, device)
    if not any(job.mode in job.provider.modes for job in jobs):
        raise CannotRunError("nothing to measure: no chosen provider is measured in a chosen mode")
    reasons = {job.provider.name: job.provider.missing_reason(device) for job in jobs}
    if all(reasons.values()):
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        nobody = f"nothing to measure, as no chosen provider can run on {device}"
        raise CannotRunError(f"{nobody}: {said}")
    results.check_writable(args.out)
    with results.RowWriter(args.out, args.resume) as writer:
        bench = start(args, console)
        samples = Effort.min_samples if args.turns is None else args.turns
        bench.effort = Effort(args.seconds, samples, host_seconds=min(0.2, args.seconds))
        limit_memory(bench, memory)
        bench.copy_gbps = write_header(args, bench)
        try:
            done = measure(bench, jobs, writer, console, in_turns=args.turns is not None)
        except (KeyboardInterrupt, results.NotWrittenError) as end:
            kept = sum(job.row(bench).key in writer.done for job in jobs)
            interrupted = isinstance(end, KeyboardInterrupt)
            rest = "the same command with --resume measures the rest"
            say_stopped("interrupted" if interrupted else end, kept, len(jobs), args.out, rest)
            return 130 if interrupted else 2
    say_counts(done, args.out, console)
    return own_failures(done, console)


def figures(args: argparse.Namespace) -> int:
    """Measure in turns what `ratios` draws; what was measured before an interruption is kept."""
    from . import host_time, row_csv
    from .figures import TURNS, figures_jobs

    results.check_writable(args.out)
    memory = memory_size(args.max_memory)
    console = make_console()
    bench = start(args, console)
    bench.effort = Effort(min_samples=TURNS, cold=False)
    limit_memory(bench, memory)
    jobs = figures_jobs(bench.device)
    header = new_header(args, bench)
    directory = results_directory(args.out, header)
    with results.RowWriter(directory) as writer:
        results.write_header(directory, header)
        times = host_time.measure_host_time()
        row_csv.write(directory / results.HOST_TIME, host_time.HostTime, times)
        try:
            done = measure(bench, jobs, writer, console, in_turns=True)
        except KeyboardInterrupt:
            shown = f"{PROG} ratios {directory} draws them"
            say_stopped("interrupted", len(writer.done), len(jobs), directory, shown)
            return 130
    say_counts(done, directory, console)
    return own_failures(done, console)


def headline(args: argparse.Namespace) -> int:
    """Measure, draw, report; what was measured before an interruption is kept."""
    check_extra("matplotlib")
    from .plots import plot_directory
    from .report import write_report, write_results_markdown

    results.check_writable(args.out)
    if args.page is not None:
        results.check_writable(args.page.parent, "choose another --page")
    console = make_console()
    end = time.monotonic() + LAST_START_SECONDS
    bench = start(args, console)
    bench.effort = Effort(seconds=0.3, max_samples=100, host_seconds=0.1)
    jobs = headline_jobs(bench.device)
    header = new_header(args, bench)
    directory = results_directory(args.out, header)
    with results.RowWriter(directory) as writer:
        results.write_header(directory, header)
        try:
            done = measure(bench, jobs, writer, console, end)
        except KeyboardInterrupt:
            shown = f"{PROG} report {directory} shows them"
            say_stopped("interrupted", len(writer.done), len(jobs), directory, shown)
            return 130
    if len(done) < len(jobs):
        console.print(f"{len(jobs) - len(done)} of {len(jobs)} measurements left out: time is over")
    if done:
        for path in (*plot_directory(directory), write_report(directory)):
            console.print(str(path))
        if args.page is not None:
            write_results_markdown(directory, args.page)
            console.print(str(args.page))
    say_counts(done, directory, console)
    return own_failures(done, console)


def say_stopped(what: object, kept: int, wanted: int, directory: Path, then: str) -> None:
    path = directory / results.RESULTS
    # The bar may stand in the line.
    print(file=sys.stderr)
    complain(f"{what}; {kept} of {wanted} measurements are in {path}, {then}")


def complain(text: object) -> None:
    print(f"{PROG}: {text}", file=sys.stderr)


def measure(
    bench: Bench,
    jobs: Sequence[Job],
    writer: results.RowWriter,
    console: Console,
    last_start: float = math.inf,
    in_turns: bool = False,
) -> list[results.Row]:
    """The new rows of the jobs, each said as soon as its cell is through."""
    with progress_bar(console) as progress:
        report = Reporter(console, progress, len(jobs))
        try:
            told = (report.start, report.row, report.skip)
            return execute(bench, jobs, writer, *told, last_start, in_turns)
        finally:
            report.flush()


def say_counts(rows: Sequence[results.Row], directory: Path, console: Console) -> None:
    counts = {s: sum(row.status == s for row in rows) for s in results.STATUSES}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console.print(f"{said or 'nothing new'}: {directory / results.RESULTS}")
    noisy = sum(bool(noise_of(row)) for row in rows)
    if noisy:
        console.print(
            f"{noisy} of {len(rows)} rows are noisy ({NOISY_MEANS}): no time there is called faster or slower. "
            "Measure again on a quiet machine."
        )


class Reporter:
    """The bar with the time left, and a line for each cell and mode when all its providers are through."""

    def __init__(self, console: Console, progress: Progress, total: int) -> None:
        self.console = console
        self.progress = progress
        self.task = progress.add_task("", total=total)
        self._rows: list[results.Row] = []
        self._place: tuple[str, ...] | None = None

    def start(self, job: Job) -> None:
        place = (job.set, job.mode, str(job.cell))
        if place != self._place:
            self.flush()
            self._place = place
        self.progress.update(self.task, description=f"{job.set} {job.mode} {job.provider.name}")

    def row(self, row: results.Row) -> None:
        self._rows.append(row)
        self.progress.advance(self.task)

    def skip(self, job: Job) -> None:
        self.progress.advance(self.task)

    def flush(self) -> None:
        """Say what is known of the last cell."""
        if self._rows and self._place is not None:
            said = ", ".join(map(said_of, self._rows))
            self.console.print(f"{' '.join(self._place)}: {said}")
        self._rows = []


def said_of(row: results.Row) -> str:
    if row.ms_p50 is None or row.percent_of_copy is None:
        return f"{row.provider} {row.status} ({row.note or row.match})"
    noisy = ", noisy" if noise_of(row) else ""
    return f"{row.provider} {row.ms_p50:.4g} ms ({row.percent_of_copy:.0f} %{noisy})"


def read_choice(args: argparse.Namespace) -> Choice:
    """The options of `run`, checked."""
    if not args.set:
        raise CannotRunError(f"--set names what to measure: {', '.join(SETS)}, or all")
    sets = list(SETS) if args.set == ["all"] else known("set", args.set, SETS)
    for distribution in args.distribution or ():
        ids_module.parse(distribution)
    sizes = {"tables": "tables", "vocab": "vocab", "dim": "dim", "ids": "num_ids"}
    axes: dict[str, list[Any] | None] = {
        "dtype": known("dtype", args.dtype, DTYPES),
        "id_dtype": known("id dtype", args.id_dtype, ID_DTYPES),
    }
    for option, field in sizes.items():
        axes[field] = [whole_number(f"--{option}", text) for text in getattr(args, option) or ()]
    axes["distribution"] = args.distribution
    providers = known("provider", args.providers, PROVIDERS)
    modes = known("mode", args.mode, MODES)
    return Choice(list(dict.fromkeys(sets or ())), providers, modes, axes, args.limit)


def new_header(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    command = [PROG, shlex.join(args.argv)]
    return machine.header(bench.device, bench.copy_gbps, args.seed, command)


def write_header(args: argparse.Namespace, bench: Bench) -> float:
    """Write header.json, or check that a resumed run is the same one; returns its copy bandwidth."""
    new = new_header(args, bench)
    if not (args.resume and (args.out / results.HEADER).exists()):
        results.write_header(args.out, new)
        return bench.copy_gbps
    old = results.read_header(args.out)
    for name in SAME_RUN:
        if old.get(name) != new[name]:
            raise CannotRunError(
                f"{args.out} holds results with {name} {old.get(name)!r}, this run has "
                f"{new[name]!r}: choose another --out"
            )
    former = old.get("copy_gbps")
    if isinstance(former, int | float) and 0 < former < math.inf:
        return float(former)
    path = args.out / results.HEADER
    raise CannotRunError(f"{path} names no copy bandwidth: choose another --out")


def own_failures(rows: Iterable[results.Row], console: Console) -> int:
    """1 if a result of ours is wrong or failed, and say which; the rivals' are theirs."""
    bad = [r for r in rows if r.provider.startswith(OWN) and r.status in ("wrong", "error")]
    for r in bad:
        shape = f"{r.provider} {r.mode} {r.vocab} x {r.dim} {r.dtype}"
        console.print(f"{r.status}: {shape}: {r.match or r.note}")
    return 1 if bad else 0


def list_all(args: argparse.Namespace) -> int:
    console = make_console()
    sets = make_table("Sets of shapes", "set", ">cells", "modes", "what", "from")
    for entry in SETS.values():
        modes, cells = " ".join(entry.modes), str(len(entry.cells))
        sets.add_row(entry.name, cells, modes, entry.description, entry.origin)
    print_table(console, sets)
    device = choose_device(args.device)
    title = f"Providers, on {device}"
    providers = make_table(title, "provider", "what", "version", "here")
    for provider in PROVIDERS.values():
        version = provider.version() or f"none (pip install {provider.package})"
        here = provider.missing_reason(device) or "usable"
        providers.add_row(provider.name, provider.description, version, here)
    print_table(console, providers)
    for name in ids_module.WORD_LISTS:
        found = machine.version(name) or f"none (pip install {name})"
        console.print(f"word list {name}: {found}")
    return 0


def codegen(args: argparse.Namespace) -> int:
    """Compile every launch for every architecture, and say what came out and what got worse."""
    if importlib.util.find_spec("triton") is None:
        raise CannotRunError("codegen compiles Triton kernels: pip install triton (Linux only)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CannotRunError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it")
    if args.out is not None:
        if args.kernel or set(args.arch) != set(TARGETS):
            raise CannotRunError("--out writes the whole table: leave out --arch and --kernel")
        results.check_file_writable(args.out)
    from .codegen import table as codegen_table
    from .codegen.cases import CASES
    from .codegen.compile import compile_launches, record_launches

    launches, failures = record_launches(CASES)
    names = sorted({launch.kernel.__name__ for launch in launches})
    kernels = known("kernel", args.kernel, names) or names
    launches = [launch for launch in launches if launch.kernel.__name__ in kernels]
    old = None if args.check is None else codegen_table.read_table(args.check)
    console = make_console()
    compiled = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(set(args.arch)) * len(launches))
        for architecture in sorted(set(args.arch)):
            sm = f"sm_{architecture}"

            def advance(launch: Launch, sm: str = sm) -> None:
                progress.update(task, description=f"{sm} {launch.case}", advance=1)

            done, failed = compile_launches(architecture, launches, advance)
            compiled += done
            for case, problem in failed.items():
                failures.setdefault(case, f"{sm}, {problem}")
    version = machine.version("triton")
    rows = codegen_table.table_rows(compiled, version)
    if args.json:
        print(codegen_table.to_json(version, rows, compiled, failures))
    else:
        console.print(
            "A thread's registers and spilled bytes; a block's shared bytes; the warps that fit on a "
            "multiprocessor, and what allows no more;\nthe widest loads/stores/atomics on global "
            "memory in bytes; the instructions of the innermost loop."
        )
        for table in codegen_table.rich_tables(rows):
            print_table(console, table)
    for case, problem in failures.items():
        complain(f"{case} does not compile: {problem}")
    if args.out is not None and not failures:
        codegen_table.write_table(args.out, rows)
    if old is None:
        return 1 if failures else 0
    chosen = [row for row in old if row.sm in args.arch and row.kernel in kernels]
    problems = codegen_table.worse(chosen, rows)
    for said in codegen_table.verdict(chosen, rows, problems):
        complain(said)
    return 1 if failures or problems else 0


def traffic(args: argparse.Namespace) -> int:
    """Run the compiled kernels in the interpreter of PTX, and say what they move and what got worse."""
    if importlib.util.find_spec("triton") is None:
        raise CannotRunError("traffic compiles Triton kernels: pip install triton (Linux only)")
    if args.out is not None:
        if args.config:
            raise CannotRunError("--out writes the whole table: leave out --config")
        results.check_file_writable(args.out)
    from .traffic import count, table

    reason = count.no_nvrtc()
    if reason is not None:
        raise CannotRunError(f"traffic compiles CUDA C++ kernels: {reason}")
    from .traffic.cases import CASES

    cases = [case for case in CASES if str(case).startswith(tuple(args.config or [""]))]
    if not cases:
        raise CannotRunError(f"no case begins with {' or '.join(args.config)}, as {CASES[0]} does")
    if args.rivals and not count.has_liger():
        raise CannotRunError(f"{count.LIGER_PACKAGE} is not installed: leave out --rivals")
    old = None if args.check is None else table.read_table(args.check)
    # A rival's rows stay true while our kernels change.
    kept = [] if args.out is None or args.rivals else table.rivals_of(args.out)
    console = make_console()
    rows: list[table.Row] = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            rows += count.own_rows(case)
            if args.rivals:
                rows += count.liger_rows(case)
            progress.advance(task)
    console.print(
        "A simulator's figures, of the code for sm_90. Loads, stores and atomics: sectors of 32 bytes, and how many "
        "times the ideal that is; requests;\natomic operations on the hottest sector; wavefronts of shared memory; "
        "warps' waits at barriers; warps' instructions, those for 512 bytes moved,\nand those of the longest warps of "
        "the launches; basic blocks for which a warp had parted."
    )
    for shown in table.rich_tables(rows):
        print_table(console, shown)
    if args.out is not None:
        table.write_table(args.out, rows + kept)
    if old is None:
        return 0
    configs = {str(case) for case in cases}
    problems = table.worse([row for row in old if row.config in configs], rows)
    for said in table.verdict(rows, problems):
        complain(said)
    return 1 if problems else 0


def host_calls(args: argparse.Namespace) -> int:
    """Count, print, and write the table or say what has more calls than it allows."""
    from . import host_calls as counter

    if args.write:
        check_extra("triton", "keras")
    console = make_console()
    rows = counter.measure_host_calls()
    columns = [f">{name}" if name == "calls" else name for name in counter.COLUMNS]
    shown = make_table("Own Python calls of a warm call", *columns)
    for row in rows:
        shown.add_row(row.operation, row.backend, row.input, str(row.calls))
    print_table(console, shown)
    if args.functions:
        for row in rows:
            console.print(f"\n{row.operation}, {row.backend}, {row.input}: {row.calls}")
            console.print("\n".join(f"  {function}" for function in row.functions))
    if args.write:
        counter.write_table(counter.PATH, rows)
        return 0
    problems = counter.more_calls(counter.read_table(counter.PATH), rows)
    for said in problems:
        complain(said)
    return 1 if problems else 0


def cold_start(args: argparse.Namespace) -> int:
    """Start processes, and print what each phase of their first lookup took."""
    from . import cold_start as starts

    if args.starts < 1:
        raise CannotRunError(f"--starts {args.starts}: at least 1 is needed")
    device = choose_device(args.device)
    console = make_console()
    with progress_bar(console) as progress:
        total = (args.starts + 1) * len(starts.ways(device))
        task = progress.add_task("processes", total=total)
        try:
            found = starts.measure_cold_start(device, args.starts, partial(progress.advance, task))
        except starts.StartError as problem:
            raise CannotRunError(str(problem)) from None
    title = f"A process's first lookup on {machine.device_name(device)}: seconds, median of {args.starts} starts"
    table = make_table(title, "lookup", *(f">{phase}" for phase in starts.PHASES), ">in all")
    for one in found:
        times = (*one.seconds.values(), sum(one.seconds.values()))
        table.add_row(one.way.name, *(f"{seconds:.3f}" for seconds in times))
    print_table(console, table)
    return 0


def word_vectors(args: argparse.Namespace) -> int:
    """Read files of word vectors in processes of their own, and print what each took."""
    if importlib.util.find_spec("gensim") is None:
        raise CannotRunError(
            'this needs gensim: install the extra "vectors" (from a clone: pip install ".[vectors]")'
        )
    from . import word_vectors as files

    words, dim, rounds = (
        whole_number(f"--{name}", getattr(args, name)) for name in ("words", "dim", "rounds")
    )
    columns = (">s: ours", ">gensim", ">speedup", ">MiB: ours", ">gensim")
    taken = "one reading" if rounds == 1 else f"median of {rounds} readings"
    table = make_table(f"Files of {words:,} x {dim} vectors, {taken}", "file", *columns)
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(make_console(stderr=True)) as progress,
    ):
        files.write_files(Path(folder), words, dim)
        starts = sum(map(len, files.ways(Path(folder)).values())) * (rounds + 1)
        task = progress.add_task("readings", total=starts)
        try:
            for one in files.measure_readings(
                Path(folder), rounds, partial(progress.advance, task)
            ):
                speedup = "-"
                if one.ratios:
                    low, high = min(one.ratios), max(one.ratios)
                    speedup = f"{median(one.ratios):.2f} ({low:.2f} to {high:.2f})"
                shown = [
                    f"{values[reader]:{form}}" if reader in values else "-"
                    for values, form in ((one.seconds, ".2f"), (one.mebibytes, ".0f"))
                    for reader in (files.OURS, files.GENSIM)
                ]
                table.add_row(one.name, *shown[:2], speedup, *shown[2:])
        except files.ReadError as problem:
            raise CannotRunError(str(problem)) from None
    print_table(make_console(), table)
    return 0


def quantized(args: argparse.Namespace) -> int:
    """Print what quantized tables take, how near they are, and how long a lookup takes beside fp32's."""
    from . import quantized as tables

    rows, dim, ids, rounds = (
        whole_number(f"--{name}", getattr(args, name)) for name in ("rows", "dim", "ids", "rounds")
    )
    if rounds < 2:
        raise CannotRunError("--rounds: at least 2 are needed")
    if args.threads < 1:
        raise CannotRunError(f"--threads {args.threads}: at least 1 is needed")
    torch.set_num_threads(args.threads)
    console = make_console()
    with progress_bar(console) as progress:
        task = progress.add_task("tables", total=len(tables.ways()))
        found = tables.measure_quantized(rows, dim, ids, rounds, partial(progress.advance, task))
    title = f"{rows:,} x {dim}, {ids:,} ids, threads: {args.threads}; over torch's fp32"
    heads = ("table", ">memory", ">file", ">largest error", ">mean error", ">time", ">quartiles")
    table = make_table(title, *heads)
    for one in found:
        table.add_row(
            one.name,
            f"{one.memory:.3f}",
            "not saved" if one.file is None else f"{one.file:.3f}",
            f"{one.largest_error:.4f}",
            f"{one.mean_error:.4f}",
            f"{one.ratio:.2f}",
            f"{one.quarter:.2f} to {one.three_quarters:.2f}",
        )
    print_table(console, table)
    return 0


def distributed(args: argparse.Namespace) -> int:
    """Run a table's steps on ranks of their own, and print what they take, send and hold."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise CannotRunError("distributed needs gloo, which this torch is built without")
    from . import distributed as ranks
    from . import loopback, row_csv

    sizes = {
        name: whole_number(f"--{name}", getattr(args, name))
        for name in ("rows", "dim", "ids", "rounds")
    }
    numbers = [whole_number("--ranks", text) for text in args.ranks]
    pairs = known("pair", args.pairs, ranks.PAIRS) or []
    for pair in pairs:
        for package in ranks.PAIRS[pair].packages:
            if importlib.util.find_spec(package) is None:
                raise CannotRunError(
                    f"--pairs {pair} needs {package}: `make torchrec`, in a clone, installs it"
                )
        if sizes["ids"] % ranks.PAIRS[pair].multiple:
            multiple = ranks.PAIRS[pair].multiple
            raise CannotRunError(
                f"--pairs {pair} takes a multiple of {multiple} --ids, got {sizes['ids']}"
            )
    for number in numbers:
        if -(-sizes["rows"] // number) * (number - 1) >= sizes["rows"]:
            raise CannotRunError(
                f"of {number} ranks one has none of {sizes['rows']} rows, which torch's layer cannot train: "
                "choose more --rows or fewer --ranks"
            )
    # Torch's layer makes the whole gradient on each rank.
    needed = ranks.needed_bytes(max(numbers), sizes["rows"] * sizes["dim"])
    free = machine.usable_memory(torch.device("cpu"))
    if needed > free:
        said = f"{machine.readable_bytes(needed)}, this machine has {machine.readable_bytes(free)}"
        raise CannotRunError(f"--rows, --dim and --ranks need {said}: choose smaller ones")
    if args.out is not None:
        results.check_file_writable(args.out)
    namespace = loopback.has_namespaces()
    found = []
    with progress_bar(make_console(stderr=True)) as progress:
        task = progress.add_task("", total=len(pairs) * len(numbers) * (sizes["rounds"] + 1))
        for pair, number in itertools.product(pairs, numbers):
            progress.update(task, description=f"{pair}, {number} ranks")
            shape = ranks.Shape(pair, number, **sizes, has_namespace=namespace)
            try:
                found += ranks.measure_distributed(shape, partial(progress.advance, task))
            except ranks.RankError as problem:
                raise CannotRunError(str(problem)) from None
    for pair in pairs:
        table = ranks.rich_table([step for step in found if step.pair == pair])
        print_table(make_console(), table)
    if args.out is not None:
        row_csv.write(args.out, ranks.ShardedStep, found)
    return 0 if all(step.equal for step in found) else 1


def plot(args: argparse.Namespace) -> int:
    from .plots import plot_directory

    check_directory(args.directory)
    for path in plot_directory(args.directory):
        print(path)
    return 0


def ratios(args: argparse.Namespace) -> int:
    check_extra("matplotlib")
    from .ratios import draw_ratios

    results.check_writable(args.out)
    for path in draw_ratios(args.directories, args.out):
        print(path)
    return 0


def report(args: argparse.Namespace) -> int:
    from .report import write_report

    check_directory(args.directory)
    print(write_report(args.directory))
    return 0


def check_directory(directory: Path) -> None:
    """Raises an error unless pictures can be drawn of what it holds, and written there."""
    check_extra("matplotlib")
    if not directory.is_dir():
        raise CannotRunError(f"{directory} is no directory of results")
    results.check_writable(directory, "copy the results to a folder of yours")


def compare(args: argparse.Namespace) -> int:
    from .compare import main_compare

    return main_compare(args.old, args.new, args.fail_below)


# What --help says of a command, its options, and what runs it.
COMMANDS: dict[str, tuple[str, Options, Callable[[argparse.Namespace], int]]] = {
    "run": ("measure sets of shapes and write CSV and JSON", RUN, run),
    "headline": (
        "the headline shapes in five minutes, with pictures and report",
        HEADLINE,
        headline,
    ),
    "figures": (
        "what `ratios` draws, in turns, within twenty minutes on a CPU",
        FIGURES,
        figures,
    ),
    "list": ("the sets of shapes, and who can be measured here", (), list_all),
    "compare": (
        "exit 1 where a row of gpu_embed's in NEW is slower than in OLD, wrong or missing",
        COMPARE,
        compare,
    ),
    "codegen": ("what the kernels compile to; needs Triton, but no GPU", CODEGEN, codegen),
    "traffic": (
        "what the compiled kernels move, in an interpreter; needs Triton, but no GPU",
        TRAFFIC,
        traffic,
    ),
    "host-calls": ("the package's own Python calls in a warm call", HOST_CALLS, host_calls),
    "cold-start": (
        "what the first lookup of a process costs: imports, compilation, up to the launch",
        COLD_START,
        cold_start,
    ),
    "word-vectors": (
        "read files of word vectors, beside gensim; takes minutes",
        WORD_VECTORS,
        word_vectors,
    ),
    "quantized": (
        "tables of 8 and 4 bits on the CPU, beside torchao's and bitsandbytes's where they are installed",
        QUANTIZED,
        quantized,
    ),
    "distributed": (
        "tables whose rows are spread over processes on gloo, ours beside torch's and TorchRec's",
        DISTRIBUTED,
        distributed,
    ),
    "ratios": ("draw how many times faster than torch the results in DIR are", RATIOS, ratios),
    "plot": ("draw the results in DIR", DIRECTORY, plot),
    "report": ("write DIR as one HTML page", DIRECTORY, report),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    replace_what_cannot_be_shown()
    try:
        args = parse_args(argv)
        args.argv = argv
        check_extra("rich")
        return summary(args) if args.command is None else COMMANDS[args.command][2](args)
    except (CannotRunError, ids_module.IdsError, results.ResultsError, OSError) as problem:
        where = getattr(problem, "filename", None)
        reason = getattr(problem, "strerror", None) or problem
        complain(f"{where}: {reason}" if where else reason)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROG}: interrupted", file=sys.stderr)
        return 130
