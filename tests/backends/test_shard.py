"""Shards of a table: put together they give what the whole table gives, and no shard touches its neighbours' rows."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import (
    FORWARD_DTYPES,
    GRADIENT_DTYPES,
    ID_DTYPES,
    integer_gradient,
    same_bits,
)
from table_cases import integers
from targets import has_kernels, has_method
from tiers import where
from torch import Tensor

import gpu_embed
from gpu_embed import backends
from gpu_embed.backends._plan.gradient_method import RULES
from gpu_embed.bags import Bags
from gpu_embed.bounds import BoundsRecord, Word
from gpu_embed.ops import bag as bag_ops
from gpu_embed.ops import lookup as ops
from gpu_embed.shard import Shard

full = partial(pytest.param, marks=pytest.mark.full)
pytestmark = [
    where(has_method),
    where(lambda target, gather_method: has_kernels(target) == (gather_method != "auto")),
]

V = 12
# Rows of each shard of the table.
DEFAULT_CUT = (5, 0, 7)
CUTS = (DEFAULT_CUT, *map(full, ((4, 4, 4), (0, 11, 0, 1, 0), (1,) * V)))
each_cut = pytest.mark.parametrize("cut", CUTS, ids=str)
# With a padding row: none, or in the first shard, in the last, or between.
each_cut_and_padding = pytest.mark.parametrize(
    ("cut", "padding_idx"),
    [
        (DEFAULT_CUT, -1),
        (DEFAULT_CUT, 5),
        full((4, 4, 4), 0),
        full((0, 11, 0, 1, 0), V - 1),
        full((1,) * V, 6),
    ],
    ids=str,
)
# Of items of 1, 2, 4 and 16 bytes.
DEFAULT_DTYPES = (torch.bool, torch.bfloat16, torch.float32, torch.complex128)
each_gradient_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, full(torch.float64), full(torch.float16)], ids=str
)
STRANGERS = (-1, V, 2**40, -(2**40))


def shards(cut: tuple[int, ...]) -> list[tuple[Shard, slice]]:
    """Each shard and its rows."""
    first_rows = [sum(cut[:i]) for i in range(len(cut))]
    return [
        (Shard(first, V), slice(first, first + n)) for first, n in zip(first_rows, cut, strict=True)
    ]


class Between:
    """Rows [*, D], the `view`, between rows of ones in every bit, which are NaN."""

    def __init__(self, rows: Tensor) -> None:
        shape = (len(rows) + 4, rows.shape[1] * rows.element_size())
        raw = torch.full(shape, 0xFF, dtype=torch.uint8, device=rows.device)
        self.storage = raw.view(rows.dtype)
        self.view = self.storage[2:-2]
        self.view.copy_(rows)

    def holds(self, rows: Tensor) -> bool:
        """Whether the view holds these rows, and everything else is as it was."""
        around = self.storage.view(torch.uint8)[[0, 1, -2, -1]]
        unchanged = rows.numel() == 0 or same_bits(self.view, rows)
        return unchanged and bool((around == 0xFF).all())


def some_ids(device: str, strangers: tuple[int, ...] = ()) -> Tensor:
    """int64 [*]: row r 2 ** (r % 4) times, in an order that mixes the shards, and ids of no row."""
    rows = torch.arange(V).repeat_interleave(2 ** (torch.arange(V) % 4))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    return torch.cat([rows[order], torch.tensor(strangers, dtype=torch.int64)]).to(device)


def raw_rows(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Any bits: NaNs of all patterns, signed zeros."""
    raw = integers(rows, columns * dtype.itemsize, low=0, high=256).to(torch.uint8)
    raw = raw & 1 if dtype == torch.bool else raw
    return raw.view(dtype).to(device)


def owned(indices: Tensor, rows: slice) -> Tensor:
    return (indices >= rows.start) & (indices < rows.stop)


def reference(operation: str, *args: object, **more: object) -> Tensor:
    """What the reference makes of the whole table."""
    return getattr(backends.load("reference"), operation)(*args, **more)


def here(target) -> backends.protocol.Backend:
    return backends.select(torch.device(target.device))


@pytest.fixture(params=["auto", "rows", "flat"])
def gather_method(request, target):
    with gpu_embed.use_gather_method(request.param):
        yield request.param


