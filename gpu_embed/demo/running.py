"""What the demo and the examples share: the backend in words, a clean end, files in one piece, checks."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import gpu_embed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


class CannotRunError(Exception):
    """Something that the user must change before the demo can start."""


class Checks:
    """Print each claim with its outcome, and remember whether all held."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.all_held = True

    def __call__(self, claim: str, holds: bool) -> None:
        self.all_held &= holds
        self.console.print(
            f"{'ok' if holds else 'FAILED':6}  {claim}", style="green" if holds else "red"
        )


def describe_backend(device: torch.device | str | None = None) -> str:
    """Which backend serves a device (None: cuda if there is one); on a CPU also what cannot be seen there."""
    said = f"backend: {gpu_embed.backends.explain(device)}"
    if not said.startswith("backend: torch serves cpu"):
        return said
    return f"{said}\nOn a CPU torch's own operators run: only a CUDA device shows gpu_embed's kernels and their speed."


def end_on_ctrl_c(main: Callable[[], None], left: str = "no picture was written") -> None:
    """Run a program's `main`; what ends it early becomes one line.

    Ctrl-C ends it with code 130 and a line that says what is `left`, or the message of the KeyboardInterrupt, if it
    has one; a CannotRunError with code 2 and its message.
    """
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted, {str(interrupt) or left}", file=sys.stderr)
        sys.exit(130)
    except CannotRunError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def hold_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C is only noted, and the function that it gives says whether it came.

    So a training ends between two steps, where a checkpoint can be written. On the way out Ctrl-C takes effect, if
    nothing else was raised.
    """
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
    if noted:
        raise KeyboardInterrupt


def save_figure(figure: Figure, out: Path) -> None:
    """Draw into ``out``, in one piece."""
    write_whole(out, lambda part: figure.savefig(part, format=out.suffix[1:] or "png"))


def write_whole(out: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``out``, and move it there, so that no half a file is ever seen."""
    part = part_file(out)
    try:
        write(part)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def part_file(out: Path) -> Path:
    """Name a file beside ``out`` that no other process writes."""
    return out.with_name(f".{out.stem}.{os.getpid()}.part")
