"""The lookup is a copy, whatever the dtype, shape and strides."""

import pytest
import torch
from cases import FORWARD_DTYPES, ID_DTYPES, same_bits, table
from targets import has_kernels, has_method
from tiers import where

import gpu_embed
from gpu_embed import backends
from gpu_embed.functional import embedding
from gpu_embed.settings import GATHER_METHOD

pytestmark = where(has_method)

# (num_embeddings, embedding_dim): words of 1 to 8 bytes, whole tiles, ragged ones, wider than a tile.
TABLES = [(7, 2), (5, 1), (9, 50), (6, 128), (4, 300), (3, 33), (2, 4100)]
# Left alone, a backend takes "rows" or "flat", by the width of the rows; forced, each takes them all.
METHODS = ("auto", "rows", "flat")


@pytest.fixture(params=METHODS)
def method(request, target):
    """Forces one kernel where the backend has several; the others run once."""
    with gpu_embed.use_gather_method(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", FORWARD_DTYPES, ids=str)
def test_every_dtype_is_copied_bit_for_bit(target, method, dtype):
    """Exact copy: forward is bit-equal to weight[ids] in every dtype."""
    weight = table(9, 5, dtype, target.device)
    indices = torch.tensor([[8, 0, 3], [3, 3, 7]], device=target.device)
    output = embedding(indices, weight)
    assert output.dtype == dtype
    assert output.is_contiguous()
    in_bytes = weight.view(torch.uint8).unflatten(1, (5, -1))
    assert same_bits(output, in_bytes[indices].flatten(-2).view(dtype))


@pytest.mark.parametrize("shape", TABLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_every_row_width_is_copied(target, method, shape, dtype):
    """Exact copy: any embedding_dim."""
    weight = table(*shape, dtype, target.device)
    indices = torch.arange(21, device=target.device) % shape[0]
    assert same_bits(embedding(indices, weight), weight[indices])


def test_nan_patterns_and_negative_zeros_survive(target):
    """Exact copy: the copy is of bits, not of numbers."""
    bits = torch.tensor([[0x7FC00001, -0x80000000], [0x7F800001, 1]], dtype=torch.int32)
    weight = bits.view(torch.float32).to(target.device)
    output = embedding(torch.tensor([1, 0, 1], device=target.device), weight)
    assert same_bits(output, weight[[1, 0, 1]])


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (2, 3), (0, 4), (2, 0), (2, 1, 3), (3073,)], ids=str
)
def test_every_shape_of_ids(target, shape):
    """Exact copy: any id shape, 0-d and empty too."""
    weight = table(5, 6, torch.float32, target.device)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(5, shape, generator=generator).to(target.device)
    output = embedding(indices, weight)
    assert output.shape == (*shape, 6)
    assert same_bits(output, weight[indices])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (16,), (33,)], ids=str)
def test_every_number_of_ids(target, method, shape):
    """Exact copy: whatever the kernel, whole programs and ragged ones."""
    weight = table(5, 8, torch.float32, target.device)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(5, shape, generator=generator).to(target.device)
    assert same_bits(embedding(indices, weight), weight[indices])


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_every_dtype_of_ids(target, method, dtype):
    """As torch: int16 and uint8 ids work beyond torch's two dtypes, also where V exceeds their range."""
    weight = table(300, 4, torch.float32, target.device)
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
    "right half": lambda w: w[:, w.shape[1] // 2 :],
    "reversed by flip": lambda w: w.flip(0),
    "one row, expanded": lambda w: w[:1].expand(6, -1),
    "one column, expanded": lambda w: w[:, :1].expand(-1, 5),
    "off by one item": lambda w: w.reshape(-1)[1 : 1 + 5 * w.shape[1]].view(5, -1),
}


