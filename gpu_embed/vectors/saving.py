"""Write vectors to files of word2vec and gensim."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from .binary_file import LONGEST_WORD
from .reading import check_finite

if TYPE_CHECKING:
    from .vectors import Vectors

# Words whose numbers are formatted at once.
BLOCK = 2**14
SPACE = re.compile(r"[ \t\r\n\v\f\0]")


def save(vectors: Vectors, path: str) -> None:
    """By the name's end; a file that is there is replaced when the new one is whole."""
    suffix = Path(path).suffix
    if suffix not in (".txt", ".vec", ".bin", ".kv"):
        raise ValueError(
            f"{path}: the name must end in .txt, .vec, .bin or .kv, which says the format"
        )
    if vectors.dim == 0 and suffix != ".kv":
        raise ValueError(f"{path}: words without numbers cannot be said in this format")
    for word in vectors.words:
        if suffix != ".kv" and (not word or SPACE.search(word)):
            raise ValueError(
                f"{path}: the word {word!r} is empty or holds a space, and in this format a space ends a word: "
                "save as .kv"
            )
        try:
            length = len(word.encode())
        except UnicodeEncodeError:
            raise ValueError(f"{path}: the word {word!r} holds half of a character") from None
        if suffix == ".bin" and length >= LONGEST_WORD:
            raise ValueError(
                f"{path}: the word {word[:60]!r}... has {length:,} bytes, and in this format one has fewer than "
                f"{LONGEST_WORD:,}: save as .txt or .kv"
            )
    stored = np.dtype(np.float32) if suffix == ".bin" else vectors.matrix.dtype
    for start in range(0, len(vectors), BLOCK):
        rows = vectors.matrix[start : start + BLOCK]
        with np.errstate(over="ignore"):
            check_finite(
                rows.astype(stored, copy=False), rows, vectors.words[start : start + BLOCK]
            )
    try:
        _replace(vectors, Path(os.path.realpath(path)), suffix)
    except OSError as error:
        if error.errno is None:
            raise
        # Not by the name of the folder that is there for a moment.
        raise OSError(error.errno, error.strerror, path) from error


def _replace(vectors: Vectors, target: Path, suffix: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix=".vectors-", dir=target.parent))
    try:
        written = folder / target.name
        if suffix == ".kv":
            _write_keyed_vectors(vectors, str(written))
        else:
            with open(written, "wb") as file:
                file.write(f"{len(vectors)} {vectors.dim}\n".encode())
                (_write_binary if suffix == ".bin" else _write_text)(vectors, file)
        # gensim puts a big matrix beside it; the file that names the others comes last.
        for one in sorted(folder.iterdir(), key=lambda one: one == written):
            if (there := target.parent / one.name).exists():
                shutil.copymode(there, one)
            os.replace(one, there)
    finally:
        shutil.rmtree(folder)


def _write_text(vectors: Vectors, file: BinaryIO) -> None:
    import pyarrow as pa
    from pyarrow import csv

    options = csv.WriteOptions(include_header=False, delimiter=" ", quoting_style="none")
    for start in range(0, len(vectors), BLOCK):
        # The fewest digits that read back to the same number.
        rows = np.array(vectors.matrix[start : start + BLOCK])
        # Older Arrow writes no fp16.
        if rows.dtype == np.float16:
            rows = rows.astype(np.float32)
        written = pa.BufferOutputStream()
        names = [str(column) for column in range(vectors.dim)]
        csv.write_csv(pa.table(list(rows.T), names), written, options)
        numbers = written.getvalue().to_pybytes().split(b"\n")
        words = vectors.words[start : start + BLOCK]
        for word, line in zip(words, numbers[: len(words)], strict=True):
            file.write(b"%b %b\n" % (word.encode(), line))


def _write_binary(vectors: Vectors, file: BinaryIO) -> None:
    for start in range(0, len(vectors), BLOCK):
        rows = vectors.matrix[start : start + BLOCK].astype("<f4")
        for word, row in zip(vectors.words[start : start + BLOCK], rows, strict=True):
            file.write(b"%b %b\n" % (word.encode(), row.tobytes()))


def _write_keyed_vectors(vectors: Vectors, path: str) -> None:
    from gensim.models import KeyedVectors

    made = KeyedVectors(vectors.dim, dtype=vectors.matrix.dtype)
    made.add_vectors(vectors.words, np.array(vectors.matrix))
    made.save(path)
