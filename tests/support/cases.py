"""Tables, ids and gradients that the tests share; all seeded."""

import mmap

import pytest
import torch
from torch import Tensor

FORWARD_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
GRADIENT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)

FAR_ROWS = 2**28 + 5  # of 8 columns: 2**31 + 40 elements
needs_mapping = pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs a POSIX mmap")


def mapped(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A table of zeros whose pages come into being where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, rows * columns * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(rows, columns)


def table(num_embeddings: int, embedding_dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random values, [num_embeddings, embedding_dim]."""
    generator = torch.Generator().manual_seed(num_embeddings * 1000 + embedding_dim)
    values = 4 * torch.randn(num_embeddings, embedding_dim, generator=generator)
    if dtype.is_complex:
        values = torch.complex(values, values.flip(0))
    return values.to(dtype).to(device)


def integer_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Integers in [-2, 2]: up to 128 of them sum exactly in every dtype here, in any order."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).to(dtype).to(device)


def ids(kind: str, num_indices: int, num_embeddings: int, device: str = "cpu") -> Tensor:
    """int64 ids [num_indices]: "uniform", "equal", "sorted", "zipf", "alternating"."""
    generator = torch.Generator().manual_seed(num_indices)
    uniform = torch.randint(num_embeddings, (num_indices,), generator=generator)
    if kind == "equal":
        uniform = torch.full_like(uniform, num_embeddings - 1)
    elif kind == "sorted":
        uniform = uniform.sort().values
    elif kind == "zipf":
        rank = torch.rand(num_indices, generator=generator).pow(4)
        uniform = (rank * num_embeddings).to(torch.int64)
    elif kind == "alternating":
        uniform = torch.arange(num_indices) % 2 * (num_embeddings - 1)
    return uniform.to(device)


# Sort keys of these tables are int16: row numbers less 2**15. The last one's sentinel is the largest key.
INT16_KEYS = pytest.mark.parametrize("num_embeddings", [2**15, 2**16 - 1])


def ids_around_the_middle(num_embeddings: int, device: str = "cpu") -> Tensor:
    """int64 ids [100]: of the table's ends and of both sides of 2**15, each in several chunks."""
    rows = torch.tensor([num_embeddings - 1, 2**15 - 1, 0, min(2**15, num_embeddings - 1), 1])
    return rows.repeat(20).to(device)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal as bytes: NaN patterns and signed zeros too."""
    return actual.shape == expected.shape and torch.equal(
        actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )
