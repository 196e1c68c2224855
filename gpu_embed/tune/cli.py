"""The command line of the tuner."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import backends, user_cache
from .._self_check import check_backend
from ..settings import TUNED
from .clock import Clock
from .machine import KERNEL_BACKENDS, Machine
from .methods import Rule, rules, search_methods
from .offline import META, Job, Usage
from .search import ROUNDS, paths, search
from .subject import Subject
from .tuned_file import TunedFile, check_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Compiled for where there is no card.
ARCHITECTURE = 90
INTERRUPTED = 130
# Where the output is a file and has no width of its own.
FILE_WIDTH = 120


class CannotRunError(Exception):
    """Why there is nothing to tune, or no place for the result."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu_embed.tune",
        description="Measures the launch settings of the kernels and the limits between methods on the "
        "cards of this machine, and writes one file a kind of card. From then on gpu_embed uses it.",
        epilog="GPU_EMBED_TUNED=off goes back to the defaults; python -m gpu_embed.env_report says what is "
        "in force. Exit code: 1 if the self-check fails with the file, 2 if nothing can be tuned, "
        f"{INTERRUPTED} if it was stopped.",
    )
    parser.add_argument("--methods", action="store_true", help="only the limits between methods")
    parser.add_argument("--resume", action="store_true", help="go on where a run was stopped")
    parser.add_argument("--anyway", action="store_true", help="though others use the card")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the candidates and compile them; needs no card",
    )
    parser.add_argument("--device", help="one device, as cuda:0; default: one of each kind")
    parser.add_argument("--backend", choices=KERNEL_BACKENDS, help="only this one")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only settings named so")
    parser.add_argument("--out", type=Path, help="folder; default: tuned in the user's cache")
    parser.add_argument(
        "--arch", type=from_one, help="what a dry run compiles for, as 90 for sm_90"
    )
    parser.add_argument("--jobs", type=from_one, help="processes that compile; default: one a core")
    return parser.parse_args(argv)