@pytest.fixture(params=["atomic", "sorted", "sorted_atomic"])
def method(request, target):
    """Forces one gradient kernel where the backend has several; the others run once."""
    with gpu_embed.use_gradient_method(request.param):
        yield request.param


def serves(method, dtype):
    return dtype in (RULES[method].dtypes or GRADIENT_DTYPES)


# Lookups.


def check_lookup(target, weight, indices, zero_idx, cut):
    backend = here(target)
    for shard, rows in shards(cut):
        part = Between(weight[rows])
        wide = indices.long()
        read = owned(wide, rows) & (wide != zero_idx)
        expected = weight.new_zeros((*indices.shape, weight.shape[1]))
        expected[read] = weight[wide[read]]
        output = backend.embedding(part.view, indices, zero_idx, None, shard)
        assert output.is_contiguous()
        assert same_bits(output, expected)
        prepared = backend.prepare_embedding(part.view, shard)
        assert same_bits(prepared(part.view, indices, zero_idx, None), expected)
        assert part.holds(weight[rows])


@each_cut_and_padding
@pytest.mark.parametrize(
    "dtype",
    [dtype if dtype in DEFAULT_DTYPES else full(dtype) for dtype in FORWARD_DTYPES],
    ids=str,
)
def test_rows_of_the_shard_and_zeros_for_all_others(target, gather_method, dtype, cut, padding_idx):
    """Exact copy: bit for bit, in every dtype; other shards' rows and ids of none read as zeros."""
    weight = raw_rows(V, 5, dtype, target.device)
    indices = some_ids(target.device, STRANGERS)[-20:].view(4, 5)
    check_lookup(target, weight, indices, padding_idx, cut)


@pytest.mark.parametrize("columns", [33, 128, *map(full, (1, 4, 300, 4100))])
@pytest.mark.parametrize("dtype", [torch.float32, full(torch.bfloat16), torch.int8], ids=str)
def test_rows_of_every_width(target, gather_method, dtype, columns):
    """Exact copy: tiles, ragged ones, and rows wider than a tile."""
    weight = raw_rows(V, columns, dtype, target.device)
    check_lookup(target, weight, some_ids(target.device, STRANGERS)[-9:], -1, DEFAULT_CUT)


@pytest.mark.parametrize("index_dtype", ID_DTYPES, ids=str)
def test_narrow_ids_do_not_wrap(target, gather_method, index_dtype):
    """Ids less the first row are taken in 64 bits: 200 - 250 is no row of uint8."""
    weight = raw_rows(3, 4, torch.float32, target.device)
    indices = torch.tensor([0, 1, 6, 250, 251, 252, 253, 5], device=target.device).to(index_dtype)
    first_row = 250 if index_dtype in (torch.uint8, torch.int64) else 2**15 - 3
    if first_row > 250:
        indices[3:6] = torch.arange(first_row, 2**15, device=target.device).to(index_dtype)
    output = here(target).embedding(weight, indices, -1, None, Shard(first_row, 2**16))
    assert same_bits(output[3:6], weight)
    assert not output[[0, 1, 2, 6, 7]].any()


@pytest.mark.parametrize("view", [lambda w: w.t(), lambda w: w[::2], lambda w: w[:, 1::2]])
def test_shards_of_any_strides(target, gather_method, view):
    weight = view(raw_rows(8, 8, torch.float32, target.device))
    indices = torch.tensor([3, 5, 2, 6, 7, 11], device=target.device)
    output = here(target).embedding(weight, indices, 6, None, Shard(3, 12))
    expected = weight[[0, 2, 0, 0, min(4, len(weight) - 1), 0]]
    expected[[2, 3]] = 0
    expected[5] = weight[8] if len(weight) > 8 else 0
    if len(weight) <= 4:
        expected[4] = 0
    assert same_bits(output, expected)


# Gradients.


def put_together(target, operation, cut, *args, before, after=()) -> Tensor:
    """The rows of the gradients of all shards."""
    backend = here(target)
    parts = [
        getattr(backend, operation)(*before, rows.stop - rows.start, *after, None, shard)
        for shard, rows in shards(cut)
    ]
    return torch.cat(parts)


