"""Find out what a file of vectors is, by what it holds, and read it."""

import gzip
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import DTypeLike

from . import matrix_files
from .binary_file import is_whole, read_binary
from .fasttext_file import MAGIC as FASTTEXT
from .fasttext_file import read_fasttext
from .keyed_vectors_file import read_keyed_vectors
from .reading import GrowingVectors, Settings, warn_of_repeated
from .text_file import BOM, dim_of_text, fields_of, has_a_number, has_numbers, read_text
from .vectors import Vectors, checked_dtype

try:
    from lzma import LZMAError
except ImportError:  # a Python that was built without it
    LZMAError = EOFError  # type: ignore[misc, assignment]

# What is looked at to tell formats apart.
HEAD = 2**16
LONGEST_HEAD = 2**24
FIRST_LINES = 100
# About what gzip makes of text.
GZIP_RATIO = 4
ZIP, GZIP = b"PK\x03\x04", b"\x1f\x8b"
# With its protocol, as text may begin with that byte alone: in cp1252 it is the euro's sign.
PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1))
# RuntimeError: encrypted. NotImplementedError, which is one: packed in another way.
UNPACKING = EOFError, zlib.error, LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError
CONTROL = bytes(set(range(32)) - set(b"\t\r\n"))


def load(
    path: str | os.PathLike[str],
    *,
    words: Sequence[str] | str | os.PathLike[str] | None = None,
    tensor: str | None = None,
    limit: int | None = None,
    dtype: DTypeLike | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    progress: bool | None = None,
) -> Vectors:
    """Read words and their vectors from a file; what it is, is found by its content.

    * GloVe: text, a word and its numbers a line.
    * word2vec and fastText `.vec`: the same below a line with both counts; and word2vec's binary file.
    * fastText `.bin`: a word's vector is the mean of its own row and its n-grams', as in fastText.
    * gensim `.kv`: its matrix is memory-mapped where it is a file of its own.
    * `.npy` and safetensors: a matrix, memory-mapped, whose rows `words` names.

    Text and word2vec's binary file may be packed by gzip, or lie in a zip archive: "glove.6B.zip/glove.6B.100d.txt" is
    one of several files in it.

    Args:
        path: the file.
        words: for a matrix: a list in the order of its rows, or a file with a word a line.
        tensor: for safetensors: which tensor, if there are several.
        limit: read the first so many words; such files have frequent words first.
        dtype: of the matrix: float16, float32 or float64. None: of `.kv`, `.npy` and safetensors the file's own, which
            may be memory-mapped; otherwise float32.
        encoding, errors: of the words, as for `bytes.decode`.
        progress: whether to show a progress bar; None: on a terminal.

    Returns:
        `Vectors`. Of a word that comes twice, in the file or in `words`, the first vector counts, and a warning says
        so. In a `.kv` gensim leaves rows without a word of such words; these are left out, with a warning.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty or cut file, or one of another kind; a line that is no word and its numbers; a header that
            counts more words than there are, or fewer; a word in another encoding; a number that is not finite in
            `dtype`; an argument that is not for this format. The message names the line or the word.
        TypeError: `words` is neither a list nor a path.
    """
    kind = None if dtype is None else checked_dtype(dtype)
    if limit is not None and limit < 0:
        raise ValueError(f"load: limit must not be negative, got {limit}")
    name, settings = os.fspath(path), Settings(limit, kind, encoding, errors)
    try:
        with _opened(name, progress) as (file, size, is_packed):
            head = file.read(HEAD)
            file.seek(0)
            is_safetensors = matrix_files.is_safetensors(head, size)
            is_matrix = is_safetensors or head.startswith(matrix_files.NPY)
            if words is not None and not is_matrix:
                raise ValueError(
                    "words= names the rows of a .npy or safetensors file, and this file has words"
                )
            if tensor is not None and not is_safetensors:
                raise ValueError("tensor= is for a safetensors file")
            if is_packed and (is_matrix or head.startswith((FASTTEXT, *PICKLE))):
                raise ValueError("only text and word2vec's binary file are read packed: unpack it")
            # First, as a safetensors file begins with its header's length, which may be any byte.
            if is_matrix:
                return matrix_files.read_matrix(name, words, tensor, settings)
            if head.startswith(FASTTEXT):
                return _finished(read_fasttext(name, settings))
            if head.startswith(PICKLE):
                return read_keyed_vectors(name, settings)
            return _finished(_read(file, head, size, settings))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except (*UNPACKING, OSError) as error:
        # Of bz2 it is an OSError of no kind.
        is_known = isinstance(error, UNPACKING) or type(error) is OSError
        if not is_known or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(
            f"{name}: it cannot be unpacked, and may have been cut or encrypted: {error}"
        ) from error


