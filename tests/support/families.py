"""Swap every model type of transformers, small and with random weights, and say which tables are reached.

    python tests/support/families.py [TYPE ...]

builds each in a process of its own, replaces its embeddings, verifies them, and writes tests/support/families.json and
docs/families.md. With types, it prints what became of these and writes nothing. No GPU and no network are needed.
"""

import argparse
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import metadata
from inspect import Parameter, signature
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from families_page import (
    ALONE,
    IDLE,
    NO_TABLE,
    NOT_BUILT,
    NOT_RUN,
    OVERRIDDEN,
    SWAPPED,
    WHOLE,
    WRONG,
    Line,
    page,
    read_data,
    summary,
    write_data,
)

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/support/families.json"
PAGE = ROOT / "docs/families.md"
# A model that takes longer, or more memory, becomes a line that says so.
MOST_SECONDS = 120
# After so many seconds of the CPU no further input is tried; what was found until then stays.
MOST_TRYING = 15
MOST_BYTES = 10 * 2**30


# In the process of one type.


@dataclass
class Table:
    """A table, by the memory that it lies in; modules that are tied are one."""

    names: list[str]
    kind: str
    states: set[str]
    is_read: bool = False


def examine(model_type: str) -> list[Line]:
    """Build, swap and run one type."""
    import small_models

    kind = small_models.model_class(model_type)
    if kind is None:
        return [
            Line(model_type, "", NOT_BUILT, note="a part of another model, without a model class")
        ]
    best: list[Line] = []
    failures = []
    for level in small_models.LEVELS:
        if best and time.process_time() > MOST_TRYING:
            break
        try:
            model = small_models.build(model_type, level)
        except Exception as error:
            failures.append(in_short(error))
            continue
        lines = examined(model_type, model)
        if not best or open_questions(lines) < open_questions(best):
            best = lines
        if not open_questions(best):
            break
    return best or [Line(model_type, kind.__name__, NOT_BUILT, note=failures[0])]


def open_questions(lines: Iterable[Line]) -> int:
    return sum(line.state in (IDLE, NOT_RUN) for line in lines)


def is_needed(one: Parameter) -> bool:
    return one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)


def in_short(error: BaseException) -> str:
    """The type of an error and the beginning of what it says, without what differs from run to run."""
    text = " ".join(str(error).split())
    missing = re.search(r"requires the (\w+) library", text)
    if missing:
        return f"needs {missing[1]}"
    # Of a config that was checked, what the check said.
    kind, _, said = re.sub(r".*validator '\w+': ", "", text).rpartition("Error: ")
    text = f"{kind or type(error).__name__.removesuffix('Error')}Error: {said}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def examined(model_type: str, model: Any) -> list[Line]:
    """Swap a model, run it and its parts, and say what became of each table."""
    import small_models
    from table_watch import Watch, overridden, place_of

    import gpu_embed

    report = gpu_embed.replace_embeddings(model)
    tables: dict[int, Table] = {}
    for one in (*report.replaced, *report.skipped):
        module = model.get_submodule(one.name)
        names = tables.setdefault(place_of(module.weight), Table([], type(module).__name__, set()))
        names.names.append(one.name)
    left_alone = [model.get_submodule(one.name) for one in report.skipped]
    needed = [name for name, one in signature(model.forward).parameters.items() if is_needed(one)]
    ran, refused = False, f"no input is known for forward({', '.join(needed)})"
    refusals = 0
    for prefix, root in small_models.parts(model):
        inside = {f"{prefix}{name}" for name, _ in root.named_modules()}
        own = [table for table in tables.values() if inside.intersection(table.names)]
        if ran and all(table.states for table in own):
            continue
        swapped = tuple(one for one in report.replaced if one.name in inside)
        part = replace(report, model=root, replaced=swapped)
        for inputs in small_models.offers(root):
            if time.process_time() > MOST_TRYING:
                if not ran and not refusals:
                    refused = "building took so long that no input was tried"
                break
            watch = Watch(left_alone)
            try:
                with watch, watch.hooks():
                    modules = part.verify(**inputs).modules
                    if not swapped:
                        small_models.run(root, inputs)
            except Exception as error:
                if root is model and not refusals:
                    refused = in_short(error)
                refusals += 1
                continue
            ran = True
            expected = Counter(watch.lookups)
            for one in modules:
                place = place_of(model.get_submodule(one.name).weight)
                expected[place] += one.lookups
                if one.calls:
                    tables[place].states.add(SWAPPED if one.ok else WRONG)
            for place in watch.lookups:
                tables.setdefault(place, Table([small_models.name_of(model, place)], "", set()))
            if watch.lookups:
                with overridden(watch.lookups) as (counted, wrong):
                    small_models.run(root, inputs)
                for place in watch.lookups:
                    reached = OVERRIDDEN if counted[place] >= expected[place] else ALONE
                    tables[place].states.add(WRONG if place in wrong else reached)
            for place in watch.read & tables.keys():
                tables[place].is_read = True
            if all(table.states for table in own):
                break
    return [*lines_of(model_type, type(model).__name__, tables, ran, refused)]


