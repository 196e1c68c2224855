"""Strings and ids to rows of a table by hashing, the same in every process and on every machine.

Strings are hashed as their UTF-8, eight bytes at a time, and numbers as they are. What becomes of that is the mixing
function of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Strings up to so many bytes are hashed side by side, longer ones with those of up to twice as many, and so on.
SHORTEST = 32
# Longer ones by BLAKE2b.
LONGEST = 1024
# Bytes of strings that are side by side at once: they fit into a cache.
BLOCK = 2**19


def hash_ids(
    values: Any,
    rows: int,
    *,
    seed: int = 0,
    hashes: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """The rows from 0 to rows - 1 that strings or ids hash to: a table without a vocabulary, in which none is unknown.

    Args:
        values: strings, in a list, a tuple, an array of NumPy or a Series of pandas; or integers of 64 bits, also in a
            tensor.
        rows: of the table.
        seed: another one gives other rows.
        hashes: how many rows each value gets, by as many different hashes.
        device: of the result; None: a tensor's own, or torch's default device.

    Returns:
        int64, of the values' shape; with hashes > 1, `[*shape, hashes]`. Where row 0 is padding, take
        `1 + hash_ids(values, rows - 1)`.

    Raises:
        TypeError: values are neither strings nor integers; rows, seed or hashes is no integer.
        ValueError: rows or hashes is less than 1.

    **Collisions.** Of n different values, 1 - (1 - 1 / rows) ** (n - 1) share their row with another one, which is
    about n / rows where that is small. With several hashes, 1 - (1 - 1 / rows ** hashes) ** (n - 1) share all of
    theirs: the sum of their rows tells the others apart.
    """
    rows, seed, hashes = map(operator.index, (rows, seed, hashes))
    if not 1 <= rows < 2**63 or hashes < 1:
        raise ValueError(
            f"hash_ids: rows and hashes must be at least 1, got rows={rows} and hashes={hashes}; rows less than 2**63"
        )
    codes = _codes(values)
    if device is not None or not isinstance(values, Tensor):
        codes = codes.to(torch.get_default_device() if device is None else device)
    number = torch.arange(1, hashes + 1, dtype=torch.int64, device=codes.device)
    salts = _mix_(number * _signed(GOLDEN) + _signed(seed % 2**64))
    # Without the sign, as a negative number has another remainder.
    found = _mix_(codes.unsqueeze(-1) + salts).bitwise_and_(2**63 - 1).remainder_(rows)
    return found if hashes > 1 else found.squeeze(-1)


def _codes(values: Any) -> Tensor:
    """A number of 64 bits for each value."""
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise _wrong_type(f"a tensor of {values.dtype}")
        return values.to(torch.int64)
    if isinstance(values, str | bytes | set | dict):
        raise _wrong_type(f"a {type(values).__name__}; put what is to be hashed in a list")
    if isinstance(values, list | tuple) and values and isinstance(values[0], str):
        return torch.from_numpy(_of_strings(values))
    array = np.asarray(values)
    if array.dtype.kind == "U" and not isinstance(values, np.ndarray):
        # As NumPy's strings, numbers would become strings, and NULs at the end be lost.
        array = np.asarray(values, object)
    if array.dtype.kind == "O" and array.size and all(isinstance(one, int) for one in array.flat):
        # As pandas has integers in some columns.
        array = np.asarray(array.tolist())
    if array.dtype.kind in "iu" or array.size == 0:
        return torch.from_numpy(array.astype(np.uint64).view(np.int64))
    if array.dtype.kind in "UTO":
        return torch.from_numpy(_of_strings(array.ravel().tolist()).reshape(array.shape))
    raise _wrong_type(f"an array of {array.dtype}")


def _of_strings(strings: Sequence[str]) -> NDArray[np.int64]:
    try:
        is_ascii = "".join(strings).isascii()
    except TypeError:
        other = next(one for one in strings if not isinstance(one, str))
        raise _wrong_type(f"strings and {other!r}, a {type(other).__name__}") from None
    # NumPy takes ASCII as it is. Half of a pair of surrogates has no UTF-8 of its own.
    encoded = strings if is_ascii else [one.encode("utf-8", "surrogatepass") for one in strings]
    lengths = np.fromiter(map(len, encoded), np.uint64, len(encoded))
    codes = (lengths + np.uint64(1)) * np.uint64(GOLDEN)
    width, longest = SHORTEST, int(lengths.max(initial=0))
    if longest <= width:
        _hash(encoded, codes, width)
        return codes.view(np.int64)
    left = np.arange(len(encoded))
    # Of long ones few lie side by side, and a step for each eight bytes would take a second for a million.
    for place in np.flatnonzero(lengths > LONGEST).tolist():
        one = encoded[place]
        data = one.encode() if isinstance(one, str) else one
        digest = hashlib.blake2b(data, digest_size=8).digest()
        codes[place] = int.from_bytes(digest, "little")
    left = left[lengths <= LONGEST]
    while len(left):
        fits = lengths[left] <= width
        places = left[fits]
        own = codes[places]
        _hash([encoded[place] for place in places.tolist()], own, width)
        codes[places] = own
        left, width = left[~fits], 2 * width
    return codes.view(np.int64)


def _hash(strings: Sequence[str | bytes], codes: NDArray[np.uint64], width: int) -> None:
    """Hash UTF-8, or ASCII, of up to `width` bytes into their codes, eight bytes at a time."""
    count = max(BLOCK // width, 1)
    for start in range(0, len(strings), count):
        words = np.array(strings[start : start + count], f"S{width}").view("<u8")
        own = codes[start : start + count]
        for word in words.reshape(-1, width // 8).T:
            own ^= word
            # Before the product too, which takes bits up alone: a difference in the last bytes of a word would stay
            # there, and those of the next word could undo it.
            own ^= own >> np.uint64(32)
            own *= np.uint64(FIRST)
            own ^= own >> np.uint64(29)


def _mix_(x: Tensor) -> Tensor:
    """SplitMix64's function of int64s, whose products wrap, in place."""
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        # The sign is shifted in as well.
        x ^= (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        x *= _signed(factor)
    return x


def _signed(bits: int) -> int:
    """64 bits as an int64 has them."""
    return bits - 2**64 if bits >= 2**63 else bits


def _wrong_type(what: str) -> TypeError:
    return TypeError(f"hash_ids: expected strings or integers, got {what}")
