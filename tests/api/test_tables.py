"""Many tables in one launch: torch's answers, exactly; ids out of range; launches; gradients of every kind."""

import copy
import re

import pytest
import torch
from cases import GRADIENT_DTYPES, ID_DTYPES, same_bits
from table_cases import (
    TABLES,
    assert_same,
    by_layer,
    by_torch,
    gradient_like,
    integer_layer,
    integers,
    random_input,
)
from targets import has_kernels, has_method
from tiers import where
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import gpu_embed
from gpu_embed import backends
from gpu_embed.backends._plan import tables as tables_plan
from gpu_embed.bounds import BoundsRecord
from gpu_embed.ops import tables as table_ops
from gpu_embed.tables.batch import TableBatch

pytestmark = where(has_method)

METHODS = ("atomic", "sorted")
every_table = pytest.mark.parametrize("sizes", TABLES.values(), ids=TABLES)


def modes_of(sizes):
    """Of tables of one D and of several: some of each."""
    return (["mean", "max", "sum"] * len(sizes))[: len(sizes)]


def paddings_of(sizes):
    """Not for tables that are averaged; a mean over three ids would be rounded."""
    return ([None, 0, -1] * len(sizes))[: len(sizes)]


@pytest.fixture(params=METHODS)
def method(request, target):
    """Forces one gradient kernel where the backend has two; the others run once."""
    with gpu_embed.use_gradient_method(request.param):
        yield request.param


def embedding_layer(sizes, device, dtype=torch.float32, **arguments):
    """A layer without pooling, of small integers."""
    layer = gpu_embed.TableBatchedEmbedding(sizes, **arguments, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(integers(*layer.weight.shape, low=-4, high=5))
    return layer


# Values.


@every_table
@pytest.mark.parametrize("num_bags", [1, 3])
def test_bags_and_gradients_equal_torchs(target, method, sizes, num_bags):
    """Accumulation: sums and means of each table by its own mode and padding, exact for integers."""
    layer = integer_layer(
        sizes, target.device, mode=modes_of(sizes), padding_idx=paddings_of(sizes)
    )
    ids, offsets = random_input(layer, num_bags)
    assert_same(by_layer(layer, ids, offsets), by_torch(layer, ids, offsets))


@every_table
def test_per_sample_weights_and_their_gradient_equal_torchs(target, method, sizes):
    """As torch: as in EmbeddingBag, for tables that are summed."""
    layer = integer_layer(sizes, target.device, padding_idx=0)
    ids, offsets = random_input(layer, 3)
    weights = integers(len(ids), seed=1).float().to(target.device)
    actual = by_layer(layer, ids, offsets, per_sample_weights=weights)
    assert_same(actual, by_torch(layer, ids, offsets, per_sample_weights=weights))


@pytest.mark.parametrize("sizes", [[(4, 4), (4, 4)], [(4, 4), (4, 8)]], ids=["uniform", "mixed"])
def test_means_leave_padding_out(target, method, sizes):
    """As torch: of the divisor too; a bag of nothing but padding is zero."""
    layer = integer_layer(sizes, target.device, mode="mean", padding_idx=[0, 2])
    ids = [0, 1, 2, 0, 0, 3] + [2, 1, 2, 0, 3, 2, 2]
    offsets = [0, 3, 5, 6, 6 + 3, 6 + 4, 6 + 7]
    ids, offsets = (torch.tensor(values, device=target.device) for values in (ids, offsets))
    assert_same(by_layer(layer, ids, offsets), by_torch(layer, ids, offsets))


@pytest.mark.parametrize("sizes", [TABLES["uniform"], TABLES["mixed"]], ids=["uniform", "mixed"])
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", ID_DTYPES, ids=str)
def test_every_dtype(target, sizes, dtype, ids_dtype):
    """Exact copy and accumulation: every dtype of tables, of ids and of offsets."""
    layer = integer_layer(
        sizes, target.device, dtype, mode=modes_of(sizes), padding_idx=paddings_of(sizes)
    )
    ids, offsets = random_input(layer, 2, ids_dtype)
    actual = by_layer(layer, ids, offsets)
    assert actual.output.dtype == dtype
    assert actual.output.is_contiguous()
    assert_same(actual, by_torch(layer, ids, offsets))


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.bfloat16, 256), (torch.float16, 2048)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("sizes", [[(3, 2), (2, 2)], [(3, 2), (2, 4)]], ids=["uniform", "mixed"])
def test_sums_are_taken_in_fp32(target, sizes, dtype, large):
    """Accumulation: ones are not lost on a sum from which on their dtype counts in twos."""
    layer = integer_layer(sizes, target.device, dtype)
    width = len(layer.tables.table_of_column)
    with torch.no_grad():
        layer["0"].copy_(torch.tensor([[1, 1], [large, large], [0, 0]]))
    ids = torch.zeros(17, dtype=torch.int64, device=target.device)
    ids[0] = 1
    together = torch.tensor([0, 17, 17], device=target.device)
    assert layer(ids, together)[0, :2].tolist() == [large + 16] * 2
    # Each id in a bag of its own, and the second table's bags empty.
    apart = torch.arange(35, device=target.device).clamp(max=17)
    grad_output = torch.ones(17, width, dtype=dtype, device=target.device)
    grad_output[5] = large
    actual = by_layer(layer, torch.zeros_like(ids), apart, grad_output)
    assert actual.tables[0].tolist() == [[large + 16] * 2, [0, 0], [0, 0]]