# Columns, and how a gradient lies.
GRADIENTS = {
    "contiguous": (8, lambda grad: grad),
    "one row": (8, lambda grad: grad[:1].expand_as(grad)),
    "transposed": (130, lambda grad: grad.t().contiguous().t()),
    "one number": (5, lambda grad: grad[:1, :1].expand_as(grad)),
    "one column apart": (1, lambda grad: torch.stack([grad, grad], 2)[..., 0]),
}


@where(serves)
@where(lambda cut, kind: kind in list(GRADIENTS)[:2] or cut == DEFAULT_CUT)
@each_cut_and_padding
@each_gradient_dtype
@pytest.mark.parametrize("kind", [*list(GRADIENTS)[:2], *map(full, list(GRADIENTS)[2:])])
def test_gradients_put_together(target, method, cut, padding_idx, dtype, kind):
    """Accumulation: each shard has its own rows' sums, exactly, and a row of zeros for padding."""
    indices = some_ids(target.device, STRANGERS)
    columns, view = GRADIENTS[kind]
    grad_output = view(integer_gradient((len(indices), columns), dtype, target.device) + 1)
    before, after = (grad_output, indices), (padding_idx, False)
    expected = reference("embedding_dense_backward", *before, V, *after)
    actual = put_together(target, "embedding_dense_backward", cut, before=before, after=after)
    assert same_bits(actual + 0.0, expected + 0.0)


@pytest.mark.parametrize("method", ["sorted"], indirect=True)
@each_cut_and_padding
@each_gradient_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_scale_grad_by_freq(target, method, cut, padding_idx, dtype, in_place):
    """Counts of all ids of the call, which are powers of two, so that nothing is rounded."""
    indices = some_ids(target.device, STRANGERS)
    grad_output = 8 * integer_gradient((len(indices), 3), dtype, target.device)
    expected = reference("embedding_dense_backward", grad_output, indices, V, padding_idx, True)
    for shard, rows in shards(cut):
        into = Between(torch.ones_like(expected[rows])) if in_place else None
        actual = here(target).embedding_dense_backward(
            grad_output, indices, rows.stop - rows.start, padding_idx, True,
            into and into.view, shard,
        )  # fmt: skip
        assert torch.equal(actual, expected[rows] + in_place)
        assert not in_place or into.holds(expected[rows] + 1)


@where(serves)
@each_cut_and_padding
@each_gradient_dtype
@pytest.mark.parametrize("wide", [False, True])
@where(lambda dtype, wide: not wide or dtype.itemsize == 2)
def test_gradients_in_place(target, method, cut, padding_idx, dtype, wide):
    """Rows that an id names get their sums; bytes of no other row change, neighbours' and padding's neither."""
    indices = some_ids(target.device, STRANGERS)
    indices = indices[indices != 3]
    grad_output = integer_gradient((len(indices), 6), dtype, target.device) + 1
    total = reference(
        "embedding_dense_backward", grad_output.double(), indices, V, padding_idx, False
    )
    into_dtype = torch.float32 if wide else dtype
    for shard, rows in shards(cut):
        number = torch.arange(rows.start, rows.stop, device=target.device)
        named = (number != 3) & (number != padding_idx)
        start = integers(len(number), 6, low=-8, high=8).to(total)
        start[~named] = torch.nan
        into = Between(start.to(into_dtype))
        result = here(target).embedding_dense_backward(
            grad_output, indices, len(number), padding_idx, False, into.view, shard
        )
        assert result is into.view
        expected = into.view.clone()
        expected[named] = (start + total[rows])[named].to(into_dtype)
        assert into.holds(torch.where(named[:, None], expected, start.to(into_dtype)))


@each_cut
def test_counts_put_together(target, cut):
    """Ids of every shard's rows, padding too; ids of no row are counted nowhere."""
    indices = some_ids(target.device, STRANGERS)
    counts = torch.cat(
        [
            here(target).embedding_counts(indices, rows.stop - rows.start, shard)
            for shard, rows in shards(cut)
        ]
    )
    assert counts.dtype == torch.int32
    assert counts.tolist() == [2 ** (row % 4) for row in range(V)]


