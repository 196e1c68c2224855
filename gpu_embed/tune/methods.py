"""The search for limits between methods: those whose worst case is best.

A rule sees shapes alone. How the ids are spread it cannot see, so a limit is as good as its worst ratio to the fastest
method, over all shapes and spreads that were timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from ..backends._cupy.launch import GatherRule as CupyGatherRule
from ..backends._plan.gradient_method import ATOMIC_DTYPES, LIMITS, Limit, choose
from ..backends._triton.launch import GatherRule as TritonGatherRule
from .clock import Clock
from .search import MIN_GAIN, ROUNDS, Found
from .subject import Subject
from .trials import SKEWS, TRIALS, Input, forced

# Leaves by path: what a rule may be. The default is the first.
Option = dict[str, Any]
DIM = 128


class Cell(NamedTuple):
    """One call, and the seconds that each method takes for it."""

    given: Input
    seconds: dict[str, float]


class Rule(NamedTuple):
    """One choice between methods."""

    name: str
    methods: Sequence[str]
    inputs: Sequence[Input]
    options: Sequence[Option]
    chosen: Callable[[Option, Input], str]  # by an option, for a call
    trial: str  # a name in TRIALS, whose operation is timed


def rules(subject: Subject) -> list[Rule]:
    """One for the gradient of each dtype, one for the gather."""
    return [*(_gradient_rule(subject, dtype) for dtype in ATOMIC_DTYPES), _gather_rule(subject)]


def _gradient_rule(subject: Subject, dtype: torch.dtype) -> Rule:
    name = str(dtype).removeprefix("torch.")
    limits = [
        Limit(most, per_row)
        for most, per_row in product((0, 1024, 4096, 16384), (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 8.0))
    ]
    options = [
        {f"gradient[{method}][{name}]": limit for method, limit in zip(LIMITS, pair, strict=True)}
        for pair in product(limits, [Limit(0, limit) for limit in (0.0, 2.0, 8.0, 32.0, 1e6)])
    ]
    default = {f"gradient[{method}][{name}]": LIMITS[method][dtype] for method in LIMITS}
    inputs = [
        Input(num_indices, num_embeddings, DIM, dtype, skew=skew)
        for num_indices in (1024, 8192, 65_536)
        for num_embeddings in (256, 4096, 65_536)
        for skew in SKEWS
    ]

    def chosen(option: Option, given: Input) -> str:
        with subject.with_methods(option):
            limits = subject.backend._methods[subject.device].gradient
        return choose(given.num_indices, given.num_embeddings, dtype, False, False, limits)

    methods = (*LIMITS, "sorted")
    return Rule(f"gradient, {name}", methods, inputs, [default, *options], chosen, "scatter_add")


def _gather_rule(subject: Subject) -> Rule:
    """Rows whose last tile is not full: of 8-byte words in Triton, of 16-byte words in CUDA C++."""
    words: tuple[int, ...]
    options: list[Option]
    if subject.name == "triton":
        words, columns = (12, 20, 28, 40, 56, 96, 112, 192, 224, 320, 448, 600, 900, 1000), 2
        shares = (0.0, 0.03, 0.125, 0.25, 0.375, 0.5)
        options = [{"gather": TritonGatherRule(share)} for share in shares]
    else:
        words, columns = (33, 65, 129, 257, 385, 513, 769, 1025), 4
        lengths = (1024, 32, 64, 128, 256, 384, 512, 768, 2048)
        options = [{"gather": CupyGatherRule(length)} for length in lengths]
    inputs = [
        Input(16_384, 20_000, columns * row_words, skew=skew)
        for row_words in words
        for skew in SKEWS
    ]

    def chosen(option: Option, given: Input) -> str:
        # Which kernel is launched; nothing runs, and one id of one row is enough.
        one = replace(given, num_indices=1, num_embeddings=1)
        with subject.with_methods(option), subject.seen(dry=True) as launches:
            TRIALS["gather_rows"].operation(subject.backend, one, subject.device)
        return "rows" if launches[0].kernel == "gather_rows_kernel" else "flat"

    return Rule("gather", ("rows", "flat"), inputs, options, chosen, "gather_rows")


def measure(subject: Subject, rule: Rule, given: Input, clock: Clock, repeats: int) -> Cell:
    """All methods of a rule in turns, with nothing in the cache."""
    operation = TRIALS[rule.trial].operation
    calls = [
        partial(_forced, method, partial(operation, subject.backend, given, subject.device))
        for method in rule.methods
    ]
    seconds = clock.times(calls, True, repeats)
    return Cell(given, dict(zip(rule.methods, seconds, strict=True)))


def _forced(method: str, call: Callable[[], object]) -> object:
    with forced(method):
        return call()


def worst_ratio(rule: Rule, option: Option, cells: Sequence[Cell]) -> float:
    """The time of the method that an option chooses, over that of the fastest, at its worst."""
    return max(
        cell.seconds[rule.chosen(option, cell.given)] / min(cell.seconds.values()) for cell in cells
    )


def search_methods(
    subject: Subject, rule: Rule, clock: Clock, advance: Callable[[], None] = lambda: None
) -> dict[str, Found]:
    """The limits to write, by path; none where the defaults' worst case is about as good."""
    rounds: list[list[Cell]] = []
    for repeats in ROUNDS:
        rounds.append([])
        for given in rule.inputs:
            rounds[-1].append(measure(subject, rule, given, clock, repeats))
            advance()
    default = rule.options[0]
    best = min(rule.options, key=lambda option: worst_ratio(rule, option, rounds[0]))
    gains = [worst_ratio(rule, default, cells) / worst_ratio(rule, best, cells) for cells in rounds]
    if min(gains) < MIN_GAIN:
        return {}
    return {path: Found(leaf, gains[-1]) for path, leaf in best.items() if leaf != default[path]}