@pytest.mark.parametrize("sizes", [[(3, 2), (2, 2)], [(3, 2), (2, 4)]], ids=["uniform", "mixed"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_few_long_bags(target, method, sizes, mode, monkeypatch):
    """Long bags are cut into parts, whose sums are added in a second launch."""
    monkeypatch.setattr(tables_plan, "MIN_SPLIT_LENGTH", 4)
    layer = integer_layer(sizes, target.device, mode=["sum", mode], padding_idx=[0, None])
    ids = integers(44, low=0, high=2).to(target.device)
    # A power of two in the bag that is averaged.
    offsets = torch.tensor([0, 12, 44], device=target.device)
    assert_same(by_layer(layer, ids, offsets), by_torch(layer, ids, offsets))


def test_hot_rows_across_chunks(target, method):
    """Accumulation: runs that cross chunks, in tables of different widths, side by side."""
    layer = integer_layer([(1, 4), (2, 12), (1, 8)], target.device)
    ids = torch.zeros(210, dtype=torch.int64)
    ids[100:140] = 1
    offsets = torch.arange(0, 211, 70).to(target.device)
    assert_same(
        by_layer(layer, ids.to(target.device), offsets),
        by_torch(layer, ids, offsets),
    )


@pytest.mark.parametrize("dims", [(4, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_rows_that_int16_holds_as_negative_keys(target, method, dims, mode):
    """As many rows as int16 keys serve, in both tables on both sides of 2**15."""
    sizes = [(40_000, dims[0]), (25_535, dims[1])]
    layer = integer_layer(sizes, target.device, mode=mode, padding_idx=[1, None])
    ids = torch.tensor([39_999, 2**15, 2**15 - 1, 0, 1] * 14 + [25_534, 0, 1] * 10)
    offsets = torch.tensor([0, 4, 70, 90, 100], device=target.device)
    weights = integers(100).float().to(target.device) if mode == "sum" else None
    ids = ids.to(target.device)
    assert_same(
        by_layer(layer, ids, offsets, per_sample_weights=weights),
        by_torch(layer, ids, offsets, per_sample_weights=weights),
    )


def test_many_rows_without_pooling(target, method):
    """As many rows as int16 keys serve."""
    layer = embedding_layer([(40_000, 2), (25_535, 2)], target.device)
    ids = torch.tensor([39_999, 2**15, 2**15 - 1, 0] * 20 + [25_534, 0] * 10, device=target.device)
    output = layer(ids, torch.tensor([0, 80, 100], device=target.device))
    grad_output = gradient_like(output)
    output.backward(grad_output)
    rows = torch.cat([ids[:80], ids[80:] + 40_000])
    assert torch.equal(
        layer.weight.grad, torch.zeros_like(layer.weight).index_add_(0, rows, grad_output)
    )


def test_rows_without_pooling_are_copied_bit_for_bit(target, method):
    """Exact copy; and a gradient for each row but the padding's, which is read as stored."""
    layer = embedding_layer(TABLES["uniform"], target.device, padding_idx=[None, -1, 0])
    ids, offsets = random_input(layer, 3)
    output = layer(ids, offsets)
    table = (torch.arange(len(ids)) >= offsets.cpu()[[3, 6], None]).sum(0).to(target.device)
    rows = ids + torch.tensor([0, 7, 10], device=target.device)[table]
    assert same_bits(output.detach(), layer.weight.detach()[rows])
    grad_output = gradient_like(output)
    output.backward(grad_output)
    expected = torch.zeros_like(layer.weight).index_add_(0, rows, grad_output)
    expected[[9, 10]] = 0
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 8, 12, 130])
def test_rows_without_pooling_in_every_dtype_and_width(target, dtype, dim):
    """Exact copy: any embedding_dim; accumulation: one rounding."""
    layer = embedding_layer([(2, dim), (3, dim)], target.device, dtype)
    ids = torch.tensor([1, 0, 1, 2, 1], device=target.device)
    offsets = torch.tensor([0, 2, 5], device=target.device)
    rows = torch.tensor([1, 0, 3, 4, 3], device=target.device)
    output = layer(ids, offsets)
    assert same_bits(output.detach(), layer.weight.detach()[rows])
    output.backward(gradient_like(output))
    expected = torch.zeros(5, dim, dtype=torch.float64).index_add_(
        0, rows.cpu(), gradient_like(output).cpu().double()
    )
    assert torch.equal(layer.weight.grad.cpu(), expected.to(dtype))


EMPTY = {
    "no ids": ([], [0, 0, 0, 0, 0]),
    "no bags": ([], [0]),
    "ids in no bag": ([1, 1], [0]),
    "empty bags": ([1], [0, 0, 0, 1, 1]),
    "ids behind the last offset": ([1, 0, 9, -9], [0, 1, 1, 1, 2]),
}


@pytest.mark.parametrize(("ids", "offsets"), EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "rows"])
def test_empty(target, method, ids, offsets, pooled):
    """Bounds: no id, no bag, or ids in none: they read as zeros, and are nobody's."""
    make = integer_layer if pooled else embedding_layer
    layer = make([(2, 4), (3, 4)], target.device)
    ids = torch.tensor(ids, dtype=torch.int64, device=target.device)
    offsets = torch.tensor(offsets, device=target.device)
    output = layer(ids, offsets)
    if pooled:
        assert_same(by_layer(layer, ids, offsets), by_torch(layer, ids, offsets))
        return
    last = int(offsets[-1])
    assert output.shape == (len(ids), 4)
    assert not output[last:].any()
    assert output[:last].any(1).all()
    output.sum().backward()
    assert layer.weight.grad.sum() == 4 * last


def test_tables_without_rows(target):
    layer = integer_layer([(0, 4), (2, 4), (0, 4)], target.device)
    ids, offsets = torch.tensor([1, 0], device=target.device), [0, 0, 2, 2]
    offsets = torch.tensor(offsets, device=target.device)
    assert_same(by_layer(layer, ids, offsets), by_torch(layer, ids, offsets))


STRIDES = {
    "expanded": lambda grad: grad[:1, :1].expand_as(grad),
    "transposed": lambda grad: grad.T.contiguous().T,
    "every other": lambda grad: torch.stack([grad, grad], 2).flatten(1)[:, ::2],
    "padded rows": lambda grad: torch.nn.functional.pad(grad, (1, 2))[:, 1:-2],
}


@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("sizes", [TABLES["uniform"], TABLES["mixed"]], ids=["uniform", "mixed"])
def test_gradients_of_any_strides(target, method, sizes, stride):
    layer = integer_layer(sizes, target.device)
    ids, offsets = random_input(layer, 3)
    width = sum(dim for _, dim in sizes)
    grad_output = stride(4.0 * integers(3, width)).to(target.device)
    weights = torch.ones(len(ids), device=target.device)
    actual = by_layer(layer, ids, offsets, grad_output, weights)
    assert_same(actual, by_torch(layer, ids, offsets, grad_output, weights))


def test_non_contiguous_ids_and_offsets(target):
    layer = integer_layer(TABLES["mixed"], target.device)
    ids, offsets = random_input(layer, 3)
    spread = [torch.stack([tensor, tensor + 99], 1)[:, 0] for tensor in (ids, offsets)]
    assert_same(by_layer(layer, *spread), by_torch(layer, ids, offsets))


def test_deterministic_gradients(target):
    """Determinism: bit-identical, without an error, also where rounding depends on the order."""
    layer = integer_layer([(2, 4), (3, 8)], target.device, mode=["mean", "sum"])
    ids, offsets = random_input(layer, 20)
    grad_output = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).to(target.device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (by_layer(layer, ids, offsets, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first.tables, second.tables, strict=True):
        assert same_bits(one, other)
    expected = by_torch(layer, ids, offsets, grad_output)
    for one, other in zip(first.tables, expected.tables, strict=True):
        # At most 80 summands of a row, each below 4, and one division.
        torch.testing.assert_close(one, other, rtol=0, atol=80 * 4 * 2**-23)


# Maxima.


mixed_or_not = pytest.mark.parametrize(
    "sizes", [[(4, 4), (5, 4)], [(4, 4), (5, 8)]], ids=["uniform", "mixed"]
)


@mixed_or_not
def test_the_first_of_equal_maxima_has_the_gradient(target, method, sizes):
    """As torch: as in EmbeddingBag; also where all are negative, and where a row is named twice."""
    layer = integer_layer(sizes, target.device, mode="max")
    with torch.no_grad():
        for name in layer:
            layer[name].fill_(-3)
            layer[name][1, ::2] = -2
    ids = torch.tensor([2, 1, 3, 2, 0, 1, 3, 3, 4, 1], device=target.device)
    offsets = torch.tensor([0, 3, 4, 7, 10], device=target.device)
    actual = by_layer(layer, ids, offsets)
    assert_same(actual, by_torch(layer, ids, offsets))
    assert actual.output[0, :2].tolist() == [-2, -3]
    grad_output = gradient_like(actual.output)
    # Row 1 wins the even columns; row 2, which comes first, wins the odd ones.
    assert torch.equal(actual.tables[0][1, ::2], grad_output[0, :4:2])
    assert torch.equal(actual.tables[0][2, 1::2], grad_output[0, 1:4:2] + grad_output[1, 1:4:2])


@mixed_or_not
def test_maxima_of_numbers_that_are_not_finite(target, method, sizes):
    """NaN is the largest where it comes first, and nowhere else, as in torch."""
    layer = integer_layer(sizes, target.device, mode=["max", "sum"])
    rows = [[torch.nan, 1, -torch.inf, 1], [2, torch.nan, -torch.inf, torch.inf], [3, 3, -3, -3]]
    with torch.no_grad():
        layer["0"][:3] = torch.tensor(rows)
    ids = torch.tensor([0, 1, 2, 1, 0, 2, 0, 1, 0], device=target.device)
    offsets = torch.tensor([0, 3, 6, 8, 9, 9, 9], device=target.device)
    layer_of_three = layer(ids[:8], torch.cat([offsets[:4], offsets[3:4].expand(3)]))
    first = torch.tensor([[torch.nan, 3, -3, torch.inf], [3, torch.nan, -3, torch.inf]])
    assert torch.equal(layer_of_three[:2, :4].cpu().nan_to_num(99), first.nan_to_num(99))
    output = layer_of_three.nan_to_num(0, 0, 0)
    output.backward(gradient_like(output))
    assert layer.weight.grad.isfinite().all()


@pytest.mark.full
def test_gradgradcheck_of_maxima(target):
    """As torch: of any order, forward mode too, beside a table that is averaged."""
    layer = integer_layer(
        [(3, 2), (4, 1)], target.device, torch.float64, mode=["max", "mean"], padding_idx=[2, None]
    )
    with torch.no_grad():
        # No two elements are equal, nor nearly so.
        layer.weight.copy_(7 * torch.arange(layer.weight.numel()) % 23)
    ids = torch.tensor([0, 1, 2, 1, 0, 2], device=target.device)
    offsets = torch.tensor([0, 3, 4, 4, 6], device=target.device)
    look_up = looked_up(layer, ids, offsets)
    weight = layer.weight.detach().clone().requires_grad_()
    assert gradcheck(look_up, weight, check_forward_ad=True, **quick(target))
    assert gradgradcheck(look_up, weight, **quick(target))

    def twice(weight):
        return look_up(weight).pow(2).sum()

    # torch.func, one level in another.
    product = torch.func.jvp(torch.func.grad(twice), (weight.detach(),), (weight.detach(),))[1]
    # A quadratic function's second derivative times the point is its first.
    assert torch.allclose(product, torch.func.grad(twice)(weight.detach()))


@pytest.mark.full
def test_opcheck_of_maxima(target):
    """Drop-in: torch.library's own checks."""
    layer = integer_layer([(3, 1), (2, 2)], target.device, mode=["max", "mean"])
    ids, offsets = random_input(layer, 1)
    shape = layer.layout.shape(True)
    tables = (layer.tables.fields, layer.tables.table_of_column, None, *shape)
    op = table_ops.table_batched_embedding_max
    torch.library.opcheck(op, (layer.weight, ids, offsets, *tables, False, True))
    _, max_positions = op(layer.weight, ids, offsets, *tables, False, True)
    arguments = (layer.weight, None, ids, offsets, max_positions, *tables, False, False)
    torch.library.opcheck(table_ops.table_batched_embedding, arguments)


@pytest.mark.full
def test_compiled_maxima_equal_eager(target):
    """Drop-in: one graph, forward and backward."""
    torch._dynamo.reset()
    eager, compiled = (
        integer_layer(TABLES["mixed"], target.device, mode=["max", "sum", "max"]) for _ in range(2)
    )
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_bags in (2, 3):
        ids, offsets = random_input(eager, num_bags)
        for layer, look_up in ((eager, eager), (compiled, graph)):
            layer.weight.grad = None
            output = look_up(ids, offsets)
            output.backward(gradient_like(output))
        assert torch.equal(compiled.weight.grad, eager.weight.grad)
    torch._dynamo.reset()


# Ids out of range.


BAD = {
    "another table's id": ([1, 0, 3, 1, 5, 0], 4, "'b'", 1, 1, 5),
    "negative": ([1, 0, -1, 1, 3, 0], 2, "'a'", 1, 0, 4),
    "the first table's end": ([1, 4, 3, 1, 3, 0], 1, "'a'", 0, 1, 4),
    "far": ([1, 0, 3, 2**40, 3, 0], 3, "'b'", 1, 0, 5),
}


@pytest.mark.parametrize(
    ("ids", "position", "table", "bag", "place", "rows"), BAD.values(), ids=BAD
)
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "rows"])
def test_the_error_names_the_table(target, pooled, ids, position, table, bag, place, rows):
    """Bounds: an id is checked against its own table, and the message says all there is to know."""
    make = integer_layer if pooled else embedding_layer
    layer = make({"a": (4, 4), "b": (5, 4)}, target.device)
    ids = torch.tensor(ids, device=target.device)
    offsets = torch.tensor([0, 2, 3, 3, 6], device=target.device)
    message = (
        f"found idx to be {ids[position]}, at position {place} of bag {bag} of table {table} "
        rf"\(flat position {position} of the input\); the table has {rows} rows"
    )
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match=message) as error:
        layer(ids, offsets)
    assert isinstance(error.value, RuntimeError)
    gpu_embed.check_bounds()


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "rows"])
def test_ids_out_of_range_touch_nothing(target, method, pooled):
    """Bounds: zero rows, no gradient; the ids and the tables are unchanged. They count for the mean."""
    make = integer_layer if pooled else embedding_layer
    layer = make([(4, 4), (5, 4)], target.device, **({"mode": "mean"} if pooled else {}))
    with torch.no_grad():
        layer.weight.fill_(1)
    good = torch.tensor([1, 3, 4, 4], device=target.device)
    ids = torch.tensor([1, 4, 3, -1, 4, 5, 4, 2**33], device=target.device)
    before = ids.clone()
    offsets = torch.tensor([0, 4, 8], device=target.device)
    with gpu_embed.set_bounds_check("off"):
        output = layer(ids, offsets)
        output.backward(torch.ones_like(output))
    assert torch.equal(ids, before)
    assert torch.equal(layer.weight, torch.ones_like(layer.weight))
    rows = good + torch.tensor([0, 0, 4, 4], device=target.device)
    counts = torch.zeros(9, 4, device=target.device).index_add_(
        0, rows, torch.ones(4, 4, device=target.device)
    )
    if pooled:
        assert output.unique().tolist() == [0.5]
        assert torch.equal(layer.weight.grad, counts / 4)
    else:
        assert output[:, 0].tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
        assert torch.equal(layer.weight.grad, counts)


