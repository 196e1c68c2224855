"""Dense gradients that are added to one that exists: exact sums, one rounding, and no other byte changes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import (
    FAR_ROWS,
    INT16_KEYS,
    ids,
    ids_around_the_middle,
    integer_gradient,
    mapped,
    needs_mapping,
    same_bits,
)
from table_cases import integers
from targets import takes_mapped_memory
from tiers import where
from torch import Tensor

import gpu_embed
from gpu_embed import backends
from gpu_embed.backends._plan.gradient_method import RULES
from gpu_embed.bags import Bags
from gpu_embed.dtypes import accumulation
from gpu_embed.tables.batch import TableBatch
from gpu_embed.tables.layout import TableColumn, make_layout

full = partial(pytest.param, marks=pytest.mark.full)
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Of grad_output, and of the gradient that it is added to.
DTYPES = (
    (FP32, FP32),
    (BF16, FP32),
    (BF16, BF16),
    *(full(pair) for pair in ((FP64, FP64), (FP16, FP16), (FP16, FP32))),
)
# How a gradient [V, D] lies in its storage, whose other elements are no part of it.
LAYOUTS = {
    "contiguous": lambda rows, dim: (rows, dim),
    "transposed": lambda rows, dim: (dim, rows),
    "rows apart": lambda rows, dim: (rows, dim + 8),
    "unaligned": lambda rows, dim: (rows, dim + 3),
    "every other row and column": lambda rows, dim: (2 * rows, 2 * dim),
}
VIEWS = {
    "contiguous": lambda storage: storage,
    "transposed": lambda storage: storage.t(),
    "rows apart": lambda storage: storage[:, :-8],
    "unaligned": lambda storage: storage[:, 1:-2],
    "every other row and column": lambda storage: storage[::2, 1::2],
}


@pytest.fixture(params=["atomic", "sorted", full("sorted_atomic")])
def method(request, kernel_target):
    """Forces one gradient kernel."""
    with gpu_embed.use_gradient_method(request.param):
        yield request.param


def serves(method, dtypes):
    return not RULES[method].dtypes or dtypes[1] in RULES[method].dtypes


def canaries(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """NaNs of many patterns: whoever reads one and writes it back leaves other bits."""
    raw = integers(*shape, dtype.itemsize, low=0, high=256).to(torch.uint8)
    raw[..., -2:] |= 0x7F  # an exponent of ones, in every dtype
    raw[..., 0] |= 1  # not an infinity
    return raw.view(dtype)[..., 0].to(device)


class Existing:
    """A gradient that exists: small integers in the named rows, canaries everywhere else."""

    def __init__(self, storage: Tensor, view: Tensor, named: Tensor) -> None:
        self.storage, self.view, self.named = storage, view, named
        view[named] = integers(*view[named].shape, low=-8, high=8).to(view)
        self.before = storage.clone()

    def check(self, result: Tensor, total: Tensor) -> None:
        """`total`: the exact sums, in the accumulation dtype, of the view's shape."""
        actual, expected = self.storage.clone(), self.before
        row = self.view[self.named].clone()
        self.storage.copy_(expected)
        added = self.view[self.named].to(total.dtype) + total.to(self.view.device)[self.named]
        self.view[self.named] = added.to(row.dtype)
        assert result is self.view
        assert same_bits(actual, self.storage)


def existing(layout: str, num_rows: int, dim: int, dtype: torch.dtype, named: Tensor) -> Existing:
    storage = canaries(LAYOUTS[layout](num_rows, dim), dtype, named.device)
    return Existing(storage, VIEWS[layout](storage), named)


