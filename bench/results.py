"""What a run leaves behind: results.csv, one row a measurement, and header.json beside it."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = "results.csv"
HEADER = "header.json"
HOST_TIME = "host_time.csv"  # beside them, where it was measured
# wrong: the result differs from the reference, so there is no time; oom: it does not fit in memory.
STATUSES = ("ok", "wrong", "missing", "error", "oom")


@dataclass(frozen=True)
class Row:
    """One provider on one cell. The fields are the CSV's columns, in this order; None is an empty field."""

    set: str
    operation: str  # as in `Cell`
    mode: str  # forward | backward | full | accumulate | accumulate_fp32 | step | step_adam | step_rowwise_adagrad
    dtype: str  # "float32", "bfloat16", ...: torch's names
    id_dtype: str
    tables: int  # looked up in one call
    vocab: int  # V, rows of a table
    dim: int  # D, columns
    num_ids: int  # N, in all tables
    hotness: int  # ids in a bag; 1 without bags
    distribution: str  # uniform | zipf:1.05 | equal | sorted | text | hot:0.5 | ...
    unique_ids: int | None  # rows that the first of the rotated id sets reads
    padding: float  # share of the ids that are padding_idx
    provider: str
    status: str  # one of STATUSES
    ms_p20: float | None = None  # warm L2
    ms_p50: float | None = None
    ms_p80: float | None = None
    cold_ms_p50: float | None = None  # L2 flushed before each call
    # What of a dense gradient is no sum, on its own: filling it with zeros, and rounding one of fp32 to 16 bits.
    # The times above hold what a provider does of it.
    zero_fill_ms: float | None = None
    cast_ms: float | None = None
    # Both from ms_p50; see byte_floor.py for the byte formulas.
    gbps_dram: float | None = None
    gbps_logical: float | None = None
    percent_of_copy: float | None = None  # gbps_dram in % of the copy bandwidth of the same run
    host_us: float | None = None  # the host's own time per call, on a tiny input
    match: str = ""  # "exact", "error 0.12 of the fp32 bound", or what is wrong
    # Memory beyond inputs and results at the peak of a call; not of steps, and on a CPU of accumulate alone.
    peak_extra_bytes: int | None = None
    # Memory at the peak of a step: table, optimizer's state, gradient, output and whatever comes and goes.
    step_peak_bytes: int | None = None
    # Processes that wanted to run, for each of the machine's cores: the mean of the minute before. Above 1 they waited.
    load: float | None = None
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    note: str = ""  # the message of an error, the bytes that did not fit, why a provider is missing

    @property
    def key(self) -> Key:
        """What `--resume` and comparisons know a measurement by."""
        return Key(*(getattr(self, name) for name in Key._fields))


class Key(NamedTuple):
    """The columns that say what was measured, by whom."""

    set: str
    operation: str
    mode: str
    dtype: str
    id_dtype: str
    tables: int
    vocab: int
    dim: int
    num_ids: int
    hotness: int
    distribution: str
    padding: float
    provider: str


COLUMNS = tuple(field.name for field in fields(Row))
# What a file may lack: an older one has fewer columns.
OPTIONAL = {field.name: field.default for field in fields(Row) if field.default is not MISSING}
# The annotations as they stand above: "int", "float | None", ...
TYPES = {field.name: str(field.type) for field in fields(Row)}


class ResultsError(ValueError):
    """A results file that cannot be read, said in one sentence."""


class NotWrittenError(ResultsError):
    """A row could not be written, as when the disk is full; the rows before it are whole."""


class RowWriter(AbstractContextManager["RowWriter"]):
    """Appends rows to DIR/results.csv; each is on disk before the next is measured.

    Use it in a `with` block.
    """

    def __init__(self, directory: Path, resume: bool = False) -> None:
        """Open the file anew, or with `resume` behind the rows that it holds.

        Raises ResultsError if there are results already and `resume` is not set, or they are no results.
        """
        path = directory / RESULTS
        lines = _whole_lines(path.read_bytes()) if path.exists() else b""
        self.done = {row.key for row in _parsed(lines, path)} if lines else set()
        if self.done and not resume:
            raise ResultsError(
                f"{path} exists already; use --resume to add what it lacks, or another --out"
            )
        columns = next(csv.reader([lines.decode("utf-8-sig").partition("\n")[0]]))
        if self.done and tuple(columns) != COLUMNS:
            raise ResultsError(f"{path} has the columns of another version; choose another --out")
        directory.mkdir(parents=True, exist_ok=True)
        # A run that ended before its first row left nothing to keep.
        self._path = path
        # Without a buffer, which would be written once more at the end.
        self._file = path.open("r+b" if self.done else "wb", buffering=0)
        self._end = self._file.seek(len(lines) if self.done else 0)
        self._file.truncate()
        if not self.done:
            self._write(COLUMNS)

    def write(self, row: Row) -> None:
        """Append one row. Raises NotWrittenError, and leaves no part of it."""
        self._write([_text(getattr(row, name)) for name in COLUMNS])
        self.done.add(row.key)

    def _write(self, values: Sequence[str]) -> None:
        text = io.StringIO()
        csv.writer(text).writerow(values)
        line = memoryview(text.getvalue().encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.seek(self._end)
            self._file.truncate()
            raise NotWrittenError(f"{self._path}: {error.strerror or error}") from None
        self._end = self._file.tell()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a results.csv, or of the one in a directory; a cut last line is left out, with a warning.

    Raises ResultsError if there is none or it cannot be understood.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ResultsError(f"{file}: {error.strerror or error}") from None
    try:
        return _parsed(data, file)
    except ResultsError:
        # A killed run may leave half a line at the end.
        if data.endswith(b"\n") or not (whole := _whole_lines(data)):
            raise
        rows = _parsed(whole, file)
        warn(
            f"{file}: the last line is cut, so its row is left out; the run's command with --resume "
            "measures it again"
        )
        return rows


def check_writable(directory: Path, instead: str = "choose another --out") -> None:
    """Make the directory and try to write there, before anything is measured. Raises ResultsError."""
    probe = directory / f".{os.getpid()}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResultsError(
            f"{directory}: cannot write there ({error.strerror or error}); {instead}"
        ) from None