def test_padding_that_is_out_of_range_elsewhere_is_no_error(target):
    """padding_idx is each table's own: another table's is an id like any other."""
    layer = integer_layer({"a": (4, 4), "b": (2, 4)}, target.device, padding_idx={"a": 3})
    offsets = torch.tensor([0, 1, 2], device=target.device)
    layer(torch.tensor([3, 1], device=target.device), offsets)
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match="of table 'b'"):
        layer(torch.tensor([3, 3], device=target.device), offsets)
    gpu_embed.check_bounds()


BAD_OFFSETS = {
    "decreasing": [0, 3, 1, 4, 6],
    "past the end": [0, 3, 4, 7, 8],
    "far": [0, 2**40, -(2**40), 2**62, 6],
    "not from 0": [2, 3, 4, 5, 6],
    "negative": [0, -5, -5, 3, 6],
}


@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS)
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "rows"])
def test_wrong_offsets_on_the_cpu(offsets, pooled):
    make = integer_layer if pooled else embedding_layer
    layer = make([(4, 4), (5, 4)], "cpu")
    with pytest.raises(RuntimeError, match="offsets"):
        layer(torch.zeros(6, dtype=torch.int64), torch.tensor(offsets))


# Others are given offsets that are checked.
@where(has_kernels)
@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS)
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "rows"])
def test_kernels_keep_wrong_offsets_within_the_ids(target, method, offsets, pooled):
    """Bounds: no read and no write outside, and a record that says which offset it was."""
    make = integer_layer if pooled else embedding_layer
    layer = make([(4, 4), (5, 4)], target.device)
    batch = TableBatch(
        torch.ones(6, dtype=torch.int64, device=target.device),
        torch.tensor(offsets, device=target.device),
        layer.tables.fields,
        layer.tables.table_of_column,
        layer.layout.shape(pooled),
    )
    record = BoundsRecord(torch.device(target.device))
    backend = backends.select(layer.weight.device)
    weight = layer.weight.detach()
    output = backend.table_batched_embedding(weight, None, batch, False, record)
    backend.table_batched_embedding_dense_backward(
        torch.ones_like(output), None, batch, weight.shape
    )
    with pytest.raises(IndexError, match=r"offsets\[\d\] is -?\d+; offsets begin at 0") as error:
        record.raise_if_claimed()
    place, offset = re.search(r"\[(\d)\] is (-?\d+)", str(error.value)).groups()
    assert int(offset) == offsets[int(place)]