def named_rows(indices: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    """bool [V]: whether an id names the row."""
    index = indices.long().view(-1)
    index = index[(index >= 0) & (index < num_embeddings) & (index != padding_idx)]
    named = torch.zeros(num_embeddings, dtype=torch.bool, device=indices.device)
    return named.index_fill_(0, index, True)


def exact(dtype: torch.dtype, operation: str, grad_output: Tensor, *args: object) -> Tensor:
    """What the reference finds in fp64, in the accumulation dtype of the gradient."""
    gradient = getattr(backends.load("reference"), operation)(grad_output.double(), *args)
    return gradient.to(accumulation(dtype))


def check_lookup(target, grad_output, indices, shape, layout, dtype, padding_idx=-1, scale=False):
    num_embeddings = shape[0]
    of = existing(layout, *shape, dtype, named_rows(indices, num_embeddings, padding_idx))
    arguments = (indices, num_embeddings, padding_idx)
    total = exact(dtype, "embedding_dense_backward", grad_output, *arguments, False)
    if scale:
        kept = indices[(indices != padding_idx) & (indices >= 0) & (indices < num_embeddings)]
        total /= torch.bincount(kept.long(), minlength=num_embeddings).clamp(min=1).view(-1, 1)
    backend = backends.select(grad_output.device)
    of.check(
        backend.embedding_dense_backward(grad_output, *arguments, scale, of.view),
        total.to(accumulation(dtype)),
    )


@where(serves)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [5, 8, full(300)])
def test_sums_are_added_exactly(kernel_target, method, dtypes, layout, dim):
    """Accumulation: also to rows that a gradient's strides lead to; padding and ids of no row name none."""
    indices = ids("zipf", 50, 9, kernel_target.device)
    indices[3::7], indices[5] = 2, -1
    indices[40], indices[41] = 9, 2**40
    grad_output = integer_gradient((50, dim), dtypes[0], kernel_target.device)
    check_lookup(kernel_target, grad_output, indices, (9, dim), layout, dtypes[1], padding_idx=2)


@where(serves)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["uniform", full("sorted"), "equal"])
@pytest.mark.parametrize("shape", [(300, 4, 24), (1, 1, 1), full((40, 33, 100))], ids=str)
def test_rows_of_few_ids_and_of_many(kernel_target, method, dtypes, kind, shape):
    """Bytes of every row that no id names stay, whatever they mean."""
    num_embeddings, dim, num_indices = shape
    indices = ids(kind, num_indices, num_embeddings, kernel_target.device)
    grad_output = integer_gradient((num_indices, dim), dtypes[0], kernel_target.device)
    check_lookup(
        kernel_target, grad_output, indices, (num_embeddings, dim), "contiguous", dtypes[1]
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, full(torch.uint8)], ids=str)
@pytest.mark.parametrize("view", ["transposed", "expanded"])
def test_gradients_and_ids_of_other_kinds(kernel_target, method, index_dtype, view):
    """Strides of grad_output, a batch of texts, and narrow ids."""
    indices = ids("zipf", 40, 6, kernel_target.device).to(index_dtype).view(4, 10)
    grad_output = integer_gradient((4, 10, 12), FP32, kernel_target.device) + 1
    if view == "expanded":
        grad_output = grad_output[:, :1].expand(4, 10, 12)
    else:
        grad_output = grad_output.transpose(0, 1).contiguous().transpose(0, 1)
    check_lookup(kernel_target, grad_output, indices, (6, 12), "rows apart", FP32)


@pytest.mark.full
@INT16_KEYS
def test_rows_that_int16_holds_as_negative_keys(kernel_target, method, num_embeddings):
    indices = ids_around_the_middle(num_embeddings, kernel_target.device)
    indices[7], indices[50] = -1, num_embeddings
    grad_output = integer_gradient((100, 4), FP32, kernel_target.device)
    check_lookup(kernel_target, grad_output, indices, (num_embeddings, 4), "contiguous", FP32, 1)


@pytest.mark.parametrize("method", ["sorted"], indirect=True)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [full("equal"), "zipf"])
def test_scale_grad_by_freq_divides_what_is_added(kernel_target, method, dtypes, kind):
    """The sum of the batch, and not what was there: exact, over runs that cross chunks."""
    indices = ids(kind, 50, 6, kernel_target.device)
    grad_output = integer_gradient((50, 3), dtypes[0], kernel_target.device)
    check_lookup(kernel_target, grad_output, indices, (6, 3), "unaligned", dtypes[1], 0, scale=True)