def lines_of(model_type, kind, tables, ran, refused) -> Iterator[Line]:
    if not ran:
        yield Line(model_type, kind, NOT_RUN, note=refused)
        return
    if not tables:
        yield Line(model_type, kind, NO_TABLE)
    for table in tables.values():
        found = [state for state in (WRONG, ALONE, OVERRIDDEN, SWAPPED) if state in table.states]
        state = found[0] if found else WHOLE if table.is_read else IDLE
        yield Line(model_type, kind, state, " = ".join(table.names), table.kind)


# In the process that was called.


def child(model_type: str, connection: Connection) -> None:
    """Examine one type, and send what became of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends us.
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        lines = examine(model_type)
    except Exception as error:
        lines = [Line(model_type, "", NOT_RUN, note=in_short(error))]
    connection.send(lines)


def examine_all(
    model_types: Sequence[str], processes: int, seconds: float
) -> Iterator[tuple[str, list[Line]]]:
    """Each type with its lines, as they end."""
    fork = multiprocessing.get_context("fork")
    left = list(reversed(model_types))
    running: dict[Connection, tuple[str, Any, float]] = {}
    stopped = []

    def stop(*_: object) -> None:
        # Python drops an exception that is raised just when it forks; this stays.
        stopped.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        while left or running:
            while left and len(running) < processes:
                here, there = fork.Pipe(duplex=False)
                process = fork.Process(target=child, args=(left[-1], there), daemon=True)
                process.start()
                there.close()
                running[here] = (left.pop(), process, time.monotonic() + seconds)
            if stopped:
                raise KeyboardInterrupt
            first = min(end for _, _, end in running.values())
            ready = wait(list(running), timeout=max(0.0, first - time.monotonic()))
            late = [one for one, (_, _, end) in running.items() if end <= time.monotonic()]
            for connection in {*ready, *late}:
                model_type, process, _ = running.pop(connection)
                try:
                    if connection not in ready:
                        lines = [
                            Line(model_type, "", NOT_RUN, note=f"took more than {seconds:g} s")
                        ]
                    else:
                        lines = connection.recv()
                except EOFError:
                    process.join()
                    lines = [
                        Line(
                            model_type,
                            "",
                            NOT_RUN,
                            note=f"its process ended with {process.exitcode}",
                        )
                    ]
                process.kill()
                process.join()
                connection.close()
                yield model_type, lines
    finally:
        signal.signal(signal.SIGINT, before)
        for _, process, _ in running.values():
            process.kill()
            process.join()


def warm_up(chosen: Iterable[str]) -> None:
    """Import what every process needs, once."""
    import small_models
    import torch
    import transformers

    import gpu_embed

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    for model_type in chosen:
        small_models.model_class(model_type)
    with gpu_embed.use_backend("triton"):
        gpu_embed.functional.embedding(torch.tensor([0]), torch.zeros(1, 4))


def versions() -> dict[str, str]:
    return {name: metadata.version(name).partition("+")[0] for name in ("transformers", "torch")}


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "types", nargs="*", help="model types, as in a config.json; none: all of them"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="put these types' lines in place of those that are kept",
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="how many at once"
    )
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, help="that one may take")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: at least 1 is needed")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse_args(arguments)
    try:
        return make(options)
    except KeyboardInterrupt:
        print("families: stopped; nothing was written", file=sys.stderr)
        return 130


def make(options: argparse.Namespace) -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    try:
        import small_models
    except ImportError as error:
        print(f"families: {error}; install the integration extra", file=sys.stderr)
        return 1
    known = small_models.model_types()
    unknown = [one for one in options.types if one not in known]
    if unknown:
        near = get_close_matches(unknown[0].lower(), known)
        hint = f"; near it: {', '.join(near)}" if near else ""
        print(f"families: transformers has no model type {unknown[0]!r}{hint}", file=sys.stderr)
        return 2
    chosen = options.types or known
    writes = options.write or not options.types
    # All types take minutes, which would be lost.
    locked = [path for path in (DATA, PAGE) if not os.access(path.parent, os.W_OK)]
    if writes and locked:
        print(f"families: cannot write in {locked[0].parent}", file=sys.stderr)
        return 1
    lines = examine_shown(chosen, options.processes, options.seconds)
    if options.types:
        for line in lines:
            print(*filter(None, line), sep="  ")
    if options.types and options.write:
        kept, of = read_data(DATA.read_text())
        if of != versions():
            print(f"families: what is kept is of {of}; write all types anew", file=sys.stderr)
            return 1
        lines += [line for line in kept if line.model_type not in chosen]
    print(summary(lines))
    if writes:
        replace_file(DATA, write_data(lines, versions()))
        replace_file(PAGE, page(lines, versions()))
        print(f"wrote {DATA.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return 0


def examine_shown(chosen: Sequence[str], processes: int, seconds: float) -> list[Line]:
    """What became of each type, with a bar that moves meanwhile."""
    from gpu_embed.bench.console import make_console, progress_bar

    warm_up(chosen)
    with progress_bar(make_console(stderr=True)) as progress:
        task = progress.add_task("", total=len(chosen))
        found = []
        for model_type, lines in examine_all(chosen, processes, seconds):
            found += lines
            progress.update(task, description=model_type, advance=1)
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