@pytest.mark.full
@pytest.mark.parametrize("num_rows", [2**15, 2**16 - 2, 2**16 - 1])
def test_sort_keys_of_all_widths(target, method, num_rows):
    """Keys are rows of the shard, and two more: for other shards' ids and for ids of no row."""
    shard = Shard(100, 2**17)
    rows = torch.tensor([0, num_rows - 1, 2**15 - 1, 1, 2**14, 2**15 - 2], device=target.device)
    indices = 100 + rows.repeat(5)
    indices[2::7] = torch.tensor([99, 100 + num_rows, -1, 2**17], device=target.device)
    grad_output = integer_gradient((len(indices), 3), torch.float32, target.device) + 3
    mine = owned(indices, slice(100, 100 + num_rows))
    expected = torch.zeros(num_rows, 3, device=target.device)
    expected.index_add_(0, indices[mine] - 100, grad_output[mine])
    arguments = indices, num_rows, 101, False
    actual = here(target).embedding_dense_backward(grad_output, *arguments, shard=shard)
    assert torch.equal(actual, expected.index_fill(0, rows[3], 0))
    weight = torch.full((num_rows, 1), 8.0, device=target.device)
    here(target).embedding_renorm_(weight, indices, 4.0, 2.0, shard)
    assert torch.equal(weight, torch.full_like(weight, 8.0))
    here(target).embedding_renorm_(weight, indices[mine | (indices == 99)], 4.0, 2.0, shard)
    assert torch.equal(weight.lt(5).flatten().nonzero()[:, 0], (indices[mine] - 100).unique())


# max_norm.


def rows_of_norms(dtype: torch.dtype, device: str) -> Tensor:
    """Rows of 4 equal numbers, whose norms are powers of two from 1/8 on."""
    powers = 2.0 ** (torch.arange(V) - 4)
    return powers[:, None].expand(V, 4).to(dtype).to(device)


@each_cut
@each_gradient_dtype
@pytest.mark.parametrize("kept", [(0, 11, 5, 11, 7), (4, 4), full(())], ids=str)
def test_each_shard_renorms_its_own_rows(target, cut, dtype, kept):
    """As the whole table, bit for bit; rows that are not looked up, and the neighbours', keep their bytes."""
    weight = rows_of_norms(dtype, target.device)
    indices = torch.tensor(kept, dtype=torch.int64, device=target.device)
    expected = weight.clone()
    if kept:
        reference("embedding_renorm_", expected, indices, 2.0, 2.0)
        assert not torch.equal(expected, weight) or kept == (4, 4)
    for shard, rows in shards(cut):
        part = Between(weight[rows])
        # The operator does not call it for nothing.
        if kept and part.view.numel():
            here(target).embedding_renorm_(part.view, indices, 2.0, 2.0, shard)
        assert part.holds(expected[rows])


@each_cut
@pytest.mark.parametrize("bad", [*STRANGERS[:2], *map(full, STRANGERS[2:])])
def test_an_id_of_no_row_stops_every_shards_renorm(target, cut, bad):
    """Bounds: the whole table is unchanged, whoever has the other rows."""
    weight = rows_of_norms(torch.float32, target.device)
    indices = torch.tensor([11, 7, bad, 10, 3], device=target.device)
    for shard, rows in shards(cut):
        part = Between(weight[rows])
        if part.view.numel():
            here(target).embedding_renorm_(part.view, indices, 2.0, 2.0, shard)
        assert part.holds(weight[rows])


# Bags.

# Ids a bag but for padding: powers of two, so that means of integers are exact; two bags are empty, or of padding.
SIZES = (4, 0, 1, 2, 16, 1, 0, 8, 4)
FORMS = ("equal", "last offset", "offsets")
each_form = pytest.mark.parametrize("form", FORMS)
# mode, and whether there are per-sample weights.
MODES = {"sum": ("sum", False), "weights": ("sum", True), "mean": ("mean", False)}
each_form_and_mode = pytest.mark.parametrize(
    ("form", "mode", "weighted"),
    [(form, *mode) for form, mode in zip(FORMS, MODES.values(), strict=True)],
    ids=MODES,
)


