"""Vectors in text: a word and its numbers a line, as GloVe and, below a line with both counts, word2vec and fastText.

Lines end in "\\n" or "\\r\\n". Only ASCII spaces and tabs part the fields, so a word may hold any other character; and
as the numbers are the last fields, spaces too.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import csv

from .reading import GrowingVectors

CHUNK = 2**22
# Lines that Arrow does not take are halved down to so many, which Python reads.
FEW_LINES = 16
BOM = b"\xef\xbb\xbf"
FIELD = re.compile(rb"[^ \t]+")
WHOLE = re.compile(rb"[+-]?\d+")
NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)


def read_text(file: BinaryIO, first_line: int, found: GrowingVectors) -> None:
    """Read a word from each line of the rest of a file, the first of which is line `first_line` from 1.

    Raises ValueError, with the line, for one that is no word and `found.dim` numbers.
    """
    line = first_line
    for lines in _chunks(file):
        _read(lines, line, found)
        line += lines.count(b"\n")
        if found.room == 0:
            return


def fields_of(line: bytes) -> list[bytes]:
    """What spaces and tabs part in a line."""
    return FIELD.findall(line.removesuffix(b"\r"))


def dim_of_text(lines: list[bytes]) -> int:
    """How many numbers a line has, by most of some lines, as a word may hold spaces; 0: none.

    Of equally many the fewest, as of a file of two lines.
    """
    counts = sorted(len(fields_of(line)) - 1 for line in lines if line.strip())
    return max(counts, key=counts.count, default=0)


def has_numbers(line: bytes, dim: int) -> bool:
    """Whether a line is a word and so many numbers."""
    fields = fields_of(line)
    return 0 < dim < len(fields) and all(map(NUMBER.fullmatch, fields[-dim:]))


def has_a_number(lines: list[bytes]) -> bool:
    """Whether any of some lines has a number behind its first field."""
    return any(NUMBER.fullmatch(field) for line in lines for field in fields_of(line)[1:])


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    """The file in pieces of whole lines."""
    rest = b""
    while block := file.read(CHUNK):
        lines, newline, rest_of_block = block.rpartition(b"\n")
        if newline:
            yield rest + lines + newline
            rest = b""
        rest += rest_of_block
        if len(rest) > 2 * CHUNK:
            raise ValueError(f"not a file of vectors: a line is longer than {len(rest):,} bytes")
    if rest:
        yield rest + b"\n"


def _read(lines: bytes, first_line: int, found: GrowingVectors) -> None:
    """By Arrow, and what that does not take by halves, and in the end line by line."""
    for tried in _as_arrow_takes_them(lines):
        try:
            found.add(*_by_arrow(tried, found))
            return
        except pa.ArrowInvalid:
            continue
    if lines.count(b"\n") <= FEW_LINES:
        found.add(*_line_by_line(lines, first_line, found))
        return
    middle = lines.index(b"\n", len(lines) // 2) + 1
    middle = middle if middle < len(lines) else lines.rindex(b"\n", 0, -1) + 1
    _read(lines[:middle], first_line, found)
    _read(lines[middle:], first_line + lines.count(b"\n", 0, middle), found)


def _as_arrow_takes_them(lines: bytes) -> Iterator[bytes]:
    """Lines without what may stand before their ends; and then with one space for several spaces and tabs.

    A line of these that is `dim` + 1 fields has no space in its word.
    """
    # As they end under Windows; and as word2vec writes them.
    lines = lines.replace(b"\r\n", b"\n")
    while b" \n" in lines or b"\t\n" in lines:
        lines = lines.replace(b" \n", b"\n").replace(b"\t\n", b"\n")
    yield lines
    if b"\t" in lines or b"  " in lines:
        lines = lines.replace(b"\t", b" ")
        while b"  " in lines:
            lines = lines.replace(b"  ", b" ")
        yield lines


def _by_arrow(lines: bytes, found: GrowingVectors) -> tuple[list[bytes], np.ndarray]:
    """Raises pyarrow.ArrowInvalid for lines that are not `dim` + 1 fields with one delimiter between them."""
    if b"\r" in lines or lines.startswith(BOM):
        # To Arrow the one ends a line, and the other is no part of a word.
        raise pa.ArrowInvalid
    delimiter = b"\t" if b"\t" in lines[: lines.index(b"\n")] else b" "
    names = [str(column) for column in range(found.dim)]
    table = csv.read_csv(
        pa.py_buffer(lines),
        csv.ReadOptions(column_names=["word", *names]),
        csv.ParseOptions(
            delimiter=delimiter.decode(),
            quote_char=False,
            double_quote=False,
            ignore_empty_lines=False,
        ),
        csv.ConvertOptions(
            null_values=[],
            column_types={"word": pa.binary()} | dict.fromkeys(names, _number_type(found)),
        ),
    )
    words = table.column(0).to_pylist()
    # Nor does a word begin or end with a space where tabs part the fields; a tab in it may be one before numbers.
    if not all(words) or any(word != word.strip(b" \t") or b"\t" in word for word in words):
        raise pa.ArrowInvalid
    rows = np.empty((found.dim, len(words)), _number_type(found).to_pandas_dtype())
    for number in range(found.dim):
        rows[number] = table.column(1 + number).to_numpy()
    return words, rows.T


def _line_by_line(
    lines: bytes, first_line: int, found: GrowingVectors
) -> tuple[list[bytes], np.ndarray]:
    words: list[bytes] = []
    numbers: list[str] = []
    for number, line in enumerate(lines[:-1].split(b"\n"), first_line):
        if len(words) == found.room:
            break
        line = line.removesuffix(b"\r").rstrip(b" \t")
        if not line:
            continue
        if b"\r" in line:
            raise ValueError(
                f"line {number} holds a carriage return, which ends no line without a newline"
            )
        fields = list(FIELD.finditer(line))
        if len(fields) <= found.dim or line[:1] in b" \t":
            raise ValueError(
                f"line {number} has {len(fields)} fields, but needs a word and {found.dim} numbers: "
                f"{line[:60].decode('utf-8', 'replace')!r}"
            )
        of_word, of_numbers = fields[: -found.dim], [field[0] for field in fields[-found.dim :]]
        word = line[: of_word[-1].end()]
        where = f"line {number}, of the word {word[:60].decode('utf-8', 'replace')!r},"
        for field in of_numbers:
            if not NUMBER.fullmatch(field):
                raise ValueError(f"{where} has {field.decode('utf-8', 'replace')!r} for a number")
        # Where tabs part the numbers, a space does not; else a word may be "route 66" if no number is whole as that is.
        last, behind = of_word[-1][0], fields[-found.dim - 1 :]
        parted_by_tabs = b"\t" not in word and all(
            line[one.end() : other.start()].strip(b" ") == b"\t" for one, other in pairwise(behind)
        )
        may_end_so = last.isdigit() and not any(map(WHOLE.fullmatch, of_numbers))
        if len(of_word) > 1 and NUMBER.fullmatch(last) and not (parted_by_tabs or may_end_so):
            raise ValueError(
                f"{where} has more than {found.dim} numbers, or the word ends in a number"
            )
        words.append(word)
        # Arrow knows no plus.
        numbers += [field.decode().removeprefix("+") for field in of_numbers]
    # By the same code as above: Python's numbers are rounded twice.
    rows = pa.array(numbers, pa.string()).cast(_number_type(found)).to_numpy()
    return words, rows.reshape(-1, found.dim)


def _number_type(found: GrowingVectors) -> pa.DataType:
    return pa.float64() if found.dtype == np.float64 else pa.float32()