def check_file_writable(file: Path) -> None:
    """The same for one file."""
    if file.is_dir():
        raise ResultsError(f"{file} is a folder: name a file in --out")
    check_writable(file.parent)


def rows_to_show(directory: Path) -> list[Row]:
    """The rows of a directory. Raises ResultsError if there is none, which would make an empty page."""
    rows = read_rows(directory)
    if not rows:
        raise ResultsError(
            f"{directory / RESULTS} holds no row, as the run ended before its first: measure again with `run`"
        )
    return rows


def write_header(directory: Path, header: Mapping[str, Any]) -> None:
    """Write DIR/header.json."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / HEADER, (json.dumps(header, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the path and move there, so that no half file is ever seen."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_header(directory: Path) -> dict[str, Any]:
    """DIR/header.json; of a file, the one beside it. Raises ResultsError if it is missing or broken."""
    path = (directory if directory.is_dir() else directory.parent) / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ResultsError(f"{path}: no JSON file ({error})") from None
    if not isinstance(header, dict):
        raise ResultsError(f"{path}: expected an object")
    return header


def header_or_empty(directory: Path) -> dict[str, Any]:
    """The same, but an empty one and a warning where there is none to read: the rows name the machine too."""
    try:
        return read_header(directory)
    except ResultsError as problem:
        warn(
            f"{problem}; what follows says what the rows say. Delete what is left of it, and the run's command "
            "with --resume writes it anew"
        )
        return {}


def complete_header(header: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The header with what it lacks read off the rows, and a word on a commit that was not clean."""
    known = dict(header)
    for name in ("device", "torch", "triton", "commit"):
        if not known.get(name):
            values = sorted({getattr(row, name) for row in rows} - {""})
            known[name] = " + ".join(values) or "unknown"
    if known.pop("dirty", False):
        known["commit"] += " with uncommitted changes"
    return known


def warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)


def _whole_lines(data: bytes) -> bytes:
    """Without a last line whose end was never written."""
    return data[: data.rfind(b"\n") + 1]


def _parsed(data: bytes, file: Path) -> list[Row]:
    try:
        # A spreadsheet writes a byte order mark.
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        columns = next(reader, [])
        _check_columns(columns, file)
        return [
            _row(columns, values, f"{file}, line {reader.line_num}") for values in reader if values
        ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ResultsError(f"{file}: no CSV file ({error})") from None


def _check_columns(columns: Sequence[str], file: Path) -> None:
    """An unknown column may say what was measured, so it is not passed over."""
    if not set(columns) & set(COLUMNS):
        raise ResultsError(
            f"{file}: the first line does not name the benchmark's columns; measure again into another --out"
        )
    for what, names in (
        ("lacks", [name for name in COLUMNS if name not in columns and name not in OPTIONAL]),
        ("has an unknown", [name for name in columns if name not in COLUMNS]),
        ("repeats", [name for name in COLUMNS if list(columns).count(name) > 1]),
    ):
        if names:
            raise ResultsError(
                f"{file}: the first line {what} column {names[0]!r}: it is cut, or of another version; "
                "measure again into another --out"
            )


def _row(columns: Sequence[str], values: Sequence[str], place: str) -> Row:
    if len(values) != len(columns):
        raise ResultsError(
            f"{place}: {len(values)} fields where {len(columns)} are expected; "
            "delete the line, and the run's command with --resume measures its row again"
        )
    parsed: dict[str, Any] = {}
    for name, text in zip(columns, values, strict=True):
        try:
            parsed[name] = _value(name, text)
        except ValueError:
            raise ResultsError(f"{place}: {name} is {text!r}") from None
    if parsed["status"] not in STATUSES:
        raise ResultsError(f"{place}: status is {parsed['status']!r}")
    return Row(**parsed)


def _value(name: str, text: str) -> Any:
    """Raises ValueError for what is no number of the column's kind."""
    kind, _, optional = TYPES[name].partition(" | ")
    if kind == "str":
        return text
    if optional and not text:
        return None
    number = int(text) if kind == "int" else float(text)
    # A needed integer is a size.
    if not 0 <= number < math.inf or (TYPES[name] == "int" and number == 0):
        raise ValueError
    return number


def _text(value: object) -> str:
    if value is None:
        return ""
    # Six digits are more than a clock tells, and keep the file readable.
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("\n", " ")