def make_bags(form: str, padding_idx: int, device: str) -> Bags:
    """Bags that mix the shards and hold three ids of no row; each second one has padding in front, and behind."""
    generator = torch.Generator().manual_seed(padding_idx + 1)
    lists: list[list[int]] = []
    for b, size in enumerate((4,) * 6 if form == "equal" else SIZES):
        rows = torch.randint(V, (size,), generator=generator)
        if padding_idx >= 0 and form != "equal":
            rows[rows == padding_idx] = V - 1 - padding_idx
        bag = rows.tolist()
        if padding_idx >= 0 and form != "equal" and b % 2:
            bag = [padding_idx, *bag, padding_idx]
        lists.append(bag)
    lists[0][0], lists[-1][-1], lists[2][0] = V, -1, 2**40
    indices = torch.tensor([one for bag in lists for one in bag], device=device)
    if form == "equal":
        return Bags(indices, None, len(lists))
    offsets = torch.tensor([0, *map(len, lists)]).cumsum(0).to(device)
    if form == "offsets":
        return Bags(indices, offsets[:-1], len(lists))
    in_no_bag = indices[:5]
    return Bags(torch.cat([indices, in_no_bag]), offsets, len(lists))


def bag_weights(bags: Bags, weighted: bool, dtype: torch.dtype) -> Tensor | None:
    return integer_gradient((len(bags.indices),), dtype, bags.indices.device) if weighted else None


def small_table(columns: int, dtype: torch.dtype, device: str) -> Tensor:
    return 16 * integers(V, columns, low=-3, high=4).to(device, dtype)


@each_cut_and_padding
@each_form_and_mode
@each_gradient_dtype
def test_bags_of_sums_and_means(target, cut, padding_idx, form, mode, weighted, dtype):
    """Each shard has the part of its own rows, over the ids of all shards; the parts' sum is the bag."""
    bags = make_bags(form, padding_idx, target.device)
    sample_weights = bag_weights(bags, weighted, dtype)
    weight = small_table(5, dtype, target.device)
    arguments = bags, padding_idx, mode, None
    whole = reference("embedding_bag", weight, sample_weights, *arguments)
    total = torch.zeros_like(whole)
    for shard, rows in shards(cut):
        own = torch.zeros_like(weight)
        own[rows] = weight[rows]
        expected = reference("embedding_bag", own, sample_weights, *arguments)
        if weighted:
            # What multiplies other shards' rows takes no part.
            sample_weights = torch.where(owned(bags.indices, rows), sample_weights, torch.inf)
        part = Between(weight[rows])
        output = here(target).embedding_bag(part.view, sample_weights, *arguments, shard)
        assert torch.equal(output, expected)
        assert part.holds(weight[rows])
        sample_weights = bag_weights(bags, weighted, dtype)
        total += output
    assert torch.equal(total, whole)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal numbers; NaN is equal to NaN."""
    return actual.dtype == expected.dtype and torch.allclose(
        actual, expected, rtol=0, atol=0, equal_nan=True
    )


def largest(parts: list[tuple[Tensor, Tensor]], bags: Bags) -> tuple[Tensor, Tensor]:
    """The maxima of the whole table, and their elements, from each shard's."""
    values, positions = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    found = positions >= 0
    is_nan = values.isnan()
    number = torch.where(found & ~is_nan, values, -torch.inf)
    wins = torch.where(is_nan.any(0), is_nan, found & (number == number.amax(0)))
    position, shard = torch.where(wins, positions, len(bags.indices)).min(0)
    nowhere = ~wins.any(0)
    value = torch.where(nowhere, 0, values.gather(0, shard[None])[0])
    ids = bags.indices[position.clamp(max=len(bags.indices) - 1)]
    columns = torch.arange(values.shape[2], device=values.device)
    return value, torch.where(nowhere, -1, ids * values.shape[2] + columns)


# Forms of bags, and what becomes of a table.
EXTREMES = {
    "numbers": (["equal"], lambda table: table),
    "ties": (["last offset"], lambda table: table.clamp(-16, 16)),
    "NaN": (FORMS, lambda table: torch.where(table.abs() == 32, torch.nan, table)),
    "infinities": (["offsets"], lambda table: torch.where(table < 0, -torch.inf, torch.nan)),
}