# Launches.


triton_alone = where(lambda target: target.backend == "triton")


@pytest.fixture
def launches(target, monkeypatch):
    """The names of the kernels that are launched, in order."""
    backend = backends.select(torch.device(target.device))
    launch = backend._launch
    names = []

    def recording(kernel, *args, **settings):
        names.append(kernel.__name__)
        launch(kernel, *args, **settings)

    monkeypatch.setattr(backend, "_launch", recording)
    return names


@triton_alone
@pytest.mark.parametrize("num_tables", [1, 2, 9])
@pytest.mark.parametrize("dims", [(4,), (4, 8)], ids=["uniform", "mixed"])
def test_launches_do_not_depend_on_the_number_of_tables(target, method, launches, num_tables, dims):
    """One forward launch; keys, one sort, sources and one backward launch; or one atomic launch."""
    sizes = [(3, dims[table % len(dims)]) for table in range(num_tables)]
    layer = integer_layer(sizes, target.device)
    ids, offsets = random_input(layer, 1)
    by_layer(layer, ids[: int(offsets[-1])], offsets)
    is_mixed = len({dim for _, dim in sizes}) > 1
    walk = "table_segment_sum_kernel" if is_mixed else "segment_sum_kernel"
    gradient = {
        "atomic": ["table_scatter_add_kernel"],
        "sorted": ["table_keys_kernel", "table_keys_kernel", walk],
    }[method]
    assert launches == ["table_bag_kernel", *gradient]


