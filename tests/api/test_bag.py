"""Bags: sum, mean and max, forward and backward, against what they are defined as."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import (
    FAR_ROWS,
    GRADIENT_DTYPES,
    ID_DTYPES,
    ids,
    integer_gradient,
    mapped,
    needs_mapping,
    same_bits,
    table,
)
from targets import has_kernels, has_method, takes_mapped_memory
from tiers import where

import gpu_embed
from gpu_embed import TableBatchedEmbeddingBag
from gpu_embed.backends._plan import bag as bag_plan
from gpu_embed.backends._torch import bag as _torch
from gpu_embed.functional import embedding_bag

pytestmark = where(has_method)

MODES = ("sum", "mean", "max")
V = 6
# ids, offsets, include_last_offset, and where each bag begins and ends. Sizes are powers of two, so that means
# of integers are exact; so they are without row 1, the padding of some tests, which fills some bags.
FORMS = {
    "2-D": ([[0, 1, 2, 1], [1, 1, 1, 1], [5, 3, 3, 0]], None, False, [(0, 4), (4, 8), (8, 12)]),
    "one bag": ([4, 0], [0], False, [(0, 2)]),
    "empty ends": (
        [0, 2, 5, 5, 1, 1, 1],
        [0, 0, 4, 4, 5, 7],
        False,
        [(0, 0), (0, 4), (4, 4), (4, 5), (5, 7), (7, 7)],
    ),
    "last offset": ([3, 1, 0, 3], [0, 2, 2, 4], True, [(0, 2), (2, 2), (2, 4)]),
    "ids in no bag": ([3, 1, 0, 3, 5, 5, 2], [0, 2, 4], True, [(0, 2), (2, 4)]),
    "no ids": ([], [0, 0], False, [(0, 0), (0, 0)]),
    "no bags": ([], [], False, []),
    "last offset alone": ([4, 4], [0], True, []),
}
each_form = pytest.mark.parametrize("form", FORMS)
each_mode = pytest.mark.parametrize("mode", MODES)


def bags(form, target, dtype=torch.int64):
    """The arguments of a call, ids in front, and where each bag begins and ends."""
    values, offsets, include_last_offset, ranges = FORMS[form]
    indices = torch.tensor(values, device=target.device).to(dtype)
    if offsets is not None:
        offsets = torch.tensor(offsets, dtype=torch.int64, device=target.device)
    return indices, {"offsets": offsets, "include_last_offset": include_last_offset}, ranges


def defined(weight, indices, ranges, mode, padding_idx=None, per_sample_weights=None):
    """What bags are: rows picked out, scaled and reduced, in fp64; differentiable."""
    weight, indices = weight.double(), indices.flatten().long()
    output = []
    for begin, end in ranges:
        kept = torch.arange(begin, end, device=weight.device)
        if padding_idx is not None:
            kept = kept[indices[kept] != padding_idx % len(weight)]
        rows = weight[indices[kept]]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.flatten().double()[kept, None]
        if len(kept) == 0 or mode == "sum":
            output.append(rows.sum(0))
        elif mode == "mean":
            output.append(rows.sum(0) / len(kept))
        else:
            output.append(rows.max(0).values)
    return torch.stack(output) if output else weight[:0] * 1


def integers(num_embeddings, embedding_dim, dtype, device):
    """A table of integers from -8 to 8, no two of a column alike while there are no more than 17 rows."""
    generator = torch.Generator().manual_seed(embedding_dim)
    columns = [torch.randperm(17, generator=generator) - 8 for _ in range(embedding_dim)]
    rows = torch.arange(num_embeddings) % 17
    return torch.stack(columns, 1)[rows].to(dtype).to(device)


def check(weight, indices, arguments, ranges, mode, grad_seed=0, **more):
    """Output and gradients are exact; everything is of integers, so no rounding is in doubt."""
    ours, exact = (weight.detach().clone().requires_grad_() for _ in range(2))
    output = embedding_bag(indices, ours, mode=mode, **arguments, **more)
    expected = defined(exact, indices, ranges, mode, more.get("padding_idx"))
    assert output.dtype == weight.dtype
    assert output.is_contiguous()
    assert torch.equal(output.double(), expected)
    grad_output = integer_gradient(tuple(output.shape), weight.dtype, weight.device) * 4
    output.backward(grad_output)
    expected.backward(grad_output.double())
    assert ours.grad.dtype == weight.dtype
    assert torch.equal(ours.grad.double(), exact.grad)


@pytest.fixture(params=["atomic", "sorted", "sorted_atomic"])
def method(request, target):
    """Forces one gradient kernel where the backend has several; the others run once."""
    with gpu_embed.use_gradient_method(request.param):
        yield request.param


@each_mode
@each_form
@pytest.mark.parametrize("padding_idx", [None, -5])
def test_every_form_of_bags(target, form, mode, padding_idx):
    """As torch: empty bags and bags of padding alone are 0, and ids in no bag have no gradient."""
    indices, arguments, ranges = bags(form, target)
    weight = integers(V, 5, torch.float32, target.device)
    if form == "no bags":
        assert embedding_bag(indices, weight, mode=mode, **arguments).shape == (0, 5)
        return
    if form == "2-D" and padding_idx is not None:
        indices[2, 3] = 1  # three rows would make thirds
        indices[2, 0] = 1
    check(weight, indices, arguments, ranges, mode, padding_idx=padding_idx)


@each_mode
@pytest.mark.parametrize("form", ["empty ends", "ids in no bag"])
def test_both_gradient_kernels(target, method, form, mode):
    """Determinism: the one of atomics, and the deterministic one."""
    indices, arguments, ranges = bags(form, target)
    weight = integers(V, 36, torch.float32, target.device)
    check(weight, indices, arguments, ranges, mode)


@each_mode
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
def test_every_dtype_of_the_table(target, dtype, mode):
    """Accumulation: exact in every dtype."""
    indices, arguments, ranges = bags("empty ends", target)
    check(integers(V, 8, dtype, target.device), indices, arguments, ranges, mode)


@each_mode
@pytest.mark.parametrize("embedding_dim", [1, 3, 32, 50, 130, 516])
def test_every_width_of_rows(target, embedding_dim, mode):
    """Exact copy, widths: several bags side by side in one program, and several programs a bag."""
    indices, arguments, ranges = bags("empty ends", target)
    weight = integers(V, embedding_dim, torch.float32, target.device)
    check(weight, indices, arguments, ranges, mode)


@pytest.mark.parametrize(
    ("dtype", "offsets_dtype"),
    [*zip(ID_DTYPES, ID_DTYPES, strict=True), *zip(ID_DTYPES, ID_DTYPES[::-1], strict=True)],
    ids=str,
)
def test_every_dtype_of_ids_and_offsets(target, dtype, offsets_dtype):
    """As torch: the two need not agree; int16 and uint8 go beyond torch."""
    indices, arguments, ranges = bags("empty ends", target, dtype)
    arguments["offsets"] = arguments["offsets"].to(offsets_dtype)
    weight = integers(300, 3, torch.float32, target.device)
    indices[3] = 200 if dtype == torch.uint8 else 127
    check(weight, indices, arguments, ranges, "mean")


@pytest.mark.parametrize(
    ("dtype", "offsets_dtype"),
    [(torch.bool, torch.int64), (torch.int8, torch.int32), (torch.int64, torch.bool)],
    ids=str,
)
def test_other_integers_are_promoted_as_by_torch(target, dtype, offsets_dtype):
    indices = torch.tensor([1, 0, 1, 1], device=target.device).to(dtype)
    offsets = torch.tensor([0, 1], device=target.device).to(offsets_dtype)
    weight = integers(V, 3, torch.float32, target.device)
    actual = embedding_bag(indices, weight, offsets, mode="sum")
    assert torch.equal(actual, F.embedding_bag(indices.long(), weight, offsets.long(), mode="sum"))


STRIDED = {
    "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "off by one": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@each_mode
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_tensors_of_any_strides(target, view, mode):
    """Exact copy, strides: of the table, the ids, the offsets, the weights of samples, and the gradient."""
    weight = integers(V, 8, torch.float32, target.device)
    indices, _, ranges = bags("2-D", target)
    check(view(weight), view(indices), {}, ranges, mode)
    indices, arguments, ranges = bags("last offset", target)
    leaf, exact = (weight.clone().requires_grad_() for _ in range(2))
    output = embedding_bag(view(indices), leaf, mode=mode, **arguments)
    expected = defined(exact, view(indices), ranges, mode)
    grad_output = view(integer_gradient((3, 8), torch.float32, target.device) * 4)
    output.backward(grad_output)
    expected.backward(grad_output.double())
    assert torch.equal(leaf.grad.double(), exact.grad)


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, torch.float32) for form in FORMS), *(("empty ends", d) for d in GRADIENT_DTYPES)],
    ids=str,
)
def test_per_sample_weights_and_their_gradient(target, dtype, form, padding_idx):
    """As torch: rows times weights; each weight's gradient is its row times its bag's gradient."""
    indices, arguments, ranges = bags(form, target)
    weight = integers(V, 5, dtype, target.device)
    weights = integer_gradient(tuple(indices.shape), dtype, target.device) + 3
    leaves, exact = (
        [leaf.clone().requires_grad_() for leaf in (weight, weights)] for _ in range(2)
    )
    output = embedding_bag(
        indices,
        leaves[0],
        mode="sum",
        per_sample_weights=leaves[1],
        padding_idx=padding_idx,
        **arguments,
    )
    expected = defined(exact[0], indices, ranges, "sum", padding_idx, exact[1])
    assert torch.equal(output.double(), expected)
    grad_output = integer_gradient(tuple(output.shape), dtype, target.device)
    output.backward(grad_output)
    expected.backward(grad_output.double())
    for leaf, right in zip(leaves, exact, strict=True):
        right = torch.zeros_like(leaf) if right.grad is None else right.grad
        assert torch.equal(leaf.grad.double(), right.double())


@pytest.mark.parametrize("embedding_dim", [1, 33, 200, 516])
def test_per_sample_weights_of_wide_rows(target, embedding_dim):
    weight = integers(V, embedding_dim, torch.float32, target.device)
    indices, arguments, _ = bags("empty ends", target)
    weights = torch.ones(indices.shape, device=target.device, requires_grad=True)
    output = embedding_bag(indices, weight, mode="sum", per_sample_weights=weights, **arguments)
    grad_output = integer_gradient(tuple(output.shape), torch.float32, target.device)
    (grad,) = torch.autograd.grad(output, weights, grad_output)
    bag = torch.tensor([1, 1, 1, 1, 3, 4, 4], device=target.device)
    assert torch.equal(grad, (weight[indices] * grad_output[bag]).sum(1))


def test_what_takes_no_part_cannot_spoil_the_rest(target):
    """NaN in the padding's row, or in its weight, is as good as not there."""
    weight = integers(V, 3, torch.float32, target.device)
    weight[1] = float("nan")
    weights = torch.tensor([1.0, float("nan"), 2.0], device=target.device).requires_grad_()
    indices = torch.tensor([0, 1, 4], device=target.device)
    offsets = torch.tensor([0], device=target.device)
    leaf = weight.clone().requires_grad_()
    output = embedding_bag(
        indices, leaf, offsets, mode="sum", per_sample_weights=weights, padding_idx=1
    )
    assert torch.equal(output, (weight[0] + 2 * weight[4])[None])
    output.sum().backward()
    assert torch.equal(weights.grad[[0, 2]], weight[[0, 4]].sum(1))
    assert weights.grad[1] == 0
    assert torch.equal(leaf.grad.sum(1), torch.tensor([3.0, 0, 0, 0, 6, 0], device=target.device))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_weight_of_what_takes_no_part_has_no_gradient(target, bad):
    """As torch, whatever the bag's gradient is."""
    weight = integers(V, 3, torch.float32, target.device)
    weights = torch.ones(2, device=target.device, requires_grad=True)
    indices, offsets = (torch.tensor(ids, device=target.device) for ids in ([1, 4], [0]))
    output = embedding_bag(
        indices, weight, offsets, mode="sum", per_sample_weights=weights, padding_idx=1
    )
    output.backward(torch.full_like(output, bad))
    assert weights.grad[0] == 0
    assert not weights.grad[1].isfinite()


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_once(target, dtype, mode):
    """Accumulation: 1 + 7 * eps/2 is not 1; the mean is divided before that rounding."""
    eps = torch.finfo(dtype).eps
    weight = torch.tensor([[1.0], [eps / 2]], dtype=dtype, device=target.device)
    indices = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]], device=target.device)
    exact = (1 + 3.5 * eps) / (8 if mode == "mean" else 1)
    expected = torch.tensor([[exact]], dtype=torch.float64).to(dtype)
    assert torch.equal(embedding_bag(indices, weight, mode=mode).cpu(), expected)


