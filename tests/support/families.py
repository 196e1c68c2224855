"""Swap every model type of transformers, small and with random weights, and say which tables are reached.

    python tests/support/families.py [TYPE ...]

builds each in a process of its own, replaces its embeddings, verifies them, and writes tests/support/families.csv and
docs/families.md. With types, it prints what became of these and writes nothing. No GPU and no network are needed.
"""

import argparse
import csv
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests/support/families.csv"
PAGE = ROOT / "docs/families.md"
# A model that takes longer, or more memory, becomes a line that says so.
MOST_SECONDS = 60
MOST_BYTES = 10 * 2**30


class Line(NamedTuple):
    """What became of one table of a model type, or of the type as a whole; a line of families.csv."""

    model_type: str
    model: str  # its class
    state: str
    table: str = ""  # its name in the model
    kind: str = ""  # the class of its module
    note: str = ""


# Of a table.
SWAPPED = "swapped"  # looked up with our op after the swap, bit-equal to torch's lookup
OVERRIDDEN = "overridden"  # looked up with our op under override_aten alone
ALONE = "alone"  # looked up, and never with our op
WHOLE = "whole"  # the model reads its weight, and never looks up
IDLE = "idle"  # no input that was tried reaches it
WRONG = "wrong"  # our op, and another result than torch's
# Of a type.
NO_TABLE = "no table"
NOT_RUN = "not run"
NOT_BUILT = "not built"


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
        return [Line(model_type, "", NOT_BUILT, note="a part of another model, without a model class")]
    best: list[Line] = []
    failures = []
    for level in small_models.LEVELS:
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


def in_short(error: BaseException) -> str:
    """The type of an error and the beginning of what it says, without what differs from run to run."""
    text = " ".join(str(error).split())
    for library in ("timm", "natten", "torchaudio", "detectron2", "torchvision"):
        if isinstance(error, ImportError) and library in text:
            return f"needs {library}"
    text = text if len(text) <= 100 else f"{text[:97]}..."
    return f"{type(error).__name__}: {text}"


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
    ran, refused = False, ""
    for prefix, root in small_models.parts(model):
        inside = {f"{prefix}{name}" for name, _ in root.named_modules()}
        own = [table for table in tables.values() if inside.intersection(table.names)]
        if ran and all(table.states for table in own):
            continue
        swapped = tuple(one for one in report.replaced if one.name in inside)
        part = replace(report, model=root, replaced=swapped)
        for inputs in small_models.offers(root):
            watch = Watch(left_alone)
            try:
                with watch, watch.hooks():
                    modules = part.verify(**inputs).modules
                    if not swapped:
                        small_models.run(root, inputs)
            except Exception as error:
                refused = refused or in_short(error)
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
        yield Line(model_type, kind, NOT_RUN, note=refused or "its inputs are not known")
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


def examine_all(model_types: Sequence[str], processes: int) -> Iterator[tuple[str, list[Line]]]:
    """Each type with its lines, as they end."""
    fork = multiprocessing.get_context("fork")
    left = list(reversed(model_types))
    running: dict[Connection, tuple[str, Any, float]] = {}
    try:
        while left or running:
            while left and len(running) < processes:
                here, there = fork.Pipe(duplex=False)
                process = fork.Process(target=child, args=(left[-1], there), daemon=True)
                process.start()
                there.close()
                running[here] = (left.pop(), process, time.monotonic() + MOST_SECONDS)
            first = min(end for _, _, end in running.values())
            ready = wait(list(running), timeout=max(0.0, first - time.monotonic()))
            late = [one for one, (_, _, end) in running.items() if end <= time.monotonic()]
            for connection in {*ready, *late}:
                model_type, process, _ = running.pop(connection)
                try:
                    if connection not in ready:
                        lines = [Line(model_type, "", NOT_RUN, note=f"took more than {MOST_SECONDS} s")]
                    else:
                        lines = connection.recv()
                except EOFError:
                    process.join()
                    lines = [Line(model_type, "", NOT_RUN, note=f"its process ended with {process.exitcode}")]
                process.kill()
                process.join()
                connection.close()
                yield model_type, lines
    finally:
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    import small_models

    known = small_models.model_types()
    chosen = options.types or known
    for one in chosen:
        if one not in known:
            parser.error(f"{one} is no model type")
    warm_up(chosen)
    for _, lines in examine_all(chosen, options.processes):
        for line in lines:
            print(*line, sep=" | ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
