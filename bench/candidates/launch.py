"""Launches of the candidates.

Each function takes first the `TritonDevice` that launches: the package's backend, or one that only records.
All of them raise ValueError where the kernel cannot serve the call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpu_embed.backends._plan.access import VECTOR_BYTES, cdiv, flat_ids, vector_width, word_layout
from gpu_embed.backends._triton.device import TritonDevice
from gpu_embed.backends._triton.launch import FlatLaunch, Launch, next_power_of_2
from gpu_embed.bounds import BoundsRecord

# TMA begins here, and its coordinates are 32 bit.
DESCRIPTOR_CAPABILITY = (9, 0)
MAX_COORDINATE = 2**31 - 1
SHORT_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GatherDescriptorLaunch(Launch):
    """gather_descriptor_kernel: ROWS rows of BLOCK_D words, STAGES - 1 of them in flight.

    One warp a program: a single thread issues the copies.
    """

    ROWS: int
    BLOCK_D: int
    STAGES: int
    num_warps: int = 1


@dataclass(frozen=True)
class ScatterDescriptorLaunch(Launch):
    """scatter_add_descriptor_kernel: ROWS rows of BLOCK_D columns, all in flight."""

    ROWS: int
    BLOCK_D: int
    num_warps: int = 1


@dataclass(frozen=True)
class OneHotLaunch(Launch):
    """one_hot_kernel: a table of up to BLOCK_V rows, BLOCK_N ids at a time, BLOCK_D columns."""

    BLOCK_V: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int = 4


# Words in flight of a program of gather_descriptor_kernel, in no more rows than four. Rows of this many words
# go alone, from one copy to the next without passing through registers.
DESCRIPTOR_WORDS = 1024
DESCRIPTOR_ROWS = 4
# By the power of two that holds the table's rows: 16 or 32 sums a thread.
ONE_HOT = {
    16: OneHotLaunch(16, 64, 128),
    32: OneHotLaunch(32, 64, 64),
    64: OneHotLaunch(64, 32, 64),
    128: OneHotLaunch(128, 32, 32),
    256: OneHotLaunch(256, 32, 64, num_warps=16),
}
MAX_ONE_HOT_ROWS = max(ONE_HOT)
# At least this many ids a split of one_hot_kernel, and for each row of the table, so that the splits' sums, which are
# written and read again, are few beside the gradients. One tile adds them all up.
MIN_SPLIT = 512
MIN_SPLIT_PER_ROW = 8
MAX_SPLITS = 64
# What the splits' sums may take together.
MAX_PARTIAL_BYTES = 48 * 2**20
SUM_SPLITS = FlatLaunch(64)


def gather(
    triton: TritonDevice, weight: Tensor, ids: Tensor, zero_idx: int, record: BoundsRecord | None
) -> Tensor:
    """Rows weight[ids] by gather_descriptor_kernel; the arguments as of `Backend.embedding`."""
    num_embeddings, num_indices = weight.shape[0], ids.numel()
    _require(descriptor_refusal(weight, num_indices))
    output = weight.new_empty(*ids.shape, weight.shape[1])
    if output.numel() == 0:
        return output
    layout = word_layout(weight)
    # Rows of a multiple of 16 bytes are whole words of 4, whatever their dtype.
    word = triton._words[4]
    per_word = layout.word_bytes // 4
    row_words = layout.row_words * per_word
    launch = gather_descriptor_launch(row_words)
    code = _device_code(triton._interpreted)

    def described(tensor: Tensor, num_rows: int, row_stride: int) -> Any:
        words, shape = triton._view(tensor, word), [num_rows, row_words]
        return code.TensorDescriptor(words, shape, [row_stride, 1], [1, launch.BLOCK_D])

    triton._launch(
        code.gather_descriptor,
        (cdiv(num_indices, launch.ROWS), cdiv(row_words, launch.BLOCK_D)),
        weight.device,
        described(weight, num_embeddings, layout.row_stride * per_word),
        ids.contiguous(),
        described(output, num_indices, row_words),
        None if record is None else record.words,
        None if record is None else record.flag,
        num_indices,
        num_embeddings,
        zero_idx,
        **launch.settings,
    )
    return output


def scatter_add(
    triton: TritonDevice, grad_output: Tensor, ids: Tensor, num_embeddings: int, padding_idx: int
) -> Tensor:
    """The gradient [V, D] by scatter_add_descriptor_kernel, for fp32; not deterministic."""
    if grad_output.dtype != torch.float32:
        raise ValueError(f"no bulk additions to {grad_output.dtype}")
    embedding_dim = grad_output.shape[-1]
    grad_weight = grad_output.new_zeros((num_embeddings, embedding_dim))
    if grad_output.numel() == 0 or num_embeddings == 0:
        return grad_weight
    _require(descriptor_refusal(grad_weight, ids.numel()))
    matrix = grad_output.reshape(-1, embedding_dim)
    vec = vector_width(matrix)
    launch = scatter_descriptor_launch(embedding_dim)
    code = _device_code(triton._interpreted)
    block, shape = [1, launch.BLOCK_D], list(grad_weight.shape)
    triton._launch(
        code.scatter_add_descriptor,
        (cdiv(ids.numel(), launch.ROWS), cdiv(embedding_dim, launch.BLOCK_D)),
        ids.device,
        matrix,
        flat_ids(ids),
        code.TensorDescriptor(grad_weight, shape, [embedding_dim, 1], block),
        ids.numel(),
        num_embeddings,
        padding_idx,
        matrix.stride(0) // vec,
        matrix.stride(1),
        D=embedding_dim,
        VEC=vec,
        **launch.settings,
    )
    return grad_weight


def one_hot(
    triton: TritonDevice, grad_output: Tensor, ids: Tensor, num_embeddings: int, padding_idx: int
) -> Tensor:
    """The gradient [V, D] by one_hot_kernel and sum_splits_kernel, for bf16 and fp16."""
    _require(one_hot_refusal(grad_output.dtype, num_embeddings))
    embedding_dim = grad_output.shape[-1]
    grad_weight = grad_output.new_zeros((num_embeddings, embedding_dim))
    if grad_output.numel() == 0 or num_embeddings == 0:
        return grad_weight
    matrix, num_indices = grad_output.reshape(-1, embedding_dim), ids.numel()
    vec = vector_width(matrix)
    launch = one_hot_launch(num_embeddings, embedding_dim)
    split_size = one_hot_split(num_indices, num_embeddings, embedding_dim, launch.BLOCK_N)
    num_splits = cdiv(num_indices, split_size)
    partial = matrix.new_empty((num_splits, num_embeddings, embedding_dim), dtype=torch.float32)
    code = _device_code(triton._interpreted)
    triton._launch(
        code.one_hot,
        (num_splits, cdiv(embedding_dim, launch.BLOCK_D)),
        ids.device,
        matrix,
        flat_ids(ids),
        partial,
        num_indices,
        num_embeddings,
        padding_idx,
        split_size,
        matrix.stride(0) // vec,
        matrix.stride(1),
        D=embedding_dim,
        VEC=vec,
        **launch.settings,
    )
    triton._launch(
        code.sum_splits,
        (cdiv(grad_weight.numel(), SUM_SPLITS.BLOCK),),
        ids.device,
        partial,
        grad_weight,
        num_splits,
        grad_weight.numel(),
        SPLITS=MAX_SPLITS,
        **SUM_SPLITS.settings,
    )
    return grad_weight


def descriptor_refusal(table: Tensor, num_indices: int) -> str | None:
    """What keeps TMA from a table's rows; None: nothing."""
    if table.is_cuda:
        capability = torch.cuda.get_device_capability(table.device)
        if capability < (needed := DESCRIPTOR_CAPABILITY):
            return "compute capability {}.{}; it needs {}.{}".format(*capability, *needed)
    layout = word_layout(table)
    if layout.word_bytes * layout.vec < VECTOR_BYTES or layout.row_stride < layout.row_words:
        return (
            f"rows of {table.shape[1]} x {table.dtype} at strides {table.stride()}; it needs rows "
            f"side by side, at multiples of {VECTOR_BYTES} bytes, and so many bytes long"
        )
    for number, what in ((table.shape[0], "rows"), (num_indices, "ids")):
        if number > MAX_COORDINATE:
            return f"{number} {what}; it takes {MAX_COORDINATE}"
    return None