def stops_growing_at(dtype):
    """The integer to which 16-bit sums of ones would add up, and no further."""
    return 2 / torch.finfo(dtype).eps


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_are_rounded_to_even(target, dtype, weighted):
    """Accumulation: halfway between two numbers the even one is stored; numbers from here on are 2 apart."""
    most = stops_growing_at(dtype)
    rows = torch.tensor([[most], [most + 2], [1]], dtype=dtype).expand(3, 2).contiguous()
    indices = torch.tensor([[0, 2], [1, 2]], device=target.device)
    scales = torch.ones(2, 2, dtype=dtype, device=target.device) if weighted else None
    weight = rows.to(target.device)
    output = embedding_bag(indices, weight, mode="sum", per_sample_weights=scales)
    assert output[:, 0].tolist() == [most, most + 4]
    tables = TableBatchedEmbeddingBag([(3, 2)], dtype=dtype, device=target.device)
    with torch.no_grad():
        tables.weight.copy_(weight)
    offsets = torch.tensor([0, 2, 4], device=target.device)
    scales = None if scales is None else scales.flatten()
    output = tables(indices.flatten(), offsets, per_sample_weights=scales)
    assert output[:, 0].tolist() == [most, most + 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sums_keep_growing(target, dtype):
    """Accumulation: sums are taken in fp32."""
    most = stops_growing_at(dtype)
    weight = torch.tensor([[most], [1]], dtype=dtype, device=target.device)
    indices = torch.tensor([[0] + [1] * 8], device=target.device)
    assert embedding_bag(indices, weight, mode="sum").item() == most + 8


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [*((mode, torch.bfloat16) for mode in MODES), ("max", torch.float16)],
    ids=str,
)
def test_gradients_keep_growing(target, dtype, mode):
    """Accumulation: the gradients of one row from several bags are summed in fp32; for max too."""
    most = stops_growing_at(dtype)
    weight = torch.ones(2, 2, dtype=dtype, device=target.device, requires_grad=True)
    indices = torch.ones(9, 1, dtype=torch.int64, device=target.device)
    output = embedding_bag(indices, weight, mode=mode)
    grad_output = torch.ones_like(output)
    grad_output[0] = most
    output.backward(grad_output)
    assert weight.grad.tolist() == [[0, 0], [most + 8, most + 8]]


