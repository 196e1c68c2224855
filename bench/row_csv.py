"""Tables of rows as CSV: a dataclass whose fields are the columns, in their order."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from .results import ResultsError

Row = TypeVar("Row")
# By the annotation of a field, where annotations are kept as text.
PARSERS = {"str": str, "int": int, "float": float}


def columns(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def write(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns(kind))
        writer.writerows(astuple(row) for row in rows)  # type: ignore[call-overload]


def read(path: Path, kind: type[Row], other_columns: str) -> list[Row]:
    """Raises ResultsError where the file is no such table; `other_columns` says so, and what to do."""
    parsers = {field.name: PARSERS[str(field.type)] for field in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            if tuple(reader.fieldnames or ()) != columns(kind):
                raise ResultsError(f"{path}: {other_columns}")
            # A cell too many has no name, and no field takes it.
            return [
                kind(**{name: parsers.get(name, str)(text) for name, text in line.items()})
                for line in reader
            ]
        except (TypeError, ValueError, csv.Error) as problem:
            raise ResultsError(f"{path}, line {reader.line_num}: {problem}") from None
