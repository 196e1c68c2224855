"""Which settings of a kernel are tried: those that its fields may have, less what cannot pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from ..backends._cupy import launch as cupy
from ..backends._triton import launch as triton


def candidates(default: Any) -> list[Any]:
    """The default first, then every other one that is worth a measurement."""
    names = list(default.CHOICES)
    made = [
        replace(default, **dict(zip(names, values, strict=True)))
        for values in product(*default.CHOICES.values())
    ]
    fits = SENSIBLE[type(default)]
    # Some are compared by identity.
    return [default] + [one for one in made if asdict(one) != asdict(default) and fits(one)]


def _rows(one: triton.RowsLaunch) -> bool:
    """Two to sixteen words a thread, four to sixteen KiB a program."""
    words = one.BLOCK_N * one.BLOCK_D
    return 2 <= words // (32 * one.num_warps) <= 16 and 512 <= words <= 2048


def _flat(one: triton.FlatLaunch) -> bool:
    """One to eight items a thread, and no program so small that there are too many."""
    return 1 <= one.BLOCK // (32 * one.num_warps) <= 8 and 128 <= one.BLOCK <= 1024


SENSIBLE: dict[type, Callable[[Any], bool]] = {
    triton.RowsLaunch: _rows,
    # Two to sixteen vectors a thread.
    triton.ChunkLaunch: lambda one: 64 <= one.BLOCK <= 512,
    triton.FlatLaunch: _flat,
    # A tile row is as wide as a warp; more than two of them a warp spill.
    triton.Walk: lambda one: one.num_warps <= one.rows <= 2 * one.num_warps,
    # One vector a lane.
    triton.TableLaunch: lambda one: 32 * one.num_warps == one.BLOCK,
    cupy.RowsLaunch: lambda one: 128 <= one.threads[0] * one.threads[1] <= 512,
    cupy.FlatLaunch: lambda one: True,
    cupy.UnrolledLaunch: lambda one: True,
    cupy.WalkLaunch: lambda one: True,
}