@triton_alone
@pytest.mark.parametrize("num_tables", [1, 9])
def test_launches_of_maxima(target, method, launches, num_tables):
    """As many, also beside tables of other modes."""
    layer = integer_layer(
        [(3, 4)] * num_tables, target.device, mode=["max"] + ["mean"] * (num_tables - 1)
    )
    ids, offsets = random_input(layer, 1)
    by_layer(layer, ids, offsets)
    gradient = {
        "atomic": ["table_scatter_add_kernel"],
        "sorted": ["table_keys_kernel", "table_keys_kernel", "table_segment_sum_kernel"],
    }[method]
    assert launches == ["table_bag_kernel", *gradient]


@triton_alone
@pytest.mark.parametrize("num_tables", [1, 2, 9])
def test_launches_without_pooling(target, method, launches, num_tables):
    layer = embedding_layer([(3, 4)] * num_tables, target.device)
    ids, offsets = random_input(layer, 1)
    layer(ids, offsets).sum().backward()
    gradient = {"atomic": "scatter_add_kernel", "sorted": "segment_sum_kernel"}[method]
    assert launches == ["table_gather_kernel", "table_keys_kernel", gradient]


# Gradients of every order and kind.


def quick(target):
    """The interpreter is slow."""
    return {"fast_mode": target.backend in ("triton", "cupy")}