@where(lambda method, dtype: "atomic" not in method or dtype.itemsize > 2)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
def test_random_sums_stay_within_the_bound_of_fp32(target, method, dtype, mode):
    """Accumulation: |actual - exact| <= (count + 2) * eps32 * sum(|terms|), and half an ulp for the rounding."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 5, generator=generator).to(dtype).to(target.device).requires_grad_()
    indices = ids("zipf", 60, 7, target.device)
    offsets = torch.tensor([0, 7, 30, 30, 31], device=target.device)
    output = embedding_bag(indices, weight, offsets, mode=mode)
    grad_output = torch.randn(output.shape, generator=generator).to(output)
    output.backward(grad_output)

    def exact(weight, grad_output):
        leaf = weight.detach().double().requires_grad_()
        output = F.embedding_bag(indices, leaf, offsets, mode=mode)
        output.backward(grad_output.double())
        return output.detach(), leaf.grad

    for actual, right, magnitude in zip(
        (output, weight.grad),
        exact(weight, grad_output),
        exact(weight.detach().abs(), grad_output.abs()),
        strict=True,
    ):
        bound = 62 * torch.finfo(torch.float32).eps * magnitude
        bound += torch.finfo(dtype).eps / 2 * right.abs()
        assert ((actual.double() - right).abs() <= bound).all()


# Long bags.


@pytest.fixture
def cut(monkeypatch):
    """Bags of more than 8 ids are cut."""
    monkeypatch.setattr(bag_plan, "MAX_WHOLE_BAG", 8)
    monkeypatch.setattr(bag_plan, "MAX_WHOLE_MEAN", 1)
    monkeypatch.setattr(bag_plan, "MIN_BAG_CHUNK", 8)
    monkeypatch.setattr(bag_plan, "MAX_BAG_CHUNK", 8)


# Short, empty, long, of one chunk and one more, over many chunks; where one ends, the next may begin in the chunk.
CUT_FORMS = {
    "skewed": ([0, 3, 3, 20, 28, 37, 70, 70], False),
    "ids in no bag": ([0, 17, 18, 60], True),
    "one bag": ([0], False),
    "equal lengths": (None, False),
}


@pytest.mark.usefixtures("cut")
@each_mode
# Several programs across a row: once is enough.
@where(lambda embedding_dim, form: embedding_dim <= 128 or form == "skewed")
@pytest.mark.parametrize("form", CUT_FORMS)
@pytest.mark.parametrize(
    ("dtype", "padding_idx", "embedding_dim"),
    [(torch.float32, None, 5), (torch.bfloat16, 1, 5), (torch.float32, 1, 130)],
    ids=str,
)
def test_long_bags_are_cut(target, dtype, padding_idx, embedding_dim, form, mode):
    """Sums of integers are exact, and so the same as those of whole bags; the first maximum is kept."""
    weight = integers(V, embedding_dim, dtype, target.device)
    indices = ids("zipf", 90, V, target.device)
    # A part of padding alone.
    indices[40:56] = 1
    offsets, include_last_offset = CUT_FORMS[form]
    ends = [*(offsets or [0, 30, 60]), *([] if include_last_offset else [90])]
    if offsets is None:
        indices = indices.view(3, 30)
    else:
        offsets = torch.tensor(offsets, device=target.device)
    arguments = {"offsets": offsets, "include_last_offset": include_last_offset}
    output = embedding_bag(indices, weight, mode=mode, padding_idx=padding_idx, **arguments)
    ranges = list(itertools.pairwise(ends))
    expected = defined(weight, indices, ranges, mode, padding_idx)
    assert torch.equal(output, expected.float().to(dtype))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_cut_bags_with_weights_of_samples(target, padding_idx):
    weight = integers(V, 36, torch.float32, target.device)
    indices, weights = ids("uniform", 40, V, target.device), torch.arange(40.0) - 20
    output = embedding_bag(
        indices,
        weight,
        torch.tensor([0, 5], device=target.device),
        mode="sum",
        per_sample_weights=weights.to(target.device),
        padding_idx=padding_idx,
    )
    expected = defined(weight, indices, [(0, 5), (5, 40)], "sum", padding_idx, weights.to(weight))
    assert torch.equal(output.double(), expected)


@pytest.mark.usefixtures("cut")
def test_cut_bags_without_ids_that_count_are_zero(target):
    weight = integers(V, 5, torch.float32, target.device)
    indices = torch.full((30,), 1, device=target.device)
    offsets = torch.tensor([0, 0, 20], device=target.device)
    for mode in MODES:
        assert not embedding_bag(indices, weight, offsets, mode=mode, padding_idx=1).any()


def test_cuts_follow_shapes():
    """Where a bag may be long, and never by what the offsets say."""
    for shape, num_offsets, expected in (
        ((512,), 5, 0),
        ((513,), 5, 64),
        ((16_000,), 500, 0),
        ((16_001,), 500, 64),
        ((1, 512), None, 0),
        ((1, 513), None, 64),
        ((2**12, 512), None, 0),
        ((2**20,), 5, 512),
        ((1, 2**20), None, 512),
        ((2**31 + 1,), 5, 1024),
    ):
        indices = torch.empty(shape, dtype=torch.int64, device="meta")
        offsets = None if num_offsets is None else indices.new_empty(num_offsets)
        bags = gpu_embed.bags.make_bags(indices, offsets, False)
        assert bag_plan.bag_chunk_length(bags) == expected, shape


# max.


def test_the_first_of_equal_maxima_gets_the_gradient(target, method):
    """As torch: rows 2 and 0 are equal; which of them is met first decides, as in torch."""
    values = torch.tensor([[1.0, 5.0], [0.0, 9.0], [1.0, 5.0]], device=target.device)
    for row, first in (([2, 0, 1], 2), ([0, 2, 1], 0), ([1, 0, 2], 0)):
        weight = values.clone().requires_grad_()
        indices = torch.tensor([row], device=target.device)
        embedding_bag(indices, weight, mode="max").sum().backward()
        assert weight.grad[:, 0].nonzero().tolist() == [[first]]
        assert weight.grad[:, 1].tolist() == [0, 1, 0]


def test_an_id_twice_in_a_bag_gets_the_gradient_of_a_maximum_once(target, method):
    weight = integers(V, 3, torch.float32, target.device).requires_grad_()
    indices = torch.tensor([[2, 2, 2], [2, 2, 2]], device=target.device)
    embedding_bag(indices, weight, mode="max").sum().backward()
    assert weight.grad.sum(1).tolist() == [0, 0, 6, 0, 0, 0]


nan, inf = float("nan"), float("inf")
# One bag each; 8 stands for the padding, whose row would win.
SPECIAL = {
    "NaN first": [nan, 1, inf],
    "NaN later": [1, nan, 0],
    "NaN and then larger": [1, nan, 3],
    "NaN alone": [nan],
    "NaN behind padding": [8, nan, 1],
    "-inf": [-inf, -inf],
    "-inf and NaN": [-inf, nan, -inf],
    "zeros": [-0.0, 0.0],
    "negative": [-3, -2, -4],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values_compare_as_in_torch(target, dtype):
    """As torch: a NaN stays where it comes first, and is passed over where it does not."""
    values = torch.tensor([0.0, *itertools.chain(*SPECIAL.values())], dtype=dtype)
    weight = values[:, None].repeat(1, 3)
    weight[0] = 100
    indices = torch.arange(len(values))[1:]
    indices[values[1:] == 8] = 0
    sizes = torch.tensor([len(bag) for bag in SPECIAL.values()])
    offsets = sizes.cumsum(0) - sizes
    ours, theirs = (weight.to(d).clone().requires_grad_() for d in (target.device, "cpu"))
    on_target = [tensor.to(target.device) for tensor in (indices, offsets)]
    output = embedding_bag(on_target[0], ours, on_target[1], mode="max", padding_idx=0)
    expected = F.embedding_bag(indices, theirs, offsets, mode="max", padding_idx=0)
    # Which NaN, the backends need not agree on.
    assert torch.equal(output.isnan().cpu(), expected.isnan())
    assert same_bits(*(o.detach().cpu().nan_to_num(7) for o in (output, expected)))
    output.backward(torch.ones_like(output))
    expected.backward(torch.ones_like(expected))
    assert torch.equal(ours.grad.cpu(), theirs.grad)


def test_maxima_by_scattering_treat_nan_alike():
    """The torch backend's way on CUDA, and for ids out of range."""
    values = torch.tensor([0.0, *itertools.chain(*SPECIAL.values())])
    indices = torch.arange(len(values))[1:]
    indices[values[1:] == 8] = 0
    sizes = torch.tensor([len(bag) for bag in SPECIAL.values()])
    bags = gpu_embed.bags.make_bags(indices, sizes.cumsum(0) - sizes, False)
    results = [
        _torch._max_by_scatter(values[:, None], bags, 0, True, False),
        gpu_embed.backends.load("reference").embedding_bag_max(
            values[:, None], bags, 0, True, None
        ),
    ]
    assert torch.equal(*(output.nan_to_num(7) for output, _ in results))
    assert torch.equal(*(max_elements for _, max_elements in results))


