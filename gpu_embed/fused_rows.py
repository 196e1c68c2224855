"""Quantized rows: the codes, scale and offset of each group of columns in one row of bytes.

The layout is FBGEMM's, which torch's own operators on the CPU read. Of each group, in this order:

    ======  ==========================================  ==========  ==========
    bits    codes, unsigned                             scale       offset
    ======  ==========================================  ==========  ==========
    4       GROUP / 2 bytes, the even column low        fp16        fp16
    8       GROUP bytes                                 fp32        fp32
    ======  ==========================================  ==========  ==========

A number is code * scale + offset, in fp32. A scale has at most 16 significant bits, so that the product is exact: with
or without a fused multiply-add, all backends get the same bits.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = (32, 64, 128)  # columns a scale; or "row": one a row
# Numbers of a table that are quantized at a time: they are held in fp64.
CHUNK = 1 << 21
# A group has a multiple of so many columns, so that the numbers behind its codes are aligned.
ALIGNMENT = 4
# Bits of an fp32 scale that stay zero.
EXACT_MASK = 0xFF


class FusedRows(NamedTuple):
    """How rows of `embedding_dim` numbers lie in rows of bytes."""

    embedding_dim: int
    group_size: (
        int  # columns a scale; the last group's missing ones are there, and cut off in a lookup
    )
    bits: int  # 8 or 4

    @property
    def groups(self) -> int:
        return -(-self.embedding_dim // self.group_size)

    @property
    def code_bytes(self) -> int:
        """Bytes of a group's codes."""
        return self.group_size * self.bits // 8

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.bits == 8 else torch.float16

    @property
    def group_bytes(self) -> int:
        return self.code_bytes + 2 * self.scale_dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.groups * self.group_bytes


