"""Lookups with Keras's rules on every backend: ids cast and wrapped, rows converted or dequantized, gradients."""

import math

import numpy as np
import pytest
import torch
from cases import integer_gradient, same_bits, table
from torch.autograd import gradcheck, gradgradcheck

import gpu_embed
from gpu_embed.dtypes import FLOATS, KERAS_IDS
from gpu_embed.dtypes import IDS as IDS_OF_TORCH
from gpu_embed.fused_rows import FusedRows, fused_rows
from gpu_embed.ops import quantized as quantized_ops
from gpu_embed.ops import take as take_ops

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Every pair that `converts` allows.
CONVERSIONS = [
    (source, target) for source in FLOATS for target in FLOATS if take_ops.converts(source, target)
]
IDS = [[3, -1, 0], [-7, 6, 3]]  # of a table of 7 rows
ROWS = [[3, 6, 0], [0, 6, 3]]


def ids_of(values: object, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.tensor(values, device=device).to(dtype)


# Rows of a float table.


@pytest.mark.parametrize(("source", "target_dtype"), CONVERSIONS)
@pytest.mark.parametrize("embedding_dim", [1, 6, 64])
def test_rows_are_converted_and_rounded_once(target, source, target_dtype, embedding_dim):
    """Exact copy: of the same dtype, bit for bit; of another, what torch's conversion makes of them."""
    weight = table(7, embedding_dim, source, target.device)
    output = take_ops.take_rows(weight, ids_of(IDS, torch.int64, target.device), target_dtype)
    assert output.is_contiguous()
    assert same_bits(output, weight[torch.tensor(ROWS)].to(target_dtype))


def test_there_are_eight_conversions():
    assert len(CONVERSIONS) == 8


@pytest.mark.parametrize("dtype", KERAS_IDS, ids=str)
def test_every_dtype_of_ids(target, dtype):
    """Fractions are cut towards zero, and -0.5 is 0, as in a cast."""
    weight = table(7, 4, FP32, target.device)
    values, rows = IDS, ROWS
    if dtype == torch.bool:
        values, rows = [True, False], [1, 0]
    elif dtype == torch.uint8:
        values = rows = ROWS
    elif dtype.is_floating_point:
        values, rows = [3.9, -0.5, -1.5, 6.0], [3, 0, 6, 6]
    output = take_ops.take_rows(weight, ids_of(values, dtype, target.device), FP32)
    assert torch.equal(output, weight[torch.tensor(rows)])


@pytest.mark.parametrize("layout", ["transposed", "rows apart", "columns apart", "offset"])
def test_every_layout(target, layout):
    weight = {
        "transposed": lambda: table(8, 7, FP32, target.device).T,
        "rows apart": lambda: table(7, 12, FP32, target.device)[:, :8],
        "columns apart": lambda: table(7, 16, FP32, target.device)[:, ::2],
        "offset": lambda: table(7, 9, FP32, target.device)[:, 1:],
    }[layout]()
    ids = ids_of(IDS, torch.int32, target.device).T
    output = take_ops.take_rows(weight, ids, BF16)
    assert torch.equal(output, weight[torch.tensor(ROWS).T].to(BF16))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (3, 1, 2)])
def test_every_shape_of_ids(target, shape):
    weight = table(7, 4, FP32, target.device)
    ids = torch.ones(shape, dtype=torch.int64, device=target.device)
    assert torch.equal(take_ops.take_rows(weight, ids, FP32), weight[ids])


def test_more_vectors_than_one_program(target):
    weight = table(50, 12, FP32, target.device)
    ids = torch.arange(-50, 50, device=target.device).repeat(5)
    assert torch.equal(take_ops.take_rows(weight, ids, FP32), weight[ids])


