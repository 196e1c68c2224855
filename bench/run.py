"""A run: which cells, modes and providers, in which order; every row on disk before the next is measured."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import ids as ids_module
from .measure import Bench, Problem, collect_cycles, failed
from .providers import PROVIDERS, Provider
from .results import Row, RowWriter
from .shapes import SETS, Cell, varied


@dataclass(frozen=True)
class Job:
    """One cell in one mode, for one provider."""

    set: str
    cell: Cell
    mode: str
    provider: Provider

    def row(self, bench: Bench) -> Row:
        return bench.row(self.set, self.cell, self.mode, self.provider.name)


@dataclass(frozen=True)
class Choice:
    """What is to be run; None: whatever the sets say."""

    sets: Sequence[str]
    providers: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    axes: Mapping[str, Sequence[Any] | None] = field(default_factory=dict)  # by Cell's fields
    limit: int | None = None  # cells


def plan(choice: Choice, device: torch.device) -> list[Job]:
    """The jobs, cell by cell.

    A provider that cannot run here, does not measure a mode, or is a candidate that refuses a cell, gets no
    job, unless it was asked for by name: then its row says why.

    Raises IdsError if a file of ids does not fit a table.
    """
    named = choice.providers is not None
    providers = [PROVIDERS[name] for name in choice.providers or PROVIDERS]
    if not named:
        providers = [p for p in providers if p.missing_reason(device) is None]
    cells = list(itertools.islice(_cells(choice), choice.limit))
    for distribution, vocab in {(cell.distribution, cell.vocab) for _, cell in cells}:
        if distribution.endswith(ids_module.FILE_SUFFIXES):
            ids_module.draw(distribution, 1, vocab)
    return [
        Job(name, cell, mode, provider)
        for name, cell in cells
        for mode in choice.modes or SETS[name].modes
        for provider in providers
        if named or provider.is_planned(cell, mode)
    ]


def _cells(choice: Choice) -> Iterable[tuple[str, Cell]]:
    for name in choice.sets:
        for distribution in choice.axes.get("distribution") or (None,):
            axes = dict(choice.axes)
            if distribution is not None:
                # A file is read once through, unless the number of ids is given.
                length = ids_module.length_of_file(distribution)
                axes["distribution"] = [distribution]
                axes["num_ids"] = axes.get("num_ids") or ([length] if length else None)
            yield from ((name, cell) for cell in varied(SETS[name].cells, **axes))


def execute(
    bench: Bench,
    jobs: Sequence[Job],
    writer: RowWriter,
    on_start: Callable[[Job], Any] = lambda job: None,
    on_row: Callable[[Row], Any] = lambda row: None,
    on_skip: Callable[[Job], Any] = lambda job: None,
    last_start: float = float("inf"),
) -> list[Row]:
    """Measure the jobs that the file lacks, in order, and write each row; returns the new rows.

    Args:
        last_start: by time.monotonic(); the jobs that are left then are skipped.
    """
    rows = []
    for cell, group in itertools.groupby(jobs, key=lambda job: job.cell):
        problem: Problem | Exception | None = None
        for job in group:
            row = job.row(bench)
            if row.key in writer.done or time.monotonic() > last_start:
                on_skip(job)
                continue
            on_start(job)
            refused = _refused(bench, job, row)
            if refused is None and problem is None:
                try:
                    problem = bench.problem(cell)
                except Exception as error:
                    problem = error
            if refused is not None:
                row = refused
            elif isinstance(problem, Problem):
                row = bench.measure(problem, job.provider, job.mode, row)
                collect_cycles(problem)
                _free(bench.device)
            elif isinstance(problem, ids_module.IdsError):
                row = replace(row, status="missing", note=str(problem))
            elif problem is not None:
                row = failed(row, problem)
            writer.write(row)
            rows.append(row)
            on_row(row)
        problem = None
        _free(bench.device)
    return rows


def _refused(bench: Bench, job: Job, row: Row) -> Row | None:
    """The row of a job that needs no measurement to be known; None: measure it."""
    provider, cell = job.provider, job.cell
    reason = provider.missing_reason(bench.device) or provider.refuses(cell, job.mode)
    if cell.operation == "embedding_graph" and bench.device.type != "cuda":
        reason = reason or "CUDA graphs need a CUDA device"
    if reason is not None:
        return replace(row, status="missing", note=reason)
    full = bench.does_not_fit(cell, job.mode, provider.tables_beside, provider.copies)
    return None if full is None else replace(row, status="oom", note=full)


def _free(device: torch.device) -> None:
    """Give the memory of the last provider back, so that the next finds the same."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
