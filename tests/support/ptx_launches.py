"""Launches of one compiled gather or scatter_add on made-up inputs, and what NumPy says that they leave.

What Triton compiled a kernel for holds for each input: its constants, the numbers that are multiples of 16, and the
pointers that are.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from cases import mapped

from gpu_embed.bench.ptx.machine import Program
from gpu_embed.bench.ptx.memory import GlobalMemory, Region
from gpu_embed.bench.ptx.warp import WARP

# More bytes than this are an address range, of which few pages are ever touched.
MOST_COPIED = 2**26
# Of a table whose items all have values.
MOST_ITEMS = 2**19
# NumPy has no bf16: its bits.
DTYPES = {"*fp32": "f4", "*fp64": "f8", "*fp16": "f2", "*bf16": "u2"}
# ids(draw, count, rows, dtype): what a launch looks up.
Ids = Callable[[np.random.Generator, int, int, np.dtype], np.ndarray]


@dataclass(frozen=True)
class Specialization:
    """One kernel as Triton compiled it once."""

    program: Program
    signature: dict[str, str]  # parameter: type; "constexpr": no argument
    constants: dict[str, Any]
    divisible: frozenset[str]  # parameters that are multiples of 16
    num_warps: int
    shared_bytes: int

    @classmethod
    def of(cls, binary: Any, program: Program) -> "Specialization":
        names = list(binary.src.signature)
        return cls(
            program,
            dict(binary.src.signature),
            {names[place]: value for (place,), value in binary.src.constants.items()},
            frozenset(names[place] for (place,), found in binary.src.attrs.items() if found),
            binary.metadata.num_warps,
            binary.metadata.shared,
        )

    @property
    def kernel(self) -> str:
        return self.program.kernel.name

    @property
    def rows_of_program(self) -> int:
        """Rows of ids that one program has, or one where a row has several programs."""
        known = self.constants
        return known.get("BLOCK_N") or max(known["BLOCK"] * known["VEC"] // known["D"], 1)

    def grid(self, count: int) -> tuple[int, ...]:
        """Of a launch with so many ids."""
        known = self.constants
        if "BLOCK_N" in known:
            return cdiv(count, known["BLOCK_N"]), cdiv(known["D"], known["BLOCK_D"])
        return (cdiv(count * known["D"] // known["VEC"], known["BLOCK"]),)

    def fit(self, name: str, value: int) -> int:
        """The next number, from this one on, for which Triton launches this very code."""
        if name in self.constants:
            return self.constants[name]
        if name in self.divisible:
            return cdiv(value, 16) * 16
        return next(n for n in range(value, value + 3) if n % 16 and n != 1)

    def has(self, name: str) -> bool:
        return self.signature.get(name, "constexpr") != "constexpr"

    def is_narrow(self, name: str) -> bool:
        """Whether it is a number of 32 bits, which may be large or small."""
        return self.signature[name] == "i32"

    def dtype(self, name: str) -> np.dtype:
        kind = self.signature[name]
        return np.dtype(DTYPES.get(kind) or f"{kind[1]}{int(kind[2:]) // 8}")


@dataclass(frozen=True)
class Input:
    """What one launch looks up, as far as a specialization leaves it open."""

    name: str
    make_ids: Ids
    programs: float = 3  # whose ids there are
    more: int = 5  # ids than that
    rows: int = 9
    padding: int = -1  # zero_idx or padding_idx; of a shard, its row
    first_row: int = 7  # of a shard; more where that needs 64 bits
    gap: int = 0  # items between one row's last and the next row's first
    columns: int = 1  # the distance of two columns
    far_rows: bool = False  # the last row begins past 2**31 items
    far_columns: bool = False  # the last column lies there
    far_ids: bool = False  # as many as make 2**31 items; the last programs run
    far_table: bool = False  # the table's gradient ends past 2**31 items
    claimed: bool = False  # the record
    special: bool = (
        False  # NaN, infinities, zeros of both signs; sums of two or more depend on their order
    )


class Launch:
    """A launch that can be run again and again."""

    def __init__(self, of: Specialization, given: Input) -> None:
        self.of, self.given = of, given
        self._draw = np.random.default_rng(zlib.crc32(given.name.encode()))
        self.tensors: dict[str, np.ndarray] = {}
        self._regions: list[Region] = []
        # Bytes that are put back before each run, and compared after it.
        self._windows: list[np.ndarray] = []
        self.numbers: dict[str, int] = {}
        make = self._make_gather if of.kernel.startswith("gather") else self._make_scatter_add
        make(given)
        self.grid = of.grid(self.numbers["num_indices"])
        self._before = [window.copy() for window in self._windows]
        addresses = {region.name: region.address for region in self._regions}
        values = {**addresses, **self.numbers}
        self._arguments = [values[n] for n, kind in of.signature.items() if kind != "constexpr"]
        self._arguments += [0] * (len(of.program.kernel.parameters) - len(self._arguments))

    @property
    def num_bytes(self) -> int:
        return sum(region.num_bytes for region in self._regions)

    def run(self, program: Program) -> bytes:
        """All bits that the launch leaves behind.

        Raises:
            PtxError: an access or a barrier is wrong.
        """
        for window, before in zip(self._windows, self._before, strict=True):
            window[:] = before
        program.run(
            self.grid,
            (self.of.num_warps * WARP,),
            self._arguments,
            GlobalMemory(self._regions),
            self.of.shared_bytes,
            self._last_blocks if self.is_partial else None,
        )
        return b"".join(window.tobytes() for window in self._windows)

    @property
    def _last_blocks(self) -> np.ndarray:
        """Of a large launch the last two of the first axis run."""
        last = np.arange(self.grid[0] - 2, self.grid[0])
        return np.concatenate([last + self.grid[0] * y for y in range(prod(self.grid[1:]))])

    @property
    def first_item(self) -> int:
        """Of all ids' rows in line: the first that the blocks which run have."""
        known = self.of.constants
        of_block = (known.get("BLOCK_N") or 0) * known["D"] or known["BLOCK"] * known["VEC"]
        return (self.grid[0] - 2) * of_block if self.is_partial else 0

    @property
    def is_far(self) -> bool:
        return self.num_bytes > MOST_COPIED

    def places(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Where the items of these rows of "weight" or "grad" lie: [rows, D]."""
        row, col = (self.numbers[f"{name}_{axis}_stride"] for axis in ("row", "col"))
        known = self.of.constants
        return (rows * row * known["VEC"])[:, None] + np.arange(known["D"]) * col

    def before(self, name: str) -> np.ndarray:
        """A copy of the tensor as it is before each run, where no tensor is far."""
        window = self._before[list(self.tensors).index(name)]
        return window.view(self.tensors[name].dtype).copy()

    def encode(self, name: str, values: np.ndarray) -> np.ndarray:
        """In the tensor's dtype, which holds them exactly."""
        if self.of.signature[name] == "*bf16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(self.of.dtype(name))

    def decode(self, name: str, items: np.ndarray) -> np.ndarray:
        """What the tensor's items stand for."""
        if self.of.signature[name] == "*bf16":
            return (items.astype(np.uint32) << 16).view(np.float32)
        return items

    # What lies in memory.

    def _put(
        self, name: str, items: np.ndarray | int, touched: Sequence[slice] = (slice(None),)
    ) -> np.ndarray:
        """A tensor with these items, or of zeros; of a large one these slices are put back and compared."""
        dtype = self.of.dtype(name)
        count = items if isinstance(items, int) else len(items)
        begin = 0 if name in self.of.divisible else dtype.itemsize
        num_bytes = count * dtype.itemsize
        if num_bytes > MOST_COPIED:
            raw = mapped(num_bytes + begin, 1, torch.uint8).numpy().ravel()
        else:
            raw, touched = np.zeros(num_bytes + 512, np.uint8), (slice(None),)
            begin += -raw.ctypes.data % 256
        tensor = raw[begin : begin + num_bytes].view(dtype)
        if not isinstance(items, int):
            tensor[:] = items.astype(dtype, copy=False)
        self._regions.append(Region(name, raw.ctypes.data + begin, num_bytes))
        self._windows += [tensor[piece].view(np.uint8) for piece in touched]
        self.tensors[name] = tensor
        return tensor

    def _put_end(self, name: str, count: int, end: np.ndarray) -> None:
        """A tensor of so many items, of which these are the last, and the others zeros."""
        first = count - len(end)
        self._put(name, count, [slice(first, None)])[first:] = end

    def _put_rows(self, name: str, of: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Rows of a matrix with the strides of `of`, by their numbers; between them lies anything."""
        places = self.places(of, rows)
        extent = int(places.max(initial=-1)) + 1
        far = extent * values.itemsize > MOST_COPIED
        touched = [slice(int(p), int(p) + 1) for p in places.flat] if far else ()
        tensor = self._put(name, extent, touched)
        if not far:
            tensor[:] = self._bits(extent, tensor.dtype)
        tensor[places] = values

    def _bits(self, count: int, dtype: np.dtype) -> np.ndarray:
        return np.frombuffer(self._draw.bytes(count * dtype.itemsize), dtype)

    def _choose_rows(self, given: Input, rows: int, padding: str) -> int:
        of, numbers = self.of, self.numbers
        rows = of.fit("num_embeddings", rows)
        first_row = 0
        if of.has("first_row"):
            # No number of these has code of its own.
            first_row = given.first_row + (0 if of.is_narrow("first_row") else 2**40)
            numbers |= {"first_row": first_row}
        if of.has("table_rows"):
            # Two rows of the table lie behind the shard's.
            numbers |= {"table_rows": of.fit("table_rows", first_row + rows + 2)}
        padding_idx = given.padding
        if padding_idx >= 0 and not (
            of.has(padding) and of.is_narrow(padding) and first_row >= 2**31
        ):
            padding_idx += first_row
        numbers |= {"num_embeddings": rows, padding: of.fit(padding, padding_idx)}
        self.padding_idx = numbers[padding]
        return rows

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """The number of each id's row in the tensor in hand, which may not have it."""
        return ids.astype(np.int64) - self.numbers.get("first_row", 0)

    def takes_part(self, ids: np.ndarray) -> np.ndarray:
        """Which ids name a row of the tensor in hand, and no padding."""
        rows = self.rows_of(ids)
        return in_table(rows, self.numbers["num_embeddings"]) & (ids != self.padding_idx)

    def _make_gather(self, given: Input) -> None:
        of, D, numbers = self.of, self.of.constants["D"], self.numbers
        rows = self._choose_rows(given, min(given.rows, MOST_ITEMS // D), "zero_idx")
        self._choose_strides(given, "weight", rows)
        end = self._ids(given)
        self._put_end("indices_ptr", numbers["num_indices"], end)
        words = of.dtype("weight_ptr")
        values = self._bits(rows * D, words).reshape(rows, D)
        self._put_rows("weight_ptr", "weight", np.arange(rows), values)
        garbage = np.repeat(self._bits(1, words), len(end) * D)
        self._put_end("output_ptr", numbers["num_indices"] * D, garbage)
        if of.has("record_ptr"):
            self._put("record_ptr", np.array([given.claimed, 0, 0, 0, 0, 0, 0]))
            self._put("flag_ptr", np.array([0]))

    def _make_scatter_add(self, given: Input) -> None:
        of, D, numbers, draw = self.of, self.of.constants["D"], self.numbers, self._draw
        large = given.far_table and of.is_narrow("num_embeddings")
        rows = min(2**31 // D + 5, 2**31 - 16) if large else min(given.rows, MOST_ITEMS // D)
        rows = self._choose_rows(given, rows, "padding_idx")
        end, count = self._ids(given), numbers["num_indices"]
        self._put_end("indices_ptr", count, end)
        grads = np.arange(count - len(end), count)
        if of.has("bag_of_ptr"):
            grads = np.arange(max(len(end) // 3, 2))
            self._put_end("bag_of_ptr", count, draw.integers(-1, len(grads), len(end)))
        if of.has("per_sample_weights_ptr"):
            weights = self.encode(
                "per_sample_weights_ptr", draw.choice([1, -1, 2, 0.5, -4], len(end))
            )
            self._put_end("per_sample_weights_ptr", count, weights)
        if of.has("sizes_ptr"):
            self._put("sizes_ptr", draw.choice([1, 2, 4, 8], len(grads)))
        self._choose_strides(given, "grad", len(grads))
        # Their sums are exact in any order.
        values = 0.25 * draw.integers(-8, 9, (len(grads), D))
        if given.special:
            values[:] = draw.standard_normal(values.shape)
            values.flat[::5], values.flat[1::5], values.flat[2::5] = np.nan, np.inf, -0.0
        elif not of.has("bag_of_ptr") and not self.is_partial and self._are_apart("grad"):
            values[~self.takes_part(end)] = np.nan
        values = self.encode("grad_output_ptr", values)
        self._put_rows("grad_output_ptr", "grad", grads, values)
        self._choose_strides(replace(given, gap=max(given.gap, 0)), "grad_weight", rows, apart=True)
        named = self.rows_of(end)
        self.named = np.unique(named[in_table(named, rows)])
        before = 0.25 * draw.integers(-8, 9, (len(self.named), D))
        if given.special:
            before[:] = draw.standard_normal(before.shape)
        self.named_before = self.encode("grad_weight_ptr", before)
        self._put_rows("grad_weight_ptr", "grad_weight", self.named, self.named_before)

    def _are_apart(self, name: str) -> bool:
        """Whether a row ends before the next one begins."""
        row, col = (self.numbers[f"{name}_{axis}_stride"] for axis in ("row", "col"))
        return row * self.of.constants["VEC"] > (self.of.constants["D"] - 1) * col

    def _ids(self, given: Input) -> np.ndarray:
        """Those that are looked up; before them, where few programs of many run, stand zeros."""
        of = self.of
        few = int(given.programs * of.rows_of_program) + given.more
        self.is_partial = given.far_ids and of.is_narrow("num_indices")
        count = few + (2**31 // of.constants["D"] if self.is_partial else 0)
        count = min(of.fit("num_indices", max(count, 1)), 2**31 - 16)
        self.numbers["num_indices"] = count
        kind = of.dtype("indices_ptr")
        length = min(few, count) if self.is_partial else count
        ids = given.make_ids(self._draw, length, self.numbers["num_embeddings"], kind)
        if first_row := self.numbers.get("first_row", 0):
            # Of ten ids some nine are counted from the shard's first row, and all that are behind its rows.
            wide = ids.astype(np.int64)
            moved = (self._draw.random(length) < 0.9) | (wide >= self.numbers["num_embeddings"])
            ids = np.where(moved, wide + first_row, wide).astype(kind)
        return ids

    def _choose_strides(self, given: Input, name: str, rows: int, *, apart: bool = False) -> None:
        """The distances of rows, in units of VEC, and of columns; `apart`: no two items lie in one place."""
        of, D, VEC = self.of, self.of.constants["D"], self.of.constants["VEC"]
        row_name, col_name = f"{name}_row_stride", f"{name}_col_stride"
        # Of two columns the second would need a stride of more than 32 bits.
        far = given.far_columns and D > 2 and of.is_narrow(col_name)
        # A row's distance that is known may be that of a transposed matrix.
        known = (of.constants.get(row_name) or 0) * VEC * rows if apart else 0
        col = of.fit(col_name, 2**31 // (D - 1) + 5 if far else max(given.columns, known))
        row = max(cdiv((D - 1) * col + 1 + given.gap, VEC), 0)
        if given.far_rows and of.is_narrow(row_name):
            row = 2**31 // (max(rows - 1, 1) * VEC) + 5
        elif far or (self.numbers.get("num_indices", 0) > MOST_ITEMS and not apart):
            # Rows between one another's columns, or over one another.
            row = 2
        row = of.fit(row_name, row)
        # Rows side by side need no number.
        self.numbers |= {row_name: D // VEC if row is None else row, col_name: col}


def in_table(ids: np.ndarray, rows: int) -> np.ndarray:
    wide = ids.astype(np.int64)
    return (wide >= 0) & (wide < rows)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Launches:
    """One specialization's launches on these inputs, in their order."""

    def __init__(self, of: Specialization, inputs: Sequence[Input]) -> None:
        self._of, self._inputs = of, inputs
        self._kept: dict[int, Launch] = {}

    def __iter__(self) -> Iterator[Launch]:
        for number, given in enumerate(self._inputs):
            if number not in self._kept:
                self._kept[number] = Launch(self._of, given)
            yield self._kept[number]


# Ids.


def good_ids(draw: np.random.Generator, count: int, rows: int, dtype: np.dtype) -> np.ndarray:
    """In range where the table has rows; the first and the last row are among them."""
    last = max(min(rows - 1, np.iinfo(dtype).max), 0)
    ids = draw.integers(0, last + 1, count)
    ids[:: max(count // 5, 2)] = last
    ids[1 :: max(count // 5, 2)] = 0
    return ids.astype(dtype)


def different_ids(draw: np.random.Generator, count: int, rows: int, dtype: np.dtype) -> np.ndarray:
    """No row twice; where there are more ids than rows, the others have none."""
    ids = np.full(count, rows)
    found = draw.permutation(rows)[:count]
    ids[: len(found)] = found
    return ids.astype(dtype)


def some_bad_ids(draw: np.random.Generator, count: int, rows: int, dtype: np.dtype) -> np.ndarray:
    """A third out of range: just past each end, at the dtype's limits, and such as 32 bits make good."""
    ids, limits = good_ids(draw, count, rows, dtype), np.iinfo(dtype)
    bad = [-1, rows, rows + 1, -2, limits.min, limits.max, 2**32 + 1, -(2**32), 2**31, 2**16]
    bad = [one for one in bad if limits.min <= one <= limits.max and not 0 <= one < rows]
    if bad:
        where = draw.random(count) < 1 / 3
        ids[where] = draw.choice(np.array(bad, dtype), where.sum())
    return ids


def bad_id_at(place: float) -> Ids:
    """One id alone out of range, at this share of the ids."""

    def make(draw: np.random.Generator, count: int, rows: int, dtype: np.dtype) -> np.ndarray:
        ids = good_ids(draw, count, rows, dtype)
        ids[min(int(place * count), count - 1)] = min(rows + 5, np.iinfo(dtype).max)
        return ids

    return make