def double_layer(target, **arguments):
    layer = integer_layer([(2, 2), (3, 2)], target.device, torch.float64, **arguments)
    ids = torch.tensor([0, 1, 1, 2, 0, 2], device=target.device)
    offsets = torch.tensor([0, 2, 3, 3, 6], device=target.device)
    return layer, ids, offsets


def looked_up(layer, ids, offsets):
    """The layer as a function of its tables and of the weights."""

    def look_up(weight, per_sample_weights=None):
        arguments = (ids, offsets)
        if per_sample_weights is not None:
            arguments += (per_sample_weights,)
        return torch.func.functional_call(layer, {"weight": weight}, arguments)

    return look_up


@pytest.mark.parametrize("mode", ["sum", ["mean", "sum"]], ids=["sum", "mean and sum"])
def test_gradcheck_and_gradgradcheck(target, mode):
    """As torch: of any order, forward mode too."""
    layer, ids, offsets = double_layer(target, mode=mode, padding_idx=[None, 2])
    look_up = looked_up(layer, ids, offsets)
    weight = layer.weight.detach().clone().requires_grad_()
    assert gradcheck(look_up, weight, check_forward_ad=True, **quick(target))
    assert gradgradcheck(look_up, weight, **quick(target))


@pytest.mark.full
def test_gradgradcheck_of_mixed_tables_and_weights(target):
    """As torch: of both at once."""
    layer = integer_layer([(2, 1), (3, 2)], target.device, torch.float64, padding_idx=[0, None])
    _, ids, offsets = double_layer(target)
    look_up = looked_up(layer, ids, offsets)
    weight = layer.weight.detach().clone().requires_grad_()
    weights = torch.arange(1.0, 7.0, dtype=torch.float64, device=target.device).requires_grad_()
    assert gradcheck(look_up, (weight, weights), check_forward_ad=True, **quick(target))
    assert gradgradcheck(look_up, (weight, weights), **quick(target))