def test_wrong_offsets_are_clamped_by_torchs_operators():
    """Bounds: on CUDA nobody looked at them before."""
    for offsets in ([0, 2, 99], [0, -7, 2], [1, 2, 3]):
        bags = gpu_embed.bags.Bags(torch.arange(3), torch.tensor(offsets), 3)
        begin, end = bags.ends()
        assert begin[0] == 0
        assert 0 <= min(begin.min(), end.min()) <= max(begin.max(), end.max()) <= 3
        assert bags.bag_of().max() < 3


# Addresses.


@needs_mapping
@where(takes_mapped_memory)
@pytest.mark.parametrize("embedding_dim", [8, 1])
def test_rows_past_2_to_the_31_elements(target, embedding_dim):
    """64-bit addresses: a row's address is computed in 64 bits. The table costs an address range alone."""
    far = FAR_ROWS * 8 // embedding_dim
    weight = mapped(far, embedding_dim, torch.float32)
    weight[-1], weight[-2], weight[3] = 1, 4, 2
    indices = torch.tensor([far - 1, 3, far - 2, far - 1])
    offsets = torch.tensor([0, 2])
    weights = torch.ones(4, requires_grad=True)
    output = embedding_bag(indices, weight, offsets, mode="sum", per_sample_weights=weights)
    assert output.tolist() == [[3] * embedding_dim, [5] * embedding_dim]
    output.sum().backward()
    assert weights.grad.tolist() == [embedding_dim * n for n in (1, 2, 4, 1)]
    bags = gpu_embed.bags.make_bags(indices, offsets, False)
    backend = gpu_embed.backends.select(torch.device("cpu"))
    largest, max_elements = backend.embedding_bag_max(weight, bags, -1, True, None)
    assert largest.tolist() == [[2] * embedding_dim, [4] * embedding_dim]
    assert max_elements[:, 0].tolist() == [3 * embedding_dim, (far - 2) * embedding_dim]


