"""The headline benchmark: a few shapes against every rival within five minutes, kept with its pictures."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .providers import PROVIDERS
from .run import Job
from .shapes import CPU_CELLS, HEADLINE

MODES = ("forward", "backward")
# No measurement begins later, so that all, pictures too, ends within five minutes.
LAST_START_SECONDS = 240.0


def headline_jobs(device: torch.device) -> list[Job]:
    """The headline's jobs on a GPU; on a CPU shapes that it can do, set CPU."""
    cells = HEADLINE if device.type == "cuda" else tuple(("CPU", cell) for cell in CPU_CELLS)
    providers = [
        p for p in PROVIDERS.values() if not p.candidate and p.missing_reason(device) is None
    ]
    return [
        Job(name, cell, mode, provider)
        for name, cell in cells
        for mode in MODES
        for provider in providers
        if mode in provider.modes
    ]


def results_directory(root: Path, header: Mapping[str, Any]) -> Path:
    """root/<device>-<date>-<commit>, with a number behind it where that exists already.

    Args:
        header: as `machine.header` returns it.
    """
    device, commit = (_slug(str(header[name])) for name in ("device", "commit"))
    name = f"{device}-{str(header['date'])[:10]}-{commit}"
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    directories = (root / each for each in itertools.chain([name], numbered))
    return next(directory for directory in directories if not directory.exists())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