@pytest.mark.parametrize("method", ["sorted"], indirect=True)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_bits_are_those_of_a_sum_that_is_added(kernel_target, method, dtypes):
    """Determinism: what a new gradient would be is added in the accumulation dtype and rounded once."""
    generator = torch.Generator().manual_seed(5)
    grad_output = torch.randn(50, 12, generator=generator).to(kernel_target.device, dtypes[0])
    into = torch.randn(20, 12, generator=generator).to(kernel_target.device, dtypes[1])
    backend = backends.select(grad_output.device)
    arguments = (ids("zipf", 50, 20, kernel_target.device), 20, -1, False)
    acc_dtype = accumulation(dtypes[1])
    total = backend.embedding_dense_backward(grad_output.to(acc_dtype), *arguments)
    expected = (into.to(acc_dtype) + total).to(into.dtype)
    backend.embedding_dense_backward(grad_output, *arguments, into)
    assert same_bits(into, expected)


@pytest.mark.parametrize("method", ["sorted"], indirect=True)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_rows_are_rounded_once(kernel_target, method, dtype):
    """Accumulation: 1 + (eps/2 + eps/2) is 1 + eps, which an addition of each would lose."""
    half = torch.finfo(dtype).eps / 2
    into = torch.ones(1, 2, dtype=dtype, device=kernel_target.device)
    backend = backends.select(into.device)
    backend.embedding_dense_backward(
        torch.full_like(into, half).repeat(2, 1),
        torch.zeros(2, dtype=torch.int64, device=into.device),
        1,
        -1,
        False,
        into,
    )
    assert into.tolist() == [[1 + 2 * half] * 2]


@where(lambda kernel_target: takes_mapped_memory(kernel_target))
@needs_mapping
@pytest.mark.parametrize("columns_apart", [False, True], ids=["rows", "columns"])
def test_gradients_past_2_to_the_31_elements(kernel_target, method, columns_apart):
    """64-bit addresses: of rows, and of columns that lie apart."""
    shape = (8, FAR_ROWS) if columns_apart else (FAR_ROWS, 8)
    into = mapped(*shape, FP32)
    into = into.t() if columns_apart else into
    last = FAR_ROWS - 1
    indices = torch.tensor([last, 3, last])
    grad_output = integer_gradient((3, 8), FP32, "cpu") + 3
    into[last] = 5
    backend = backends.select(into.device)
    backend.embedding_dense_backward(grad_output, indices, FAR_ROWS, -1, False, into)
    assert torch.equal(into[last], 5 + grad_output[0] + grad_output[2])
    assert torch.equal(into[3], grad_output[1])
    assert not into[[2, last - 1]].any()


# Bags.

BAGS = {
    "sum": ("sum", False),
    "weights": ("sum", True),
    "mean": ("mean", False),
}


@where(serves)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", full("rows apart")])
@pytest.mark.parametrize("bags", BAGS.values(), ids=BAGS)
@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_bags_are_added_exactly(kernel_target, method, dtypes, layout, bags, padding_idx):
    """Accumulation: sums, weighted sums and means; some bags are empty, and their lengths are powers of two."""
    mode, weighted = bags
    device = kernel_target.device
    lengths = torch.tensor([4, 0, 1, 2, 8, 1, 0, 16, 4])
    offsets = (lengths.cumsum(0) - lengths).to(device)
    indices = ids("zipf", 36, 7, device) + 3 * (padding_idx >= 0)
    if padding_idx >= 0:
        # A bag's length stays a power of two.
        indices[:2] = padding_idx
    indices[-1] = -1 if mode == "sum" else indices[-1]
    weights = integer_gradient((36,), dtypes[0], device) if weighted else None
    grad_output = 16 * integer_gradient((9, 12), dtypes[0], device)
    arguments = (weights, Bags(indices, offsets, 9), 12, padding_idx, mode, False)
    operation = "embedding_bag_dense_backward"
    total = exact(
        dtypes[1], operation, grad_output, None if weights is None else weights.double(),
        *arguments[1:],
    )  # fmt: skip
    of = existing(layout, 12, 12, dtypes[1], named_rows(indices, 12, padding_idx))
    backend = backends.select(grad_output.device)
    of.check(backend.embedding_bag_dense_backward(grad_output, *arguments, of.view), total)