def _read(file: BinaryIO, head: bytes, size: int, settings: Settings) -> GrowingVectors:
    """Text, or word2vec's binary file, of about `size` bytes, which begins with `head`."""
    if b"\n" not in head:
        head = file.read(LONGEST_HEAD)
        file.seek(0)
    if head.startswith(BOM):
        head = head[len(BOM) :]
        file.seek(len(BOM))
    if not head.strip():
        raise ValueError("the file is empty")
    first_line, _, body = head.partition(b"\n")
    counts = fields_of(first_line)
    if len(counts) == 2 and counts[0].isdigit() and counts[1].isdigit():
        found = _read_counted(file, int(counts[0]), int(counts[1]), body, size, settings)
    else:
        # The last line may not be whole.
        *lines, last = head.split(b"\n")
        lines = (lines or [last])[:FIRST_LINES]
        dim = dim_of_text(lines)
        if _is_binary(head) and not has_numbers(lines[0], dim):
            raise ValueError(
                f"not a file of vectors that is known here; it begins with {head[:16]!r}"
            )
        if dim == 0:
            raise ValueError("not a file of vectors: its first lines have no word and numbers")
        found = GrowingVectors(dim, settings, size * len(lines) // sum(map(len, lines)) + 1)
        read_text(file, 1, found)
    return found


def _finished(found: GrowingVectors) -> Vectors:
    if found.repeated:
        warn_of_repeated(found.repeated)
    return Vectors(found.words, found.finish())


def _read_counted(
    file: BinaryIO, count: int, dim: int, body: bytes, size: int, settings: Settings
) -> GrowingVectors:
    """A file whose first line has both counts, and below it begins with `body`."""
    file.readline()
    first_line, newline, _ = body.lstrip(b"\r\n").partition(b"\n")
    is_text = has_numbers(first_line, dim) or (
        not _is_binary(body)
        and has_a_number(body.split(b"\n")[:FIRST_LINES])
        # Few numbers of a binary file may all be bytes that text has.
        and (len(fields_of(first_line)) == dim + 1 or not is_whole(body, count, dim))
    )
    # A header may say anything: room is made for no more than the file can hold.
    smallest = 2 * dim + 2 if is_text else 4 * dim + 2
    # A line's end is behind the head where the line is long.
    if dim == 0 or dim > (len(first_line) if is_text and newline else size * GZIP_RATIO):
        raise ValueError(f"the first line says {dim} numbers a word, and there are not so many")
    found = GrowingVectors(dim, settings, min(count, size // smallest))
    if is_text:
        read_text(file, 2, found)
    else:
        read_binary(file, count, found)
    if found.read > count or (found.room != 0 and found.read < count):
        raise ValueError(
            f"the first line counts {count:,} words, but there are {found.read:,}; if the file is whole, correct "
            "that line, or take it away"
        )
    return found


def _is_binary(body: bytes) -> bool:
    """Whether it holds bytes that text seldom does: control characters."""
    return len(body.translate(None, CONTROL)) < len(body)


@contextmanager
def _opened(name: str, progress: bool | None) -> Iterator[tuple[Any, int, bool]]:
    """A file to read and to seek back in, about how many bytes it has, and whether it is packed."""
    archive, member = _split(name)
    with open(archive, "rb") as raw, _progress_bar(archive, progress) as watched:
        start = raw.read(16)
        raw.seek(0)
        size = os.path.getsize(archive)
        if start.startswith(ZIP):
            with zipfile.ZipFile(raw) as files, files.open(_member(files, member)) as packed:
                size = files.getinfo(packed.name).file_size
                yield watched(packed, size), size, True
        elif start.startswith(GZIP) and not matrix_files.is_safetensors(start, size):
            with gzip.open(watched(raw, size)) as unpacked:
                yield unpacked, size * GZIP_RATIO, True
        else:
            yield watched(raw, size), size, False


def _split(name: str) -> tuple[str, str]:
    """The path of a file, and of a file in an archive its name there."""
    path = Path(name)
    for parent in path.parents:
        if zipfile.is_zipfile(parent):
            return str(parent), path.relative_to(parent).as_posix()
    return name, ""


def _member(files: zipfile.ZipFile, member: str) -> str:
    names = [one.filename for one in files.infolist() if not one.is_dir()]
    if member:
        if member in names:
            return member
        raise FileNotFoundError(f"{files.filename} has no {member!r}; it has {', '.join(names)}")
    if any(one.endswith("data.pkl") for one in names):
        raise ValueError("this is a file of torch: take torch.load and Vectors(words, matrix)")
    if len(names) == 1:
        return names[0]
    if not names:
        raise ValueError("the archive has no files")
    raise ValueError(
        f"the archive has {len(names)} files, {', '.join(names)}: add the name of one to the path, as in "
        f"{os.path.join(str(files.filename), names[0])!r}"
    )


@contextmanager
def _progress_bar(name: str, shown: bool | None) -> Iterator[Callable[[Any, int], Any]]:
    """What gives a file that moves the bar as it is read; the bar of bytes is on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    disabled = not (console.is_terminal if shown is None else shown)
    with Progress(*columns, console=console, disable=disabled, transient=True) as bar:
        yield lambda file, size: bar.wrap_file(file, size, description=Path(name).name)
