"""How a time grows with one size of its shape: the exponent of a power law."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compare import noise_of, time_of
from .results import Key, Row

# The sizes that a time may grow with: columns, and the letters that stand for them.
SIZES = {"vocab": "V", "num_ids": "N"}
FEWEST_POINTS = 3
# The sizes of a fit differ by this factor at the least.
LEAST_SPAN = 10
FIT_MEANS = (
    "V^e, N^e: least squares of log time over log V (rows of the table) or log N (ids), "
    "and the standard error of e"
)


@dataclass(frozen=True)
class Growth:
    """A provider's time in proportion to size ** exponent, over the shapes that differ in that size alone."""

    key: Key  # of these shapes; 0 in place of the size
    column: str  # of SIZES
    sizes: Sequence[int]
    exponent: float
    error: float  # standard error of the exponent

    def __str__(self) -> str:
        return f"{SIZES[self.column]}^{self.exponent:.2f} ± {self.error:.2f}"


def growths(rows: Iterable[Row]) -> list[Growth]:
    """Of each provider, mode and shape that was timed at enough sizes; noisy times take no part."""
    timed = [row for row in rows if time_of(row) and not noise_of(row)]
    found = []
    for column in SIZES:
        shapes: dict[Key, dict[int, float]] = {}
        for row in timed:
            blank: dict[str, Any] = {column: 0}
            times = shapes.setdefault(row.key._replace(**blank), {})
            times[getattr(row, column)] = time_of(row) or 0.0
        for key, times in shapes.items():
            if len(times) >= FEWEST_POINTS and max(times) >= LEAST_SPAN * min(times):
                found.append(Growth(key, column, sorted(times), *fit(times)))
    return found


def fit(times: dict[int, float]) -> tuple[float, float]:
    """The exponent of times by size, three or more, and its standard error."""
    sizes, values = np.log(np.array(list(times.items())).T)
    (exponent, _), covariance = np.polyfit(sizes, values, 1, cov=True)
    return float(exponent), float(np.sqrt(covariance[0, 0]))