# Arguments.


@each_mode
def test_a_bag_as_large_as_a_program(target, mode):
    """All positions of a program in one bag: padding is not counted there either."""
    weight = integers(V, 3, torch.float32, target.device)
    indices = torch.tensor([0, 1, 2, 1, 2, 5], device=target.device)
    offsets = torch.tensor([0], device=target.device)
    check(weight, indices, {"offsets": offsets}, [(0, 6)], mode, padding_idx=1)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("form", ["2-D", "empty ends", "ids in no bag"])
def test_scale_grad_by_freq_divides_by_the_count(target, form, padding_idx, mode):
    """As torch: by how often the id is in a bag. torch's CPU kernel divides by another id's count."""
    indices, arguments, ranges = bags(form, target)
    weight, exact = (
        integers(V, 3, torch.float64, target.device).requires_grad_() for _ in range(2)
    )
    arguments |= {"mode": mode, "padding_idx": padding_idx}
    output = embedding_bag(indices, weight, scale_grad_by_freq=True, **arguments)
    grad_output = integer_gradient(tuple(output.shape), torch.float64, target.device)
    output.backward(grad_output)
    defined(exact, indices, ranges, mode, padding_idx).backward(grad_output)
    counts = indices.flatten()[: ranges[-1][1]].bincount(minlength=V).clamp(min=1)
    # Terms are rounded where torch's operators multiply by 1 / count.
    assert torch.allclose(weight.grad, exact.grad / counts[:, None], rtol=2**-50, atol=2**-50)


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_counts_over_chunks(target, padding_idx):
    """The same over runs of ids that cross the chunks of the sorted gradient."""
    indices = ids("zipf", 150, 5, target.device)
    weight = torch.zeros(5, 3, device=target.device, requires_grad=True)
    offsets = torch.arange(0, 150, 10, device=target.device)
    arguments = {"mode": "sum", "padding_idx": padding_idx}
    output = embedding_bag(indices, weight, offsets, scale_grad_by_freq=True, **arguments)
    output.sum().backward()
    # Each row's gradient is count / count.
    expected = torch.ones(5, 3, device=target.device)
    if padding_idx is not None:
        expected[padding_idx] = 0
    close = {"rtol": 0, "atol": 150 * 2 * 2**-24 if target.backend == "torch" else 0}
    assert torch.allclose(weight.grad, expected, **close)


