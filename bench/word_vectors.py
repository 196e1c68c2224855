"""Files of word vectors, read by gpu_embed.vectors and by gensim: seconds and peak memory.

Each reading is a process of its own, as memory that was used once stays with it, and the readers take turns. What is
timed begins when all is imported.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

OURS, GENSIM = "gpu_embed", "gensim"
# fastText's n-grams, and how many words its file has of all.
BUCKETS, FASTTEXT_SHARE = 20_000, 10


class ReadError(Exception):
    """A reading that failed, and its last words."""


@dataclass(frozen=True)
class Reading:
    """How one file is read, medians of the rounds."""

    name: str
    seconds: dict[str, float]  # by reader
    mebibytes: dict[str, float]  # of peak memory above what the process held before
    ratios: list[float]  # gensim's seconds over ours, of each round


def write_files(folder: Path, count: int, dim: int) -> None:
    """A file of every format, with the same vectors in most of them."""
    from gpu_embed.vectors import Vectors

    rows = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32).round(5)
    words = [f"word{number}" for number in range(count)]
    vectors = Vectors(words, rows)
    for end in ("vec", "bin", "kv"):
        vectors.save(folder / f"words.{end}")
    with open(folder / "words.vec", "rb") as file, open(folder / "glove.txt", "wb") as glove:
        file.readline()
        glove.writelines(file)
    np.save(folder / "words.npy", rows)
    (folder / "words.txt").write_text("\n".join(words))
    some = max(count // FASTTEXT_SHARE, 1)
    with open(folder / "fasttext.bin", "wb") as file:
        file.write(
            struct.pack(
                "<2i12id", 793712314, 12, dim, 5, 5, 1, 5, 1, 2, 1, BUCKETS, 3, 6, 100, 1e-4
            )
        )
        file.write(struct.pack("<3i2q", some, some, 0, some, -1))
        for word in words[:some]:
            file.write(word.encode() + b"\0" + struct.pack("<qb", 1, 0))
        stored = np.random.default_rng(1).normal(size=(some + BUCKETS, dim)).astype("<f4")
        file.write(struct.pack("<?2q", False, *stored.shape) + stored.tobytes())
        file.write(struct.pack("<?2q", False, some, dim) + bytes(4 * some * dim))


def ways(folder: Path) -> dict[str, dict[str, Callable[[], Any]]]:
    """By the name of a format, how each reader reads it; gensim does not know matrices."""
    from gensim.models import KeyedVectors
    from gensim.models.fasttext import load_facebook_vectors
    from rich import console, progress  # noqa: F401 - else a part of the first reading

    from gpu_embed.vectors import load

    glove, text, binary, kept, fasttext, matrix = (
        str(folder / name)
        for name in ("glove.txt", "words.vec", "words.bin", "words.kv", "fasttext.bin", "words.npy")
    )
    read = KeyedVectors.load_word2vec_format
    return {
        "GloVe text": {OURS: lambda: load(glove), GENSIM: lambda: read(glove, no_header=True)},
        "word2vec text": {OURS: lambda: load(text), GENSIM: lambda: read(text)},
        "word2vec binary": {OURS: lambda: load(binary), GENSIM: lambda: read(binary, binary=True)},
        "gensim .kv, mapped": {
            OURS: lambda: load(kept),
            GENSIM: lambda: KeyedVectors.load(kept, mmap="r"),
        },
        "fastText .bin": {
            OURS: lambda: load(fasttext),
            GENSIM: lambda: load_facebook_vectors(fasttext),
        },
        ".npy and words, mapped": {OURS: lambda: load(matrix, words=folder / "words.txt")},
    }


def measure_readings(
    folder: Path, rounds: int, advance: Callable[[], Any] = lambda: None
) -> Iterator[Reading]:
    """Raises ReadError."""
    for name, readers in ways(folder).items():
        found: dict[str, list[tuple[float, float]]] = {reader: [] for reader in readers}
        # Before the first turn every file is read once.
        for turn in range(rounds + 1):
            for reader in readers:
                taken = _start(folder, name, reader)
                if turn:
                    found[reader].append(taken)
                advance()
        seconds = {reader: [one for one, _ in taken] for reader, taken in found.items()}
        yield Reading(
            name,
            {reader: median(taken) for reader, taken in seconds.items()},
            {reader: median(one for _, one in taken) for reader, taken in found.items()},
            [
                theirs / ours
                for ours, theirs in zip(seconds[OURS], seconds.get(GENSIM, []), strict=False)
            ],
        )


def _start(folder: Path, name: str, reader: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "gpu_embed.bench.word_vectors", str(folder), name, reader]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ReadError(f"{reader} failed to read {name}: {said[-1]}")
    seconds, mebibytes = json.loads(done.stdout)
    return seconds, mebibytes


def peak_mebibytes() -> float:
    """Of this program; `getrusage` would begin with what its parent held."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


if __name__ == "__main__":
    read = ways(Path(sys.argv[1]))[sys.argv[2]][sys.argv[3]]
    before, begin = peak_mebibytes(), time.perf_counter()
    kept = read()
    print(json.dumps((time.perf_counter() - begin, peak_mebibytes() - before)))
