"""word2vec's binary file: a line with both counts; then of each word its bytes, a space, and its numbers in fp32."""

from typing import BinaryIO

import numpy as np

from .reading import GrowingVectors

CHUNK = 2**22
LONGEST_WORD = 2**12
# Numbers that vectors have, but for zeros; what was read from a wrong place has others.
USUAL = 1e-12, 1e6


def read_binary(file: BinaryIO, count: int, found: GrowingVectors) -> None:
    """Read `count` words, or as many as `found` takes.

    Raises ValueError where the file ends before, or goes on behind them; so it does where a word holds a space, which
    this format cannot say.
    """
    size = 4 * found.dim
    rest = b""
    wanted = count if found.room is None else min(count, found.room)
    while wanted:
        block = file.read(max(CHUNK, size))
        buffer = rest + block
        # What lies behind a vector tells whether it is one; at the end of the file there is nothing.
        last = len(buffer) - (LONGEST_WORD if block else 0)
        words: list[bytes] = []
        starts: list[int] = []
        at = 0
        while len(words) < wanted:
            # Some writers end a vector with a newline, and some do not.
            while buffer.startswith((b"\n", b"\r"), at):
                at += 1
            space = buffer.find(b" ", at, at + LONGEST_WORD)
            if space < 0 or space + 1 + size > last:
                break
            words.append(buffer[at:space])
            starts.append(space + 1)
            at = space + 1 + size
        if not words and (not block or len(buffer) - at > 2 * LONGEST_WORD + size):
            _fail(f"ends, or loses its form, in word {found.read} of {count}, from 0")
        if words:
            rows = np.frombuffer(
                b"".join([buffer[start : start + size] for start in starts]), "<f4"
            )
            rows = rows.reshape(-1, found.dim)
            _check(words, rows, starts, buffer, found.settings.encoding)
            found.add(words, rows)
        wanted -= len(words)
        rest = buffer[at:]
    if found.read == count and (rest + file.read(CHUNK)).strip():
        _fail(f"goes on behind the {count} words that its first line counts")


def is_whole(body: bytes, count: int, dim: int) -> bool:
    """Whether these are `count` words, each with its numbers, and nothing else."""
    at = 0
    for _ in range(count):
        while body.startswith((b"\n", b"\r"), at):
            at += 1
        space = body.find(b" ", at, at + LONGEST_WORD)
        if not 0 <= space < len(body) - 4 * dim:
            return False
        at = space + 1 + 4 * dim
    return not body[at:].strip(b"\r\n")


def _check(
    words: list[bytes], rows: np.ndarray, starts: list[int], buffer: bytes, encoding: str
) -> None:
    """Raise ValueError where a word ends later than at its first space, or holds what none can.

    Its numbers then begin with the rest of it, and are of other sizes than those that begin behind it.
    """
    for word in words:
        if not word or b"\n" in word or b"\0" in word:
            _fail(f"has the word {word[:60]!r}")
    for place in np.flatnonzero(_unusual(rows)):
        start = end = starts[place]
        row = rows[place]
        while end := buffer.find(b" ", end, start + LONGEST_WORD) + 1:
            try:
                rest = buffer[start : end - 1].decode(encoding)
            except UnicodeDecodeError:
                continue
            if any(character < " " for character in rest):
                break
            behind = np.frombuffer(buffer[end : end + row.nbytes].ljust(row.nbytes, b"~"), "<f4")
            if _unusual(behind[None]) < _unusual(row[None]):
                _fail(f"has the word {words[place][:60]!r}, whose numbers begin with {rest!r}")


def _unusual(rows: np.ndarray) -> np.ndarray:
    """How many numbers of each row are of no usual size."""
    with np.errstate(invalid="ignore"):
        sizes = np.abs(rows)
        return ((sizes != 0) & ~((sizes > USUAL[0]) & (sizes < USUAL[1]))).sum(axis=1)


def _fail(what: str) -> None:
    raise ValueError(
        f"the file {what}; it was cut, or its first line counts wrongly, or a word holds a space, which this format "
        "cannot say: save such words as .kv or safetensors, or as text"
    )