def one_hot_refusal(dtype: torch.dtype, num_embeddings: int) -> str | None:
    """What of a table keeps its gradient from being a one-hot product; None: nothing."""
    if dtype not in SHORT_DTYPES:
        return f"its tables are not {str(dtype).removeprefix('torch.')}"
    if num_embeddings > MAX_ONE_HOT_ROWS:
        return f"its tables have {MAX_ONE_HOT_ROWS} rows at most"
    return None


@cache
def gather_descriptor_launch(row_words: int) -> GatherDescriptorLaunch:
    """Long rows alone in a program, short ones after one another."""
    block_d = min(next_power_of_2(row_words), DESCRIPTOR_WORDS)
    if block_d == DESCRIPTOR_WORDS:
        return GatherDescriptorLaunch(ROWS=1, BLOCK_D=block_d, STAGES=1)
    in_flight = min(DESCRIPTOR_WORDS // block_d, DESCRIPTOR_ROWS)
    return GatherDescriptorLaunch(ROWS=16, BLOCK_D=block_d, STAGES=in_flight + 1)


@cache
def scatter_descriptor_launch(embedding_dim: int) -> ScatterDescriptorLaunch:
    """512 columns in flight, 16 a thread, in at most 8 rows."""
    block_d = min(next_power_of_2(embedding_dim), 256)
    return ScatterDescriptorLaunch(ROWS=min(512 // block_d, 8), BLOCK_D=block_d)


@cache
def one_hot_launch(num_embeddings: int, embedding_dim: int) -> OneHotLaunch:
    """The table's entry, no wider than the rows are; a tensor core takes at least 16 columns."""
    launch = ONE_HOT[max(next_power_of_2(num_embeddings), min(ONE_HOT))]
    block_d = min(launch.BLOCK_D, max(next_power_of_2(embedding_dim), 16))
    return replace(launch, BLOCK_D=block_d)


def one_hot_split(num_indices: int, num_embeddings: int, embedding_dim: int, block_n: int) -> int:
    """Ids a split of one_hot_kernel, a multiple of block_n.

    It follows from the shapes alone, so the order of the additions is the same on every card.
    """
    splits = min(MAX_SPLITS, MAX_PARTIAL_BYTES // (4 * num_embeddings * embedding_dim))
    size = max(MIN_SPLIT, MIN_SPLIT_PER_ROW * num_embeddings, cdiv(num_indices, max(splits, 1)))
    return cdiv(size, block_n) * block_n


def _require(refusal: str | None) -> None:
    if refusal is not None:
        raise ValueError(refusal)


@cache
def _device_code(interpreted: bool) -> SimpleNamespace:
    """The kernels by name: importing them imports triton, which the benchmark runs without too."""
    if interpreted:
        from .interpreter import complete

        complete()
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import descriptor, one_hot

    return SimpleNamespace(
        TensorDescriptor=TensorDescriptor,
        gather_descriptor=descriptor.gather_descriptor_kernel,
        scatter_add_descriptor=descriptor.scatter_add_descriptor_kernel,
        one_hot=one_hot.one_hot_kernel,
        sum_splits=one_hot.sum_splits_kernel,
    )