def test_gradgradcheck_without_pooling(target):
    """As torch: padding is read and gets no gradient, of no order."""
    _, ids, offsets = double_layer(target)
    layer = embedding_layer([(2, 2), (3, 2)], target.device, torch.float64, padding_idx=[0, 2])
    grad_output = torch.arange(12.0, dtype=torch.float64, device=target.device).view(6, 2)
    grad_output.requires_grad_()
    output = layer(ids, offsets)
    (grad,) = torch.autograd.grad(output, layer.weight, grad_output, create_graph=True)
    tangent = integers(5, 2).to(grad)
    (second,) = torch.autograd.grad(grad, grad_output, tangent)
    rows = torch.tensor([0, 1, 1, 4, 2, 4], device=target.device)
    expected = tangent[rows]
    expected[(rows == 0) | (rows == 4)] = 0
    assert torch.equal(second, expected)


def test_forward_mode_sees_both_tangents(target):
    layer, ids, offsets = double_layer(target)
    weights = torch.ones(6, dtype=torch.float64, device=target.device)
    look_up = looked_up(layer, ids, offsets)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(layer.weight.detach(), torch.ones_like(layer.weight))
        dual_weights = forward_ad.make_dual(weights, 2 * weights)
        tangent = forward_ad.unpack_dual(look_up(dual, dual_weights)).tangent
    expected = look_up(torch.ones_like(layer.weight), weights)
    expected = expected + 2 * look_up(layer.weight.detach(), weights)
    assert torch.equal(tangent, expected)


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "rows"])
def test_sparse_gradients(target, pooled):
    """One COO entry an id over the rows of all tables: the dense gradient, and no other row is named."""
    ids = torch.tensor([1, 1, 3, 0, 2, 1], device=target.device)
    offsets = torch.tensor([0, 2, 3, 3, 6], device=target.device)
    grads = []
    for sparse in (False, True):
        arguments = {"sparse": sparse, "padding_idx": [1, None]}
        if pooled:
            layer = integer_layer(
                [(4, 4), (3, 4)], target.device, mode=["mean", "sum"], **arguments
            )
        else:
            layer = embedding_layer([(4, 4), (3, 4)], target.device, **arguments)
        output = layer(ids, offsets)
        output.backward(gradient_like(output))
        grads.append(layer.weight.grad)
    dense, sparse = grads
    assert sparse.is_sparse
    assert sparse.shape == layer.weight.shape
    assert torch.equal(sparse.to_dense(), dense)
    assert set(sparse._indices()[0].tolist()) <= {0, 3, 4, 6, 5}


def test_sparse_gradients_times_per_sample_weights(target):
    layer = integer_layer(TABLES["uniform"], target.device, sparse=True, padding_idx=0)
    ids, offsets = random_input(layer, 3)
    weights = integers(len(ids)).float().to(target.device)
    actual = by_layer(layer, ids, offsets, per_sample_weights=weights)
    assert_same(actual, by_torch(layer, ids, offsets, per_sample_weights=weights))


def op_arguments(target, sizes, pooled):
    layer = integer_layer(sizes, target.device, mode="sum", padding_idx=0)
    ids, offsets = random_input(layer, 2)
    return layer, (
        ids,
        offsets,
        None,
        layer.tables.fields,
        layer.tables.table_of_column,
        None,
        *layer.layout.shape(pooled),
    )


OPCHECK = {
    "uniform": (TABLES["uniform"], True),
    "mixed": (TABLES["mixed"], True),
    "rows": (TABLES["uniform"], False),
}
opchecked = pytest.mark.parametrize(("sizes", "pooled"), OPCHECK.values(), ids=OPCHECK)


