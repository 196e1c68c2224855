"""word2vec's binary file: a line with both counts; then of each word its bytes, a space, and its numbers in fp32."""

from typing import BinaryIO

import numpy as np

from .growing import GrowingVectors

CHUNK = 2**24
LONGEST_WORD = 2**12


def read_binary(file: BinaryIO, count: int, found: GrowingVectors) -> None:
    """Read `count` words, or as many as `found` takes.

    Raises ValueError where the file ends before, or goes on behind them; so it does where a word holds a space, which
    this format cannot say.
    """
    size = 4 * found.dim
    rest = b""
    wanted = count if found.missing is None else min(count, found.missing)
    while wanted:
        block = file.read(CHUNK)
        buffer = rest + block
        words, rows, at = [], [], 0
        while len(words) < wanted:
            # Some writers end a vector with a newline, and some do not.
            while buffer.startswith((b"\n", b"\r"), at):
                at += 1
            space = buffer.find(b" ", at, at + LONGEST_WORD)
            if space < 0 or space + 1 + size > len(buffer):
                break
            words.append(buffer[at:space])
            at = space + 1 + size
            rows.append(buffer[space + 1 : at])
        if not words and (not block or len(buffer) - at > LONGEST_WORD + size):
            _fail(f"ends, or loses its form, in word {found.read} of {count}, from 0")
        if words:
            found.add(words, np.frombuffer(b"".join(rows), "<f4").reshape(-1, found.dim))
        wanted -= len(words)
        rest = buffer[at:]
    if found.read == count:
        behind = (rest + file.read(CHUNK)).strip()
        if behind:
            _fail(f"goes on behind the {count} words that its first line counts")


def _fail(what: str) -> None:
    raise ValueError(
        f"the file {what}; it was cut, or its first line counts wrongly, or a word holds a space, which this format "
        "cannot say: save such words as text, .kv or safetensors"
    )