BAD = [
    pytest.param(torch.int64, [1, 7], 7, id="the first behind the last"),
    pytest.param(torch.int64, [1, -8], -8, id="one before the first from the end"),
    pytest.param(torch.int64, [1, 2**32 + 1], 2**32 + 1, id="more than 32 bits"),
    pytest.param(torch.int64, [1, -(2**63)], -(2**63), id="the least"),
    pytest.param(torch.int32, [1, -(2**31)], -(2**31), id="the least of 32 bits"),
    pytest.param(torch.float32, [1, 7.5], 7, id="a fraction"),
    pytest.param(torch.float64, [1, math.nan], None, id="not a number"),
    pytest.param(torch.float32, [1, math.inf], None, id="infinity"),
    pytest.param(torch.float16, [1, -math.inf], None, id="minus infinity"),
]


@pytest.mark.parametrize(("dtype", "values", "named"), BAD)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_ids_out_of_range_are_named_as_written(target, dtype, values, named):
    """Bounds: never clamped, never cut to 32 bits; the row is zero, and the error names the caller's id."""
    weight = table(7, 4, FP32, target.device)
    ids = ids_of(values, dtype, target.device)
    message = "index out of range in self: id"
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match=message) as error:
        take_ops.take_rows(weight, ids, FP32)
    if named is not None:
        assert f"id {named} at" in str(error.value)
    assert "flat position 1" in str(error.value)
    assert "7 rows, so ids go from -7 to 6, where negative ones count from the end." in str(
        error.value
    )
    no_integer = named in (None, -(2**63))
    assert (
        "NaN, and what int64 does not hold, is read as this id" in str(error.value)
    ) == no_integer
    with gpu_embed.set_bounds_check("off"):
        output = take_ops.take_rows(weight, ids, FP32)
    assert torch.equal(output[0], weight[1])
    assert output[1].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("weight", "dtype", "ids", "message"),
    [
        (FP64, FP32, torch.int64, "float64 cannot be taken as torch.float32"),
        (BF16, FP16, torch.int64, "bfloat16 cannot be taken as torch.float16"),
        (torch.int64, torch.int64, torch.int64, "int64 cannot be taken"),
        (FP32, FP32, torch.complex64, "ids are integers, or floats"),
    ],
)
def test_other_dtypes_are_refused(weight, dtype, ids, message):
    with pytest.raises(TypeError, match=message):
        take_ops.take_rows(table(7, 4, weight, "cpu"), torch.zeros(2, dtype=ids), dtype)


# Gradients.


@pytest.mark.parametrize(("source", "target_dtype"), CONVERSIONS)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.float32], ids=str)
def test_gradients_go_to_the_rows_that_ids_mean(target, source, target_dtype, ids_dtype):
    """Accumulation: exact for integers; the table's dtype, not the output's."""
    weight = table(7, 6, source, target.device).requires_grad_()
    ids = ids_of(IDS, ids_dtype, target.device)
    grad_output = integer_gradient((2, 3, 6), target_dtype, target.device)
    (grad,) = torch.autograd.grad(
        take_ops.take_rows(weight, ids, target_dtype), weight, grad_output
    )
    expected = np.zeros((7, 6))
    np.add.at(expected, np.array(ROWS), grad_output.cpu().double().numpy())
    assert grad.dtype == source
    assert np.array_equal(grad.cpu().double().numpy(), expected)


def test_narrow_gradients_are_summed_wide(target):
    """Accumulation: an odd number of gradients of 1.0 in bf16, which an fp32 table's gradient holds and bf16 not."""
    weight = torch.zeros(3, 2, device=target.device, requires_grad=True)
    ids = torch.full((4097,), -1, device=target.device)
    take_ops.take_rows(weight, ids, BF16).backward(
        torch.ones(4097, 2, dtype=BF16).to(target.device)
    )
    assert weight.grad.tolist() == [[0, 0], [0, 0], [4097, 4097]]


def test_derivatives_of_every_order(target):
    weight = table(5, 3, FP64, target.device).requires_grad_()
    ids = torch.tensor([1, -1, 4, 1], device=target.device)
    assert gradcheck(lambda w: take_ops.take_rows(w, ids, FP64), weight)
    assert gradgradcheck(lambda w: take_ops.take_rows(w, ids, FP64) ** 2, weight)