@where(lambda form, kind: form in EXTREMES[kind][0])
@each_cut_and_padding
@each_form
@each_gradient_dtype
@pytest.mark.parametrize("kind", EXTREMES)
def test_maxima_are_found_among_those_of_the_shards(target, cut, padding_idx, form, dtype, kind):
    """The first of equals of several shards wins, and NaN where it comes first; argmax as of the whole table."""
    bags = make_bags(form, padding_idx, target.device)
    weight = EXTREMES[kind][1](small_table(5, dtype, target.device))
    whole = reference("embedding_bag_max", weight, bags, padding_idx, True, None)
    parts = []
    for shard, rows in shards(cut):
        part = Between(weight[rows])
        arguments = part.view, bags, padding_idx
        found = here(target).embedding_bag_max(*arguments, True, None, shard)
        expected = reference("embedding_bag_max", *arguments, True, None, shard)
        assert all(map(same, found, expected))
        output, positions = here(target).embedding_bag_max(*arguments, False, None, shard)
        assert same(output, found[0])
        assert positions.numel() == 0
        assert part.holds(weight[rows])
        parts.append(found)
    values, elements = largest(parts, bags)
    assert same(values, whole[0])
    assert torch.equal(elements, whole[1])


@where(serves)
@where(lambda cut, in_place: not in_place or cut == DEFAULT_CUT)
@each_cut_and_padding
@each_form_and_mode
@each_gradient_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_of_bags_put_together(
    target, method, cut, padding_idx, form, mode, weighted, dtype, in_place
):
    """Accumulation: means over the ids of all shards; other rows of a gradient that exists keep their bytes."""
    bags = make_bags(form, padding_idx, target.device)
    sample_weights = bag_weights(bags, weighted, dtype)
    grad_output = 16 * integer_gradient((bags.num_bags, 6), dtype, target.device)
    total = reference(
        "embedding_bag_dense_backward",
        grad_output,
        sample_weights,
        bags,
        V,
        padding_idx,
        mode,
        False,
    )
    is_named = torch.zeros(V, dtype=torch.bool, device=target.device)
    is_named[bags.indices[(bags.bag_of() >= 0) & owned(bags.indices, slice(0, V))]] = True
    is_named[padding_idx] &= padding_idx < 0
    for shard, rows in shards(cut):
        start = torch.where(is_named[rows, None], 2.0, torch.nan).expand(-1, 6).to(dtype)
        into = Between(start) if in_place else None
        actual = here(target).embedding_bag_dense_backward(
            grad_output, sample_weights, bags, len(start), padding_idx, mode, False,
            into and into.view, shard,
        )  # fmt: skip
        if in_place:
            assert into.holds(torch.where(is_named[rows, None], start + total[rows], start))
        else:
            assert torch.equal(actual, total[rows])


@each_cut
@each_gradient_dtype
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scale_grad_by_freq_of_bags(target, cut, dtype, mode):
    """Counts of the ids of all bags."""
    indices = some_ids(target.device)
    indices = torch.cat([indices, indices[:3].new_tensor(STRANGERS[:3])])
    bags = Bags(indices, torch.arange(0, len(indices), 16, device=target.device), 3)
    grad_output = 128 * integer_gradient((3, 4), dtype, target.device)
    arguments = -1, mode, True
    expected = reference("embedding_bag_dense_backward", grad_output, None, bags, V, *arguments)
    actual = put_together(
        target,
        "embedding_bag_dense_backward",
        cut,
        before=(grad_output, None, bags),
        after=arguments,
    )
    assert torch.equal(actual, expected)


@each_cut_and_padding
@each_form
@each_gradient_dtype
def test_gradients_of_sample_weights(target, cut, padding_idx, form, dtype):
    """Each position has its gradient from the shard that has its row, and zeros from all others."""
    bags = make_bags(form, padding_idx, target.device)
    weight = small_table(5, dtype, target.device).abs() + 1
    grad_output = integer_gradient((bags.num_bags, 5), dtype, target.device)
    # Times a row that is not read it is no NaN.
    grad_output[4] = torch.inf
    whole = reference(
        "embedding_bag_sample_weights_backward", grad_output, weight, bags, padding_idx
    )
    for shard, rows in shards(cut):
        part = Between(weight[rows])
        actual = here(target).embedding_bag_sample_weights_backward(
            grad_output, part.view, bags, padding_idx, shard
        )
        expected = torch.where(owned(bags.indices, rows), whole, 0)
        assert torch.equal(actual, expected)


