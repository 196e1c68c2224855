"""What the benchmark says goes through here: tables, lines, and the bar with the time left."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

# What a table needs; a narrower terminal wraps its lines, and shows all of it.
TABLE_WIDTH = 120
# Where the output is a file and has no width of its own.
FILE_WIDTH = 160


def make_console(stderr: bool = False) -> Console:
    """rich's console, which leaves brackets, numbers and colons as they are."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=stderr)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def make_table(title: str, *columns: str, **options: Any) -> Table:
    """rich's table; a column of numbers is named with a ">" before it, and stands at the right."""
    from rich.table import Column, Table

    heads = [
        Column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
        for name in columns
    ]
    return Table(*heads, title=title, title_justify="left", **options)


def print_table(console: Console, table: Table) -> None:
    """On a narrow terminal as wide as it needs to be."""
    if console.width >= TABLE_WIDTH:
        console.print(table)
        return
    wide = make_console()
    wide.width = TABLE_WIDTH
    with wide.capture() as captured:
        wide.print(table)
    console.out(captured.get(), end="", highlight=False)


def progress_bar(console: Console) -> Progress:
    """The bar with the time left; it stays out of pipes and files."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def replace_what_cannot_be_shown() -> None:
    """A question mark for each character that the terminal's encoding lacks, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