def test_ids_changed_before_the_backward_are_noticed(target):
    weight = table(5, 3, FP32, target.device).requires_grad_()
    ids = torch.tensor([1, 2], device=target.device)
    output = take_ops.take_rows(weight, ids, FP32)
    ids += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Quantized tables.


def quantized(
    bits: int, embedding_dim: int, group_size: int | None, scale_dtype: torch.dtype, device: str
) -> tuple[tuple[object, ...], np.ndarray]:
    """What `dequantize_rows` takes for a table of 7 rows, and the numbers that it means, in float64."""
    rng = np.random.default_rng(embedding_dim)
    low, high = (-128, 128) if bits == 8 else (-8, 8)
    columns = rng.integers(low, high, (7, embedding_dim)).astype(np.int8)
    packed = columns
    if bits == 4:
        even = np.pad(columns, ((0, 0), (0, embedding_dim % 2)))
        packed = (even[:, ::2] & 15) | (even[:, 1::2] << 4)
    groups = 1 if group_size is None else -(-embedding_dim // group_size)
    scale = torch.tensor(rng.uniform(0.5, 2, (7, groups))).to(scale_dtype)
    zero = rng.integers(-8, 8, (7, groups)).astype(np.int8)
    per_column = np.arange(embedding_dim) // (group_size or embedding_dim)
    numbers = scale.double().numpy()[:, per_column]
    if group_size is None:
        meant = columns / numbers
        scale, zero = scale[:, 0], None
    else:
        meant = (columns - zero[:, per_column].astype(float)) * numbers
        zero = torch.tensor(zero, device=device)
    table = torch.tensor(packed, device=device)
    return (table, scale.to(device), zero), meant


SHAPES = [(1, None), (6, None), (33, None), (64, None), (6, 4), (33, 8), (64, 16), (12, 5)]
TABLES = [
    *((*shape, FP32, FP32) for shape in SHAPES),
    *((64, group_size, *pair) for group_size in (None, 16) for pair in CONVERSIONS),
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("embedding_dim", "group_size", "scale", "dtype"), TABLES)
def test_rows_are_dequantized(target, bits, embedding_dim, group_size, scale, dtype):
    """A quotient or a product rounded to fp32 (fp64 for fp64), and then to the output's dtype."""
    arguments, meant = quantized(bits, embedding_dim, group_size, scale, target.device)
    ids = ids_of(IDS, torch.int64, target.device)
    output = take_ops.dequantize_rows(
        *arguments, ids, embedding_dim, group_size or embedding_dim, bits, dtype
    )
    wide = torch.promote_types(scale, FP32)
    assert output.is_contiguous()
    assert same_bits(output.cpu(), torch.tensor(meant[np.array(ROWS)]).to(wide).to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, FP32], ids=str)
def test_ids_of_a_quantized_table(target, bits, group_size, dtype):
    """Bounds: of any dtype, negative ones from the end; one out of range reads as zeros and is named."""
    arguments, meant = quantized(bits, 8, group_size, FP32, target.device)
    ids = ids_of([-1, 7, 3], dtype, target.device)
    shape = 8, group_size or 8, bits, FP32
    message = r"id 7 at flat position 1 .* 7 rows, so ids go from -7 to 6"
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match=message):
        take_ops.dequantize_rows(*arguments, ids, *shape)
    with gpu_embed.set_bounds_check("off"):
        output = take_ops.dequantize_rows(*arguments, ids, *shape)
    expected = np.stack([meant[6], np.zeros(8), meant[3]]).astype(np.float32)
    assert np.array_equal(output.cpu().numpy(), expected)
    assert take_ops.dequantize_rows(*arguments, ids[:0], *shape).shape == (0, 8)


# Fused rows, whose ids are torch's.


