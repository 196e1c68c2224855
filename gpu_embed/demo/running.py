"""What the demo and the examples share: the backend in words, a clean end, files, checkpoints, checks."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    has one; a CannotRunError with code 2 and its message; an OSError about a file with code 2 and what it says;
    a reader of its output that has left, such as head, with code 1.
    """
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted, {str(interrupt) or left}", file=sys.stderr)
        sys.exit(130)
    except CannotRunError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output, such as head, has left; on the way out Python would flush it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as problem:
        if problem.filename is None:
            raise
        print(f"error: {problem.filename}: {problem.strerror}", file=sys.stderr)
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


def read_checkpoint(path: Path, *names: str) -> dict[str, Any]:
    """Read a dict that torch.save wrote, with these names in it, to the CPU.

    Raises CannotRunError if the file is not there, or is no such dict.
    """
    if not path.is_file():
        raise CannotRunError(f"--resume: there is no checkpoint {path}")
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not saved.keys() >= set(names):
            raise KeyError(names)
    # A damaged file may raise anything.
    except Exception:
        raise CannotRunError(
            f"--resume: {path} is damaged, or no checkpoint of this program; start anew without --resume"
        ) from None
    return saved


def part_file(out: Path) -> Path:
    """Name a file beside ``out`` that no other process writes."""
    return out.with_name(f".{out.stem}.{os.getpid()}.part")