def from_one(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def main(argv: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    args, machine = parse_args(argv), machine or Machine()
    try:
        return run(args, machine)
    except CannotRunError as problem:
        print(f"gpu_embed tune: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_embed tune: stopped; --resume goes on with the rest", file=sys.stderr)
        return INTERRUPTED


def run(args: argparse.Namespace, machine: Machine) -> int:
    if importlib.util.find_spec("rich") is None:
        raise CannotRunError(
            'the tuner needs rich: install the extra "bench" (from a clone: pip install ".[bench]")'
        )
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    if args.dry_run:
        return dry_run(args, machine, console)
    devices = chosen_devices(args, machine)
    folder = args.out or (user_cache.folder() or Path()) / "tuned"
    if args.out is None and user_cache.folder() is None:
        raise CannotRunError("there is no cache folder here: name one with --out")
    reason = check_folder(folder)
    if reason is not None:
        raise CannotRunError(f"{reason}: choose another with --out")
    for device in devices:
        others = machine.others(device)
        if others and not args.anyway:
            raise CannotRunError(
                f"{device} is busy: {', '.join(others)}. Times would mean nothing; --anyway measures "
                "all the same"
            )
    # Every card is tuned before the result of one decides the exit code.
    return max([tune(args, machine, device, folder, console) for device in devices])


def chosen_devices(args: argparse.Namespace, machine: Machine) -> list[torch.device]:
    """One of each kind of card."""
    devices = machine.devices()
    if args.device is not None:
        devices = [device for device in devices if args.device in (str(device), device.type)]
    if not devices:
        raise CannotRunError(
            f"there is no {args.device or 'CUDA device'} here; --dry-run lists the candidates and "
            "compiles them without one"
        )
    kinds = {machine.card(device): device for device in reversed(devices)}
    return list(reversed(kinds.values()))


def tune(
    args: argparse.Namespace,
    machine: Machine,
    device: torch.device,
    folder: Path,
    console: Console,
) -> int:
    """Search everything on one card, and write its file. Returns the exit code."""
    card, clock = machine.card(device), machine.clock(device)
    # While it runs, what is in force are the defaults.
    with TUNED.set("off", "tune"):
        file = TunedFile(folder / card.file_name, card, clock.copy_gb_per_s())
        if args.resume and (reason := file.resume()) is not None:
            raise CannotRunError(reason)
        if not args.resume:
            file.keep()
        console.print(f"{card.name} ({device}), copies {file.content['copy_gb_per_s']:g} GB/s")
        subjects = [
            Subject(one, device)
            for one in machine.backends(device)
            if args.backend in (None, one.name)
        ]
        if not subjects:
            raise CannotRunError(f"no backend with kernels can serve {device}: see env_report")
        check_names(args, subjects)
        with progress_bar(console) as progress:
            search_all(args, machine, subjects, clock, file, progress)
        file.complete()
    return report(file, subjects, device, console)


def search_all(
    args: argparse.Namespace,
    machine: Machine,
    subjects: Sequence[Subject],
    clock: Clock,
    file: TunedFile,
    progress: Progress,
) -> None:
    kernels = [{} if args.methods else kernels_to_try(args, one, file) for one in subjects]
    jobs = jobs_for(subjects, kernels)
    major, minor = file.content["capability"].split(".")
    usages = compile_jobs(machine, jobs, int(major + minor), args.jobs, progress)
    for backend, path, settings in (key for key, usage in usages.items() if usage.error):
        error = usages[backend, path, settings].error
        progress.console.print(f"{backend} {path} {settings} does not compile: {error}")
    searched = [
        (one, path, [s for s in tried[path] if is_worth_it(usages, one, path, s)])
        for one, tried in zip(subjects, kernels, strict=True)
        for path in tried
    ]
    limits = [(one, rule) for one in subjects for rule in rules_to_try(args, one, file)]
    total = sum(len(tried) for *_, tried in searched)
    total += sum(len(ROUNDS) * len(rule.inputs) for _, rule in limits)
    bar = progress.add_task("measure", total=total)
    for one, path, tried in searched:
        progress.update(bar, description=f"{one.name} {path}")
        best, refused = search(one, path, clock, tried, lambda: progress.advance(bar))
        for settings, reason in refused.items():
            text = numbers(asdict(settings))
            progress.console.print(f"{one.name} {path} {text} is refused: {reason}")
        file.add(one.name, "launches", path, [path], {} if best is None else {path: best})
    for one, rule in limits:
        progress.update(bar, description=f"{one.name} {rule.name}")
        found = search_methods(one, rule, clock, lambda: progress.advance(bar))
        file.add(one.name, "methods", rule.name, rule.options[0], found)


def kernels_to_try(
    args: argparse.Namespace, subject: Subject, file: TunedFile | None
) -> dict[str, list[Any]]:
    """Candidates by path, less what is not asked for and what is done."""
    return {
        path: tried
        for path, tried in paths(subject).items()
        if is_asked_for(args, path)
        and (file is None or f"{subject.name}.launches.{path}" not in file.done)
    }


def jobs_for(subjects: Sequence[Subject], kernels: Sequence[dict[str, list[Any]]]) -> list[Job]:
    """What is to be compiled: the defaults, and all candidates."""
    return [
        Job(one.name, path, settings)
        for one, tried in zip(subjects, kernels, strict=True)
        for path, candidates in tried.items()
        for settings in (one.leaves()[path], *candidates)
    ]


def rules_to_try(args: argparse.Namespace, subject: Subject, file: TunedFile) -> list[Rule]:
    return [
        rule
        for rule in rules(subject)
        if is_asked_for(args, rule.name) and f"{subject.name}.methods.{rule.name}" not in file.done
    ]


def check_names(args: argparse.Namespace, subjects: Sequence[Subject]) -> None:
    """Raises CannotRunError for a name that no settings have."""
    known = [rule.name for one in subjects for rule in rules(one)]
    if not args.methods:
        known += [path for one in subjects for path in one.leaves()]
    for wanted in args.kernels or ():
        if not any(name.startswith(wanted) for name in known):
            names = ", ".join(sorted({name.partition("[")[0] for name in known}))
            raise CannotRunError(f"--kernels {wanted}: no such settings; there are {names}")


def is_asked_for(args: argparse.Namespace, name: str) -> bool:
    return args.kernels is None or any(name.startswith(wanted) for wanted in args.kernels)


# By backend, path, and the settings as text: some are compared by identity, and came back from another process.
Usages = dict[tuple[str, str, str], Usage]


def usage_key(backend: str, path: str, settings: Any) -> tuple[str, str, str]:
    return backend, path, str(asdict(settings))


def compile_jobs(
    machine: Machine,
    jobs: Sequence[Job],
    architecture: int,
    processes: int | None,
    progress: Progress,
) -> Usages:
    usages = {}
    bar = progress.add_task("compile", total=len(jobs))
    for job, usage in machine.compile(jobs, architecture, processes or os.cpu_count() or 1):
        usages[usage_key(*job)] = usage
        progress.advance(bar)
    return usages


def is_worth_it(usages: Usages, subject: Subject, path: str, settings: Any) -> bool:
    """Whether a candidate compiles, and spills no more than the default."""
    usage = usages[usage_key(subject.name, path, settings)]
    default = usages[usage_key(subject.name, path, subject.leaves()[path])]
    return not usage.error and usage.spilled_bytes <= default.spilled_bytes


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """With the time left; it stays out of pipes and files."""
    from rich import progress

    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield bar


def report(
    file: TunedFile, subjects: Sequence[Subject], device: torch.device, console: Console
) -> int:
    """What was found, and the self-check with it in force. Returns the exit code."""
    from rich.table import Table

    table = Table("backend", "settings", "default", "tuned", "gain", title=file.content["card"])
    for one in subjects:
        defaults = {**one.leaves(), **one.method_leaves()}
        for part in ("launches", "methods"):
            for path, entry in file.content.get(one.name, {}).get(part, {}).items():
                was = {name: getattr(defaults[path], name) for name in entry["set"]}
                gain = f"{entry['gain']:.2f}"
                table.add_row(one.name, path, numbers(was), numbers(entry["set"]), gain)
    if table.row_count:
        console.print(table)
    else:
        console.print("the defaults stand: nothing was faster everywhere")
    with TUNED.set(str(file.path), "tune"):
        checks = [check_backend(one.name, device) for one in subjects]
    wrong = [check for check in checks if check.status != "right"]
    if wrong:
        # Where no lookup finds it.
        kept = file.path.replace(file.path.with_suffix(".wrong"))
        for check in wrong:
            print(f"{check.backend} is {check.status}: {check.detail}", file=sys.stderr)
        print(f"gpu_embed tune: the self-check failed; see {kept}", file=sys.stderr)
        return 1
    console.print(f"self-check right; {file.path}")
    return 0


def numbers(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def dry_run(args: argparse.Namespace, machine: Machine, console: Console) -> int:
    """List every candidate, compile it, and say which ones would be dropped. Returns the exit code."""
    from rich.table import Table

    names = [args.backend] if args.backend else list(KERNEL_BACKENDS)
    subjects = [
        Subject(backends.load(name), META) for name in names if importlib.util.find_spec(name)
    ]
    tried = [kernels_to_try(args, one, None) for one in subjects]
    jobs = jobs_for(subjects, tried)
    if not jobs:
        raise CannotRunError("there are no such kernels, or neither triton nor cupy is installed")
    architecture = args.arch or ARCHITECTURE
    with progress_bar(console) as progress:
        usages = compile_jobs(machine, jobs, architecture, args.jobs, progress)
    table = Table("backend", "settings", "candidate", "registers", "spills", "")
    counts: dict[str, int] = defaultdict(int)
    for one, kernels in zip(subjects, tried, strict=True):
        for path, candidates in kernels.items():
            for settings in (one.leaves()[path], *candidates):
                usage = usages[usage_key(one.name, path, settings)]
                said = usage.error or ("" if settings in candidates else "default")
                if not said and not is_worth_it(usages, one, path, settings):
                    said = "dropped: it spills"
                counts["failed" if usage.error else "dropped" if "spills" in said else "kept"] += 1
                row = (one.name, path, numbers(asdict(settings)))
                table.add_row(*row, str(usage.registers), str(usage.spilled_bytes), said)
    console.print(table)
    summary = ", ".join(f"{number} {what}" for what, number in counts.items())
    console.print(f"{len(jobs)} candidates compiled for sm_{architecture}: {summary}")
    return 1 if counts["failed"] else 0
