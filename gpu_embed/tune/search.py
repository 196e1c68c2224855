"""The search for a kernel's settings: right first, then faster than the default in every measurement."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .candidates import candidates
from .clock import Clock
from .subject import Subject
from .trials import Input, gate_inputs, timed_inputs, trial_of

# Settings are taken if they gain at least this at every size, in each round, ...
MIN_GAIN = 1.03
# ... and lose no more than this anywhere, cold or warm.
MAX_LOSS = 0.98
# Repeats of a measurement in each round; the second is for what has passed the first.
ROUNDS = (5, 15)


class Gain(NamedTuple):
    """The default's time over a candidate's, for one input."""

    cold: float
    warm: float

    @property
    def mean(self) -> float:
        return (self.cold * self.warm) ** 0.5


class Found(NamedTuple):
    """What a file will hold of a kernel or a method."""

    settings: Any
    gain: float


class Gate:
    """Whether settings of one kernel give the right bits."""

    def __init__(self, subject: Subject, path: str) -> None:
        self._subject = subject
        self._path = path
        # On a card each program's neighbours are to be there too.
        inputs = gate_inputs(subject.name, path, small=subject.device.type != "cuda")
        self._expected = [(given, self._right(given)) for given in inputs]

    def _right(self, given: Input) -> list[Tensor]:
        """By the reference; for fractions by the default, as the order of additions is to be its own."""
        if given.exact:
            trial, cpu = trial_of(self._path), torch.device("cpu")
            return list(trial.operation(backends.load("reference"), given, cpu))
        return [result.cpu() for result in self._subject.run(self._path, given).results]

    def refusal(self, settings: Any) -> str | None:
        """Why these settings are out; None: each result has the right bits."""
        try:
            with self._subject.with_launch(self._path, settings):
                for given, expected in self._expected:
                    run = self._subject.run(self._path, given)
                    if not run.launches:
                        return f"{self._path} was not launched"
                    if not all(map(same_bits, run.results, expected)):
                        return f"wrong bits for {given}"
        except Exception as error:  # too many registers or threads, or whatever a launch raises
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return None


def same_bits(one: Tensor, other: Tensor) -> bool:
    one = one.cpu()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(words), other.contiguous().view(words))


def gains(subject: Subject, path: str, settings: Any, clock: Clock, repeats: int) -> list[Gain]:
    """Of settings over the default, in turns with it, for each timed input."""
    found = []
    for given in timed_inputs(subject.name, path):
        default = subject.run(path, given)
        with subject.with_launch(path, settings):
            tried = subject.run(path, given)
        calls = [partial(subject.repeat, run) for run in (default, tried)]
        cold, warm = (
            before / after
            for before, after in (clock.times(calls, is_cold, repeats) for is_cold in (True, False))
        )
        found.append(Gain(cold, warm))
    return found


def is_accepted(found: list[Gain]) -> bool:
    return all(gain.mean >= MIN_GAIN and min(gain) >= MAX_LOSS for gain in found)


def search(
    subject: Subject,
    path: str,
    clock: Clock,
    tried: list[Any],
    advance: Callable[[], None] = lambda: None,
) -> tuple[Found | None, dict[Any, str]]:
    """The best settings of a kernel, None if that is the default; and why others were refused.

    Args:
        tried: the candidates, without the default.
        advance: called after each.
    """
    gate = Gate(subject, path)
    refused, passed = {}, []
    for settings in tried:
        reason = gate.refusal(settings)
        if reason is not None:
            refused[settings] = reason
        elif is_accepted(gains(subject, path, settings, clock, ROUNDS[0])):
            passed.append(settings)
        advance()
    best = None
    for settings in passed:
        again = gains(subject, path, settings, clock, ROUNDS[1])
        gain = prod(gain.mean for gain in again) ** (1 / len(again))
        if is_accepted(again) and (best is None or gain > best.gain):
            best = Found(settings, gain)
    return best, refused


def paths(subject: Subject) -> dict[str, list[Any]]:
    """Each kernel's candidates without the default, by path."""
    return {path: candidates(default)[1:] for path, default in subject.leaves().items()}