@pytest.mark.parametrize("view", STRIDED_TABLES.values(), ids=STRIDED_TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize("columns", [10, 16])
def test_tables_of_any_strides(target, method, view, dtype, columns):
    """Exact copy: any strides of the weight."""
    weight = view(table(8, columns, dtype, target.device))
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
    """Exact copy: any strides of the ids."""
    weight = table(6, 4, torch.float32, target.device)
    indices = view((torch.arange(12, device=target.device) % 6).view(3, 4))
    assert same_bits(embedding(indices.to(dtype), weight), weight[indices])


def test_lazy_conjugates_are_resolved(target):
    weight = table(4, 3, torch.complex64, target.device).conj()
    indices = torch.tensor([2, 0], device=target.device)
    assert torch.equal(embedding(indices, weight), weight[indices])


def test_the_padding_row_is_returned_as_stored(target):
    """As torch: padding_idx changes the gradient, not the lookup."""
    weight = table(4, 3, torch.float32, target.device)
    indices = torch.tensor([1, 2, 1], device=target.device)
    assert same_bits(embedding(indices, weight, padding_idx=1), weight[indices])


@pytest.mark.parametrize("embedding_dim", [4, 1024], ids=["many rows a program", "one"])
def test_ids_without_a_row_give_zeros(target, method, embedding_dim):
    """Bounds: ids out of range, and the one whose rows are to be zeros; nothing else is touched."""
    weight = table(5, embedding_dim, torch.float32, target.device)
    indices = torch.tensor([0, 5, 4, -1, 2, 2**40, 3, -(2**35), 2], device=target.device)
    before, ids_before = weight.clone(), indices.clone()
    output = backends.load(target.backend).embedding(weight, indices, 2, None)
    expected = torch.zeros(9, embedding_dim, device=target.device)
    for n in (0, 2, 6):
        expected[n] = weight[indices[n]]
    assert same_bits(output, expected)
    assert same_bits(weight, before)
    assert same_bits(indices, ids_before)


@pytest.mark.parametrize("embedding_dim", [4, 1024], ids=["many rows a program", "one"])
def test_ids_out_of_range_are_reported(target, method, embedding_dim):
    """Bounds: by every kernel, with the id and its position."""
    weight = table(5, embedding_dim, torch.float32, target.device)
    indices = torch.arange(42, device=target.device).view(2, 21) % 5
    indices[1, 18] = 77
    with (
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match=r"id 77 at position \(1, 18\) .* has 5 rows"),
    ):
        embedding(indices, weight)


def kernels_launched(backend, monkeypatch):
    """The names of the kernels launched from here on, in a list that grows."""
    launched = []

    def launch(kernel, *arguments, **settings):
        launched.append(getattr(kernel, "__name__", None) or kernel.expression.split("<")[0])
        return type(backend)._launch(backend, kernel, *arguments, **settings)

    monkeypatch.setattr(backend, "_launch", launch)
    return launched


@where(has_kernels)
def test_row_numbers_past_32_bits(target, method):
    """64-bit addresses: no number of a row is cut on its way."""
    num_embeddings = 2**31 + 5
    row = table(1, 12, torch.float32, target.device)
    weight = row.expand(num_embeddings, 12)
    indices = torch.tensor([num_embeddings - 1, 0, 2**31], device=target.device)
    assert same_bits(embedding(indices, weight), row.expand(3, 12))


@where(has_kernels)
def test_a_known_table_notices_another_method(target, monkeypatch):
    """Forced choice: what was prepared for one method does not serve another."""
    weight = torch.nn.Parameter(table(5, 3, torch.float32, target.device))
    indices = torch.tensor([4, 0], device=target.device)
    launched = kernels_launched(backends.load(target.backend), monkeypatch)
    for method in ("rows", "flat") * 2:
        with gpu_embed.use_gather_method(method):
            assert same_bits(embedding(indices, weight).detach(), weight.detach()[indices])
        assert launched.pop() == f"gather_{method}_kernel"


@where(has_kernels)
@pytest.mark.parametrize(("embedding_dim", "chosen"), [(12, "flat"), (512, "rows")])
def test_a_forced_method_launches_its_own_kernel(
    target, method, embedding_dim, chosen, monkeypatch
):
    """Forced choice: what is asked for is what runs."""
    backend = backends.load(target.backend)
    launched = kernels_launched(backend, monkeypatch)
    weight = table(5, embedding_dim, torch.float32, target.device)
    backend.embedding(weight, torch.tensor([4, 0], device=target.device), -1, None)
    assert launched == [f"gather_{chosen if method == 'auto' else method}_kernel"]


def test_the_methods_by_name():
    assert GATHER_METHOD.choices == METHODS
    with pytest.raises(ValueError, match="expected one of 'auto', 'rows', 'flat'"):
        gpu_embed.use_gather_method("columns")