def test_a_row_in_no_bag_has_no_gradient_however_often_it_is_named(target):
    """Not a sum of nothing divided by a count of nothing, also over several chunks of the sorted gradient."""
    indices = torch.cat([torch.tensor([0, 0]), torch.full((100,), 3)]).to(target.device)
    offsets = torch.tensor([0, 2], device=target.device)
    weight = torch.zeros(5, 3, device=target.device, requires_grad=True)
    arguments = {"mode": "sum", "include_last_offset": True, "scale_grad_by_freq": True}
    embedding_bag(indices, weight, offsets, **arguments).sum().backward()
    assert weight.grad.sum(1).tolist() == [3, 0, 0, 0, 0]


@each_mode
def test_max_norm_scales_rows_first(target, mode):
    """As torch: the rows in bags, in place, and those of padding too."""
    weight = integers(V, 4, torch.float64, target.device)
    ours, theirs = weight.clone(), weight.cpu().clone()
    indices = torch.tensor([1, 0, 3, 1], device=target.device)
    offsets = torch.tensor([0, 3], device=target.device)
    arguments = {"mode": mode, "max_norm": 2.5, "norm_type": 1, "padding_idx": 3}
    output = embedding_bag(indices, ours, offsets, **arguments)
    expected = F.embedding_bag(indices.cpu(), theirs, offsets.cpu(), **arguments)
    assert torch.allclose(ours.cpu(), theirs, rtol=1e-14)
    assert torch.allclose(output.cpu(), expected, rtol=1e-14)
    assert torch.equal(ours[[2, 4, 5]], weight[[2, 4, 5]])