def fused(
    bits: int, embedding_dim: int, group: int | str, device: str
) -> tuple[torch.Tensor, FusedRows]:
    """7 rows of any codes, with scales and offsets of any size and sign, and a row of zeros."""
    layout = fused_rows("test", embedding_dim, bits, group)
    rng = np.random.default_rng(embedding_dim)
    rows = rng.integers(0, 256, (7, layout.groups, layout.group_bytes), np.uint8)
    numbers = np.float32 if bits == 8 else np.float16
    scale = rng.uniform(0, 2, (7, layout.groups)).astype(numbers)
    if bits == 8:
        # 16 significant bits, as `quantize_rows` makes them.
        scale = (scale.view(np.uint32) & 0xFFFFFF00).view(np.float32)
    scale[2:4] *= numbers(2.0**-14)  # of fp16 subnormal
    offset = rng.normal(size=(7, layout.groups)).astype(numbers)
    pairs = np.stack([scale, offset], axis=-1)
    rows[..., layout.code_bytes :] = pairs.view(np.uint8)
    rows[6] = 0
    return torch.tensor(rows.reshape(7, -1), device=device), layout


FUSED = [(1, "row"), (6, "row"), (33, 32), (64, 64), (100, 64), (128, "row"), (260, 128)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("embedding_dim", "group"), FUSED)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=str)
def test_fused_rows_are_dequantized(target, bits, embedding_dim, group, dtype):
    """Bit for bit on every backend: a product without rounding, a sum rounded to fp32, and then to the dtype."""
    weight, layout = fused(bits, embedding_dim, group, target.device)
    ids = ids_of(ROWS, torch.int64, target.device)
    output = quantized_ops.quantized_embedding(weight, ids, *layout, dtype)
    meant = gpu_embed.reference.dequantize_fused_rows(weight.cpu().numpy(), np.array(ROWS), *layout)
    assert output.is_contiguous()
    assert same_bits(output.cpu(), torch.tensor(meant).to(dtype))
    assert not output[0, 1].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", IDS_OF_TORCH, ids=str)
def test_ids_of_fused_rows(target, bits, dtype):
    """Bounds: torch's ids, of which no negative one counts from the end; one out of range reads as zeros, is named."""
    weight, layout = fused(bits, 64, 32, target.device)
    wrong = 255 if dtype == torch.uint8 else -1
    ids = ids_of([5, wrong, 0], dtype, target.device)
    message = f"id {wrong} at flat position 1 .* 7 rows, so ids go from 0 to 6"
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match=message):
        quantized_ops.quantized_embedding(weight, ids, *layout, FP32)
    with gpu_embed.set_bounds_check("off"):
        output = quantized_ops.quantized_embedding(weight, ids, *layout, FP32)
    meant = gpu_embed.reference.dequantize_fused_rows(
        weight.cpu().numpy(), np.array([5, 0]), *layout
    )
    assert np.array_equal(output[::2].cpu().numpy(), meant)
    assert not output[1].any()


def test_a_scale_that_asks_for_a_gradient_is_told_that_there_is_none():
    (values, scale, zero), _ = quantized(8, 8, None, FP32, "cpu")
    output = take_ops.dequantize_rows(
        values, scale.requires_grad_(), zero, torch.tensor([1]), 8, 8, 8, FP32
    )
    with pytest.raises(NotImplementedError, match="scales of a quantized table have no gradient"):
        output.sum().backward()


# What torch asks of an operator.


def test_operators_are_registered_as_torch_asks():
    ids = torch.tensor([[1, -1], [0, 2]])
    weight = table(3, 4, FP32, "cpu").requires_grad_()
    torch.library.opcheck(take_ops.take_rows, (weight, ids, BF16))
    grad_output = torch.ones(2, 2, 4, dtype=BF16, requires_grad=True)
    torch.library.opcheck(take_ops.take_rows_backward, (grad_output, ids, 3, FP32))
    (values, scale, zero), _ = quantized(4, 6, 4, FP32, "cpu")
    torch.library.opcheck(take_ops.dequantize_rows, (values, scale, zero, ids, 6, 4, 4, FP16))
    weight, layout = fused(4, 6, "row", "cpu")
    ids = ids.clamp(min=0)
    torch.library.opcheck(quantized_ops.quantized_embedding, (weight, ids, *layout, FP16))
    bags = (weight, ids, None, False, 1, *layout, FP32)
    torch.library.opcheck(quantized_ops.quantized_bag_rows, bags)
