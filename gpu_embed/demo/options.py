"""The options that the demo and the examples share, each checked before anything starts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from .running import part_file

SEEDS = 2**32  # NumPy takes no more


def example_parser(
    doc: str | None,
    quick: str,
    *,
    picture: str | None = None,
    seed: bool = False,
    device: bool = True,
) -> argparse.ArgumentParser:
    """Make the parser of a program whose docstring is ``doc``.

    It has ``--quick``, with ``quick`` as its help; where they are asked for, ``--out`` (a Path; by
    default the file name ``picture``), ``--seed`` (an int) and ``--device`` (a `torch.device`). What
    cannot work ends the program with argparse's error and code 2, before anything has started.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    # argparse checks a default like what is typed, if it is a string.
    if picture is not None:
        parser.add_argument(
            "--out", type=out_file, default=picture, help="the picture (default: %(default)s)"
        )
    if seed:
        parser.add_argument(
            "--seed", type=seed_number, default=0, help="for all that is random (default: 0)"
        )
    if device:
        parser.add_argument(
            "--device",
            type=usable_device,
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="such as cpu or cuda:1 (default: cuda if there is one, else cpu)",
        )
    return parser


def positive(text: str) -> int:
    """Read a count that is at least 1; for argparse's ``type=``."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few, choose 1 or more")
    return number


def seed_number(text: str) -> int:
    """Read a seed that every generator takes; for argparse's ``type=``."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < SEEDS:
        raise argparse.ArgumentTypeError(f"{text}: choose a number from 0 to 2**32 - 1")
    return number


def readable_file(text: str) -> Path:
    """Read the name of a file that is there; for argparse's ``type=``."""
    if not os.access(text, os.R_OK) or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no file of this name that can be read")
    return Path(text)


def out_file(text: str) -> Path:
    """Read the name of a picture that can be written; for argparse's ``type=``."""
    out = Path(text)
    if out.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(
            f"{out}: the picture is a PNG, choose a name that ends in .png"
        )
    return writable_file(text)


def writable_file(text: str) -> Path:
    """Read the name of a file that can be written; for argparse's ``type=``."""
    out = Path(text)
    try:
        if not out.parent.is_dir():
            raise argparse.ArgumentTypeError(
                f"{out}: there is no folder {out.parent}, make it or choose another"
            )
        if out.is_dir():
            raise argparse.ArgumentTypeError(f"{out}: this is a folder, name a file in it")
        if out.exists() and not out.is_file():
            # It would be replaced: as root, also /dev/null.
            raise argparse.ArgumentTypeError(f"{out}: this is no ordinary file, name another")
        probe = part_file(out)
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise argparse.ArgumentTypeError(
            f"{out}: cannot write there ({problem.strerror}), choose another folder or name"
        ) from None
    return out


def writable_folder(text: str) -> Path:
    """Read the name of a folder that files can be written into, or that can be made; for argparse's ``type=``."""
    folder = Path(text)
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        problem = "" if nearest.is_dir() else f"{nearest} is a file"
        if not problem and not os.access(nearest, os.W_OK):
            problem = f"{nearest} cannot be written"
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise argparse.ArgumentTypeError(f"{folder}: {problem}, choose another folder")
    return folder


def usable_device(text: str) -> torch.device:
    """Read a device that works here; for argparse's ``type=``.

    "cuda" is the first card, and under torchrun that of the process's own number.
    """
    name = text
    if text == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cards = torch.cuda.device_count()
        if processes > max(cards, 1):
            raise argparse.ArgumentTypeError(
                f"each of {processes} processes needs a GPU of its own, and there are {cards}: "
                "choose --device cpu, or another --nproc-per-node"
            )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # A torch built without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text}: {reason}; --device cpu always works") from None
    return device