def fused_rows(function: str, embedding_dim: int, bits: int, group: int | str | None) -> FusedRows:
    """The layout of a width, checked.

    Args:
        group: one of GROUPS, or "row"; None: "row" for 8 bits, 64 for 4. Of a row that is no wider there is one.
    """
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ValueError(f"{function}: bits must be 8 or 4, got {bits!r}")
    if embedding_dim < 1:
        raise ValueError(f"{function}: a table without columns has nothing to quantize")
    if group is None:
        group = "row" if bits == 8 else 64
    whole = -(-embedding_dim // ALIGNMENT) * ALIGNMENT
    if group == "row":
        return FusedRows(embedding_dim, whole, bits)
    if isinstance(group, bool) or group not in GROUPS:
        raise ValueError(
            f'{function}: group must be 32, 64 or 128 columns, or "row" for one scale a row, got {group!r}'
        )
    return FusedRows(embedding_dim, min(int(group), whole), bits)


class QuantizationError(ValueError):
    """A row that has no codes, and why."""


def quantize_rows(rows: Tensor, layout: FusedRows, table: str = "") -> Tensor:
    """Rows [V, D] of real numbers -> uint8 [V, row_bytes], each number at most half a step from its own.

    A step is the scale: what divides the range of a group into 15 (4 bits) or 255 parts, rounded up. Rows of zeros,
    and constant ones whose number the offset can hold, are kept as they are.

    Args:
        table: what errors call the table; "": it is the only one.

    Raises QuantizationError, a ValueError, for a row with NaN, infinity, or numbers too far out for scale or offset.
    """
    rows = rows.detach()
    fused = torch.empty(len(rows), layout.row_bytes, dtype=torch.uint8, device=rows.device)
    step = max(1, CHUNK // layout.embedding_dim)
    for first in range(0, len(rows), step):
        fused[first : first + step] = _quantize(rows[first : first + step], layout, table, first)
    return fused


def _quantize(rows: Tensor, layout: FusedRows, table: str, first: int) -> Tensor:
    of_table = f" of table {table!r}" if table else ""
    # What a lookup must be able to return.
    dtype = torch.float32 if rows.dtype == torch.float64 else rows.dtype
    rows = rows.to(torch.float64)
    finite = rows.isfinite()
    if not finite.all():
        row, column = (int(place) for place in (~finite).nonzero()[0])
        raise QuantizationError(
            f"row {first + row}{of_table} holds {rows[row, column].item()} at column {column}; quantize finite numbers"
        )
    missing = layout.groups * layout.group_size - layout.embedding_dim
    if missing:
        # The last column again, which widens no range.
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
    grouped = rows.unflatten(1, (layout.groups, layout.group_size))
    low, high = grouped.aminmax(dim=2, keepdim=True)  # [V, groups, 1]
    levels = 2**layout.bits - 1
    offset = _rounded_down(low, layout.scale_dtype)
    scale = _scale_from((high - offset.to(torch.float64)) / levels, layout.scale_dtype)
    # What the largest code stands for, before and after the offset is added.
    product = scale.to(torch.float64) * levels
    far = product.to(torch.float32).isinf() | ~offset.isfinite()
    far |= (product + offset).to(dtype).isinf()
    if far.any():
        row, group, _ = (int(place) for place in far.nonzero()[0])
        name = str(layout.scale_dtype).removeprefix("torch.")
        raise QuantizationError(
            f"row {first + row}{of_table} goes from {low[row, group].item():g} to {high[row, group].item():g}, which a "
            f"scale and an offset of {name} cannot hold; "
            + ("use bits=8" if layout.bits == 4 else "scale the table down")
        )
    wide_scale = scale.to(torch.float64)
    codes = (grouped - offset.to(torch.float64)) / torch.where(wide_scale > 0, wide_scale, 1)
    codes = codes.round_().clamp_(0, levels).to(torch.uint8)
    if layout.bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    numbers = torch.cat([scale, offset], dim=2).view(torch.uint8)  # [V, groups, 2 * itemsize]
    return torch.cat([codes, numbers], dim=2).flatten(1)


def _rounded_down(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 numbers as the next ones of another dtype that are not larger."""
    rounded = numbers.to(dtype)
    bits = rounded.view(torch.int16 if dtype == torch.float16 else torch.int32)
    # One step towards minus infinity; +0 becomes the smallest negative number.
    smallest = torch.iinfo(bits.dtype).min + 1
    below = torch.where(bits > 0, bits - 1, torch.where(bits < 0, bits + 1, smallest))
    return torch.where(rounded > numbers, below, bits).to(bits.dtype).view(dtype)


def _scale_from(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps, fp64 and not negative, as the next ones of a scale that are not smaller."""
    rounded = steps.to(dtype)
    bits = rounded.view(torch.int16 if dtype == torch.float16 else torch.int32)
    # An infinity is what a step beyond the largest number becomes, and stays one.
    bits = torch.where((rounded < steps) & rounded.isfinite(), bits + 1, bits)
    if dtype == torch.float32:
        bits = (bits + EXACT_MASK) & ~EXACT_MASK
    return bits.view(dtype)


def dequantize(fused: Tensor, layout: FusedRows, for_onnx: bool = False) -> Tensor:
    """Rows of bytes [..., row_bytes] -> what they stand for, fp32 [..., embedding_dim], in torch's plain operators.

    Args:
        for_onnx: without the view of bytes as numbers, for which ONNX has no operator; the same bits.
    """
    groups = fused.unflatten(-1, (layout.groups, layout.group_bytes))
    codes = groups[..., : layout.code_bytes]
    if for_onnx:
        # Of bytes its operators make signed ones.
        codes = codes.to(torch.int32)
    if layout.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    numbers = groups[..., layout.code_bytes :]
    if for_onnx:
        numbers = _from_bytes(numbers.unflatten(-1, (2, -1)), layout.scale_dtype)
    else:
        numbers = numbers.contiguous().view(layout.scale_dtype).float()
    rows = codes.float() * numbers[..., :1] + numbers[..., 1:]
    return rows.flatten(-2)[..., : layout.embedding_dim].contiguous()


def _from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite floats [...] of their bytes [..., itemsize], the lowest first, by arithmetic that does not round."""
    low, high = data[..., 0].to(torch.int32), data[..., -1].to(torch.int32)
    sign = 1 - 2 * (high >> 7)
    if dtype == torch.float16:
        digits, exponent, fraction = 10, high >> 2 & 31, (high & 3) * 256 + low
    else:
        middle, upper = data[..., 1].to(torch.int32), data[..., 2].to(torch.int32)
        digits, exponent = 23, (high & 127) * 2 + (upper >> 7)
        fraction = (upper & 127) * 65536 + middle * 256 + low
    # What is not subnormal has one digit more.
    digit = torch.where(exponent > 0, 1 << digits, 0)
    # By the exponent; the largest is infinity's.
    bias = 15 if dtype == torch.float16 else 127
    powers = [2.0 ** (max(one, 1) - bias - digits) for one in range(2 * bias + 1)]
    scale = torch.tensor(powers, dtype=torch.float32, device=data.device)[exponent.to(torch.int64)]
    return (sign * (fraction + digit)).float() * scale


@cache
def reads_as_ours(bits: int) -> bool:
    """Whether torch's operator for such rows is there, and gets what `dequantize` gets."""
    layout = fused_rows("", 8, bits, "row")
    generator = torch.Generator(device="cpu").manual_seed(0)
    rows = torch.randn(3, 8, generator=generator, device="cpu")
    fused = quantize_rows(rows, layout)
    places = torch.arange(3, device="cpu")
    try:
        found = torch_lookup(bits)(fused, places, places)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, dequantize(fused, layout))


@cache
def torch_lookup(bits: int):  # type: ignore[no-untyped-def]
    """torch's operator on the CPU: (rows of bytes, ids, offsets) -> sums of bags."""
    name = "byte" if bits == 8 else "4bit"
    return getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets").default