@pytest.mark.parametrize("form", ["2-D", "empty ends", "last offset"])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_sparse_gradients_are_torchs(target, form, mode, padding_idx):
    """As torch: one entry an id, in input order, duplicates kept, padding dropped, uncoalesced.

    No host sync: not on CUDA, where torch waits for the GPU to drop it, and where it is zeros here.
    """
    indices, arguments, _ = bags(form, target)
    arguments |= {"padding_idx": padding_idx, "sparse": True, "mode": "sum"}
    if mode == "mean":
        arguments["mode"] = "mean"
    if mode == "weighted":
        weights = integer_gradient(tuple(indices.shape), torch.float64, target.device)
        arguments["per_sample_weights"] = weights
    ours, theirs = (integers(V, 3, torch.float64, target.device).requires_grad_() for _ in range(2))
    output = embedding_bag(indices, ours, **arguments)
    grad_output = integer_gradient(tuple(output.shape), torch.float64, target.device) * 4
    output.backward(grad_output)
    F.embedding_bag(indices, theirs, **arguments).backward(grad_output)
    assert ours.grad.layout == torch.sparse_coo
    assert not ours.grad.is_coalesced()
    if target.device == "cuda" and padding_idx is not None:
        dense = [leaf.grad.to_dense() for leaf in (ours, theirs)]
        assert torch.allclose(*dense, rtol=2**-50, atol=2**-50)
        return
    assert torch.equal(ours.grad._indices(), theirs.grad._indices())
    assert torch.allclose(ours.grad._values(), theirs.grad._values(), rtol=2**-51)


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_gradients_repeat_bit_for_bit(target, dtype, mode):
    """Determinism: torch's own kernel for max refuses to be deterministic on CUDA; ours is."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(20, 3, generator=generator).to(dtype).to(target.device).requires_grad_()
    indices = ids("zipf", 120, 20, target.device).view(30, 4)
    grad_output = torch.randn(30, 3, generator=generator).to(dtype).to(target.device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(embedding_bag(indices, weight, mode=mode), weight, grad_output)[0]
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(run, runs[0]) for run in runs)
    assert not runs[0].isnan().any()


# Sizes at the edge.


@each_mode
def test_tables_without_columns(target, mode):
    weight = torch.empty(4, 0, device=target.device, requires_grad=True)
    output = embedding_bag(torch.tensor([[1, 2]], device=target.device), weight, mode=mode)
    assert output.shape == (1, 0)
    output.sum().backward()
    assert weight.grad.shape == (4, 0)


@each_mode
def test_tables_without_rows(target, mode):
    """Bounds: every id is out of range; empty bags are fine."""
    weight = torch.empty(0, 3, device=target.device, requires_grad=True)
    offsets = torch.tensor([0, 0], device=target.device)
    none = torch.tensor([], dtype=torch.int64, device=target.device)
    output = embedding_bag(none, weight, offsets, mode=mode)
    assert torch.equal(output, torch.zeros(2, 3, device=target.device))
    output.sum().backward()
    assert weight.grad.shape == (0, 3)
    with gpu_embed.set_bounds_check("off"):
        output = embedding_bag(torch.tensor([[0, 4]], device=target.device), weight, mode=mode)
    assert torch.equal(output, torch.zeros(1, 3, device=target.device))


@each_mode
def test_no_bags_of_three(target, mode):
    weight = table(4, 3, torch.float32, target.device).requires_grad_()
    indices = torch.empty(0, 3, dtype=torch.int64, device=target.device)
    output = embedding_bag(indices, weight, mode=mode)
    assert output.shape == (0, 3)
    output.sum().backward()
    assert not weight.grad.any()


WRONG_OFFSETS = {
    "decreasing": ([0, 2, 1], r"offsets\[2\] is 1"),
    "past the end": ([0, 2, 99], r"offsets\[2\] is 99"),
    "negative": ([0, -7, 2], r"offsets\[1\] is -7"),
    "late start": ([1, 2, 3], r"offsets\[0\] is 1"),
}


@each_mode
@where(has_kernels)
@pytest.mark.parametrize("longest", [512, 1])
@pytest.mark.parametrize(("offsets", "message"), WRONG_OFFSETS.values(), ids=WRONG_OFFSETS)
def test_kernels_clamp_and_record_wrong_offsets(
    target, offsets, message, longest, mode, monkeypatch
):
    """Bounds: nothing outside of the ids is read; what is read is recorded as wrong."""
    for name in ("MAX_WHOLE_BAG", "MIN_BAG_CHUNK", "MAX_BAG_CHUNK"):
        monkeypatch.setattr(bag_plan, name, longest)
    monkeypatch.setattr(bag_plan, "MAX_WHOLE_MEAN", 0)
    device = torch.device(target.device)
    backend = gpu_embed.backends.select(device)
    # The ids lie between ids of a row that would be seen.
    indices = torch.tensor([*[0] * 8, 1, 2, 3, *[0] * 8], device=device)[8:11]
    bags = gpu_embed.bags.Bags(indices, torch.tensor(offsets, device=device), 3)
    weight = torch.ones(4, 3, device=device)
    weight[0] = 100
    record = gpu_embed.bounds.BoundsRecord(device)
    if mode == "max":
        output, _ = backend.embedding_bag_max(weight, bags, -1, True, record)
    else:
        output = backend.embedding_bag(weight, None, bags, -1, mode, record)
    assert output.max() <= (3 if mode == "sum" else 1)
    with pytest.raises(RuntimeError, match=message):
        record.raise_if_claimed()
    if mode != "max":
        grad = backend.embedding_bag_dense_backward(output, None, bags, 4, -1, mode, False)
        assert not grad[0].any()
        assert grad.isfinite().all()