# Tables that no memory holds.

FAR = Shard(2**39 + 3, 2**40)
FAR_ROWS = 4
# Rows of the shard, and others': its neighbours, and those whose last 32 bits are the shard's.
FAR_IDS = [FAR.first_row + i for i in (0, 3, 3, 4, -1)] + [3, 2**32 + 6, FAR.num_embeddings - 1, 0]
FAR_ROWS_OF_IDS = [0, 3, 3, *[-1] * 6]


def far(target, dim=4):
    """Ids, the rows in the shard that they name (-1: none), and the shard's rows."""
    indices, rows = (torch.tensor(x, device=target.device) for x in (FAR_IDS, FAR_ROWS_OF_IDS))
    return indices, rows, small_table(dim, torch.float32, target.device)[:FAR_ROWS] + 1


def test_first_rows_past_2_to_the_31(target, method):
    """64-bit addresses: of ids, first row and table; sort keys are of the shard's rows."""
    indices, rows, weight = far(target)
    backend = here(target)
    mine = rows >= 0
    expected = torch.where(mine[:, None], weight[rows], 0)
    assert torch.equal(backend.embedding(weight, indices, -1, None, FAR), expected)
    assert backend.embedding_counts(indices, FAR_ROWS, FAR).tolist() == [1, 0, 0, 2]
    grad_output = integer_gradient((len(rows), 4), torch.float32, target.device) + 3
    total = torch.zeros_like(weight).index_add_(0, rows[mine], grad_output[mine])
    arguments = indices, FAR_ROWS, -1, False
    actual = backend.embedding_dense_backward(grad_output, *arguments, shard=FAR)
    assert torch.equal(actual, total)
    padding_idx = FAR.first_row + 3
    for padding in (padding_idx, 3):
        arguments = indices, FAR_ROWS, padding, False
        actual = backend.embedding_dense_backward(grad_output, *arguments, shard=FAR)
        kept = total.index_fill(0, rows[1], 0) if padding == padding_idx else total
        assert torch.equal(actual, kept)


def test_renorm_of_first_rows_past_2_to_the_31(target):
    indices, _, weight = far(target)
    expected = weight.clone()
    reference("embedding_renorm_", expected, torch.tensor([0, 3], device=target.device), 1.0, 1.0)
    here(target).embedding_renorm_(weight, indices, 1.0, 1.0, FAR)
    assert torch.allclose(weight, expected)
    assert not torch.equal(weight[3], far(target)[2][3])
    assert torch.equal(weight[1:3], far(target)[2][1:3])


def test_bags_of_first_rows_past_2_to_the_31(target, method):
    """64-bit addresses: as above, and padding that has the last 32 bits of a row of the shard."""
    indices, rows, weight = far(target)
    backend = here(target)
    near = Bags(torch.where(rows < 0, FAR_ROWS + 1, rows), None, 3)
    near_shard = Shard(0, FAR_ROWS + 2)
    bags = Bags(indices, None, 3)
    for padding_idx, near_padding in ((-1, -1), (3, -1), (FAR.first_row + 3, 3)):
        sums = "embedding_bag", (weight, None), ("sum", None)
        maxima = "embedding_bag_max", (weight,), (True, None)
        samples = "embedding_bag_sample_weights_backward", (weight[:3], weight), ()
        for operation, before, after in (sums, maxima, samples):
            actual = getattr(backend, operation)(*before, bags, padding_idx, *after, shard=FAR)
            expected = reference(operation, *before, near, near_padding, *after, shard=near_shard)
            for one, other in zip(
                *(x if isinstance(x, tuple) else (x,) for x in (actual, expected)), strict=True
            ):
                assert torch.equal(one, other)
        before, after = (weight[:3], None), ("sum", False)
        assert torch.equal(
            backend.embedding_bag_dense_backward(*before, bags, FAR_ROWS, padding_idx, *after, shard=FAR),
            reference("embedding_bag_dense_backward", *before, near, FAR_ROWS, near_padding, *after, shard=near_shard),
        )  # fmt: skip


