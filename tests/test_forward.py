"""The lookup is a copy, whatever the dtype, shape and strides."""

import pytest
import torch
from cases import FORWARD_DTYPES, ID_DTYPES, same_bits, table

from gpu_embed.functional import embedding

# (num_embeddings, embedding_dim): words of 1 to 8 bytes, whole tiles, ragged ones, wider than a tile.
TABLES = [(7, 2), (5, 1), (9, 50), (6, 128), (4, 300), (3, 33), (2, 4100)]


@pytest.mark.parametrize("dtype", FORWARD_DTYPES, ids=str)
def test_every_dtype_is_copied_bit_for_bit(target, dtype):
    """Contract 1: forward is bit-equal to weight[ids] in every dtype."""
    weight = table(9, 5, dtype, target.device)
    indices = torch.tensor([[8, 0, 3], [3, 3, 7]], device=target.device)
    output = embedding(indices, weight)
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert same_bits(
        output, weight.view(torch.uint8).unflatten(1, (5, -1))[indices].flatten(-2).view(dtype)
    )


@pytest.mark.parametrize("shape", TABLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_every_row_width_is_copied(target, shape, dtype):
    """Contract 1: any embedding_dim."""
    weight = table(*shape, dtype, target.device)
    indices = torch.arange(11, device=target.device) % shape[0]
    assert same_bits(embedding(indices, weight), weight[indices])


def test_nan_patterns_and_negative_zeros_survive(target):
    """Contract 1: the copy is of bits, not of numbers."""
    bits = torch.tensor([[0x7FC00001, -0x80000000], [0x7F800001, 1]], dtype=torch.int32)
    weight = bits.view(torch.float32).to(target.device)
    output = embedding(torch.tensor([1, 0, 1], device=target.device), weight)
    assert same_bits(output, weight[[1, 0, 1]])


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (2, 3), (0, 4), (2, 0), (2, 1, 3), (3073,)], ids=str
)
def test_every_shape_of_ids(target, shape):
    """Contract 1: any id shape, 0-d and empty too."""
    weight = table(5, 6, torch.float32, target.device)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(5, shape, generator=generator).to(target.device)
    output = embedding(indices, weight)
    assert output.shape == (*shape, 6)
    assert same_bits(output, weight[indices])


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_every_dtype_of_ids(target, dtype):
    """Contract 7: int16 and uint8 ids work beyond torch's two dtypes, also where V exceeds their range."""
    weight = table(300, 3, torch.float32, target.device)
    indices = torch.tensor(
        [0, 1, 127, 2, 200 if dtype == torch.uint8 else 99], device=target.device
    )
    assert same_bits(embedding(indices.to(dtype), weight), weight[indices])


@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_narrowest_tables(target, embedding_dim):
    weight = table(4, embedding_dim, torch.float32, target.device)
    indices = torch.tensor([[3, 0]], device=target.device)
    assert same_bits(embedding(indices, weight), weight[indices])


STRIDED_TABLES = {
    "transposed": lambda w: w.t(),
    "every other row": lambda w: w[::2],
    "every other column": lambda w: w[:, ::2],
    "last columns": lambda w: w[:, 1:],
    "reversed by flip": lambda w: w.flip(0),
    "one row, expanded": lambda w: w[:1].expand(6, -1),
    "one column, expanded": lambda w: w[:, :1].expand(-1, 5),
    "off by one item": lambda w: w.reshape(-1)[1:51].view(5, 10),
}


@pytest.mark.parametrize("view", STRIDED_TABLES.values(), ids=STRIDED_TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_tables_of_any_strides(target, view, dtype):
    """Contract 1: any strides of the weight."""
    weight = view(table(8, 10, dtype, target.device))
    indices = torch.tensor([0, 4, 2, 4, 1], device=target.device) % len(weight)
    assert same_bits(embedding(indices, weight), weight[indices])


STRIDED_IDS = {
    "transposed": lambda i: i.t(),
    "every other": lambda i: i[:, ::2],
    "expanded": lambda i: i[:1].expand(4, -1),
    "offset": lambda i: i.reshape(-1)[3:],
}


@pytest.mark.parametrize("view", STRIDED_IDS.values(), ids=STRIDED_IDS)
@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_ids_of_any_strides(target, view, dtype):
    """Contract 1: any strides of the ids."""
    weight = table(6, 4, torch.float32, target.device)
    indices = view((torch.arange(12, device=target.device) % 6).view(3, 4))
    assert same_bits(embedding(indices.to(dtype), weight), weight[indices])


def test_lazy_conjugates_are_resolved(target):
    weight = table(4, 3, torch.complex64, target.device).conj()
    indices = torch.tensor([2, 0], device=target.device)
    assert torch.equal(embedding(indices, weight), weight[indices])


def test_the_padding_row_is_returned_as_stored(target):
    """Contract 7: padding_idx changes the gradient, not the lookup."""
    weight = table(4, 3, torch.float32, target.device)
    indices = torch.tensor([1, 2, 1], device=target.device)
    assert same_bits(embedding(indices, weight, padding_idx=1), weight[indices])