# Tables.

SIZES = {
    "uniform": [(7, 4), (3, 4), (5, 4)],
    "mixed": [(7, 4), (3, 12), (5, 8)],
    "odd": [(4, 3), (1, 5), (2, 3)],
    "wide": [(3, 132), (2, 260), (1, 4)],
}
MODES = {
    "sum": "sum",
    "mean": ["mean", "sum", "mean"],
    "max": ["sum", "max", "mean"],
}


def make_batch(target, sizes, mode, pooled):
    layout = make_layout(sizes, mode, [None, 0, 2] if sizes[2][0] > 2 else None)
    lengths = torch.tensor([1, 2, 4, 0, 1, 8, 16, 2, 4, 0, 0, 2])
    if not pooled:
        lengths = torch.tensor([20, 13, 7])
    indices = torch.cat(
        [
            integers(int(one.sum()), low=0, high=rows)
            for (rows, _), one in zip(sizes, lengths.view(3, -1), strict=True)
        ]
    )
    # Means count ids of no row too.
    indices[1], indices[-1] = 2**35, -1
    device = torch.device(target.device)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return layout, TableBatch(
        indices.to(device),
        offsets.to(device),
        layout.fields(device),
        layout.table_of_column(device),
        layout.shape(pooled),
    )


def named_elements(batch, layout):
    """bool, of the buffer's shape: whether an id names the row that an element is of."""
    places = batch.places()
    fields = batch.fields[places.table]
    first = fields[:, TableColumn.FIRST_ELEMENT]
    first = first + batch.indices * fields[:, TableColumn.DIM]
    named = torch.zeros(layout.buffer_shape, dtype=torch.bool, device=first.device)
    added = (places.row >= 0) & places.counted & (places.bag >= 0)
    for begin, dim in zip(first[added], fields[added, TableColumn.DIM], strict=True):
        named.view(-1)[int(begin) : int(begin + dim)] = True
    return named


@where(lambda method: method != "sorted_atomic")
@where(serves)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", ["uniform", "mixed", "odd", full("wide")])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@where(lambda mode, weighted: not weighted or mode == "sum")
def test_tables_are_added_exactly(kernel_target, method, dtypes, sizes, mode, weighted):
    """Accumulation: many tables of one width and of several, of every mode; gaps between them stay."""
    layout, batch = make_batch(kernel_target, SIZES[sizes], mode, pooled=True)
    device = batch.indices.device
    backend = backends.select(device)
    if "max" in mode:
        buffer = integers(*layout.buffer_shape).to(device, dtypes[0])
        found = backend.table_batched_embedding_max(buffer, batch, True, None)[1]
        batch = replace(batch, max_positions=found)
    grad_output = 16 * integer_gradient((batch.bags_per_table, batch.width), dtypes[0], device)
    weights = integer_gradient((len(batch.indices),), dtypes[0], device) if weighted else None
    total = exact(
        dtypes[1],
        "table_batched_embedding_dense_backward",
        grad_output,
        None if weights is None else weights.double(),
        batch,
        layout.buffer_shape,
    )
    storage = canaries(layout.buffer_shape, dtypes[1], device)
    of = Existing(storage, storage, named_elements(batch, layout))
    result = backend.table_batched_embedding_dense_backward(
        grad_output, weights, batch, layout.buffer_shape, of.view
    )
    of.check(result, total)


@where(lambda method: method != "sorted_atomic")
@where(serves)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_rows_of_tables_are_added_exactly(kernel_target, method, dtypes):
    layout, batch = make_batch(kernel_target, SIZES["uniform"], "sum", pooled=False)
    device = batch.indices.device
    grad_output = integer_gradient((len(batch.indices), 4), dtypes[0], device)
    arguments = (None, batch, layout.buffer_shape)
    operation = "table_batched_embedding_dense_backward"
    total = exact(dtypes[1], operation, grad_output, *arguments)
    storage = canaries(layout.buffer_shape, dtypes[1], device)
    of = Existing(storage, storage, named_elements(batch, layout))
    of.check(getattr(backends.select(device), operation)(grad_output, *arguments, of.view), total)