# Ids out of the whole table.


def check_record(record: BoundsRecord, position: int, bad: int | None, bag: int, first: int):
    """Nobody claimed it, or the one bad id did: with the whole table's rows."""
    if record.on_cuda:
        torch.cuda.synchronize()
    assert record.flag_view[0] == (bad is not None)
    expected = [1, position, bad, V, bag, first, 0]
    assert record.words.tolist() == ([0] * len(Word) if bad is None else expected)


@pytest.mark.parametrize("bad", [None, *STRANGERS[:2], *map(full, STRANGERS[2:])])
@each_cut
def test_lookups_record_ids_that_no_shard_has(target, cut, bad):
    """Bounds: every shard records the id with the whole table's rows; other shards' ids are no error."""
    weight = small_table(3, torch.float32, target.device)
    indices = torch.arange(V, device=target.device).view(3, 4)
    if bad is not None:
        indices[1, 2] = bad
    for shard, rows in shards(cut):
        record = BoundsRecord(torch.device(target.device))
        output = here(target).embedding(weight[rows], indices, -1, record, shard)
        own = owned(indices, rows)
        assert torch.equal(output, torch.where(own[..., None], weight[indices.clamp(0, V - 1)], 0))
        check_record(record, 6, bad, 0, 0)


@pytest.mark.parametrize("bad", [None, *STRANGERS[:2], *map(full, STRANGERS[2:])])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@each_cut_and_padding
def test_bags_record_ids_that_no_shard_has(target, cut, mode, padding_idx, bad):
    """Bounds: with bag and place; an id in no bag is none."""
    weight = small_table(3, torch.float32, target.device)
    indices = torch.tensor([0, 5, 11, 3, 6, 5, 1, V, -1], device=target.device)
    bags = Bags(indices, torch.tensor([0, 2, 2, 7], device=target.device), 3)
    if bad is not None:
        indices[4] = bad
    for shard, rows in shards(cut):
        record = BoundsRecord(torch.device(target.device))
        if mode == "max":
            here(target).embedding_bag_max(weight[rows], bags, padding_idx, True, record, shard)
        else:
            arguments = bags, padding_idx, mode, record, shard
            here(target).embedding_bag(weight[rows], None, *arguments)
        check_record(record, 4, bad, 3, 2)


def look_up(weight, indices, shard):
    return ops.call_embedding(weight, indices, -1, False, False, shard)


def bag_of_all(mode, weight, indices, shard):
    arguments = indices.view(1, -1), None, False, -1
    if mode == "max":
        return bag_ops.embedding_bag_shard_max(weight.detach(), *arguments, shard)[0]
    return bag_ops.call_embedding_bag(weight, None, *arguments, mode, False, False, shard)


OPERATIONS = {
    "lookup": look_up,
    "sum": partial(bag_of_all, "sum"),
    "max": partial(bag_of_all, "max"),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@each_operation
@pytest.mark.parametrize("columns", [3, 0])
@pytest.mark.parametrize("mode", ["raise", "sync", "off"])
@pytest.mark.parametrize("bad", [False, True])
def test_the_error_names_the_whole_tables_rows(target, operation, mode, columns, bad):
    """Bounds: on every shard, and on those without rows or columns; with ids of other shards there is none."""
    indices = torch.tensor([0, V - 1, 2**40 if bad else 7, 3], device=target.device)
    for shard, rows in shards(DEFAULT_CUT):
        weight = torch.ones(rows.stop - rows.start, columns, device=target.device)
        raises = pytest.raises(IndexError, match=f"{2**40}.* has {V} rows, so ids .* to {V - 1}")
        with gpu_embed.set_bounds_check(mode), raises if bad and mode != "off" else nullcontext():
            operation(weight, indices, list(shard))
            gpu_embed.check_bounds()


@each_operation
def test_no_ids(target, operation):
    indices = torch.empty(0, dtype=torch.int64, device=target.device)
    weight = torch.ones(3, 2, device=target.device, requires_grad=True)
    output = operation(weight, indices, [2, 9])
    assert not output.any()
    if output.requires_grad:
        output.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))