@pytest.mark.full
@opchecked
def test_opcheck_forward(target, sizes, pooled):
    """Drop-in: torch.library's own checks."""
    layer, batch = op_arguments(target, sizes, pooled)
    weights = torch.ones(len(batch[0]), device=target.device, requires_grad=True)
    arguments = (layer.weight, weights if pooled else None, *batch, False, False)
    torch.library.opcheck(table_ops.table_batched_embedding, arguments)


@pytest.mark.full
@opchecked
def test_opcheck_backward(target, sizes, pooled):
    """Drop-in: torch.library's own checks."""
    layer, batch = op_arguments(target, sizes, pooled)
    shape = (2, len(layer.tables.table_of_column)) if pooled else (len(batch[0]), 4)
    grad_output = torch.ones(shape, device=target.device, requires_grad=True)
    arguments = (grad_output, None, *batch, layer.weight.shape[0])
    torch.library.opcheck(table_ops.table_batched_embedding_dense_backward, arguments)
    if pooled:
        arguments = (grad_output, layer.weight, *batch)
        op = table_ops.table_batched_embedding_sample_weights_backward
        torch.library.opcheck(op, arguments)


@pytest.mark.full
@pytest.mark.parametrize("sizes", [TABLES["uniform"], TABLES["mixed"]], ids=["uniform", "mixed"])
def test_compiled_training_equals_eager(target, sizes):
    """Drop-in: one graph, forward and backward, for any number of ids and bags."""
    torch._dynamo.reset()
    eager, compiled = (integer_layer(sizes, target.device, padding_idx=0) for _ in range(2))
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_bags in (2, 3, 5):
        ids, offsets = random_input(eager, num_bags)
        weights = integers(len(ids)).float().to(target.device)
        for layer, look_up in ((eager, eager), (compiled, graph)):
            layer.weight.grad = None
            output = look_up(ids, offsets, weights)
            output.backward(gradient_like(output))
        assert torch.equal(compiled.weight.grad, eager.weight.grad)
    torch._dynamo.reset()


@pytest.mark.full
def test_compiled_rows_equal_eager(target):
    """Drop-in: without pooling."""
    torch._dynamo.reset()
    layer = embedding_layer(TABLES["uniform"], target.device)
    ids, offsets = random_input(layer, 2)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(ids, offsets), layer(ids, offsets))
    torch._dynamo.reset()


def test_ids_changed_in_place_are_noticed(target):
    layer = integer_layer(TABLES["uniform"], target.device)
    ids, offsets = random_input(layer, 2)
    output = layer(ids, offsets)
    ids[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("way", ["constructed", "copied", "first called"])
def test_a_layer_of_inference_mode_can_be_trained(way, sparse, mode):
    """Drop-in: what the layer made there, of its own, is nothing that a backward saves."""
    sizes = [(5, 4), (6, 2)]
    layer = integer_layer(sizes, mode=mode, sparse=sparse)
    ids, offsets = random_input(layer, 2)
    expected = by_layer(layer, ids, offsets)
    weight = layer.weight.detach().clone()
    with torch.inference_mode():
        if way == "constructed":
            layer = gpu_embed.TableBatchedEmbeddingBag(sizes, mode=mode, sparse=sparse)
        elif way == "copied":
            layer = copy.deepcopy(layer)
        else:
            layer = gpu_embed.TableBatchedEmbeddingBag(
                sizes, mode=mode, sparse=sparse, device="meta"
            )
    layer.weight = torch.nn.Parameter(weight)
    if way == "first called":
        with torch.inference_mode():
            layer(ids, offsets)
    assert_same(by_layer(layer, ids, offsets), expected)


def test_hooks_of_saved_tensors_see_what_a_caller_may_change():
    """No host sync: copies of the layer's own tensors would be compared where gradients are added up."""
    layer = integer_layer([(5, 4), (6, 2)], sparse=True)
    ids, offsets = random_input(layer, 2)
    seen = []

    def pack(tensor):
        seen.append(tensor.data_ptr())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(ids, offsets).sum().backward()
    assert set(seen) == {ids.data_ptr(), offsets.data_ptr()}


def test_a_gradients_node_is_named_after_its_operator():
    """As torch: a profile and an anomaly trace tell a bag from a lookup."""
    layer = integer_layer([(5, 4), (6, 4)])
    assert layer(*random_input(layer, 2)).grad_fn.name() == "TableBatchedEmbeddingBackward"
    bag = gpu_embed.EmbeddingBag(3, 2, mode="max")
    assert bag(torch.tensor([[1, 2]])).grad_fn.name() == "EmbeddingBagMaxBackward"
