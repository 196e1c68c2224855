"""Quantized tables: what they hold, how near it is, what they return on every backend, saving, and what they refuse."""

import copy
import io
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import mapped, needs_mapping, same_bits
from process_groups import one_process
from torch import Tensor, nn

import gpu_embed
from gpu_embed import QuantizedEmbedding, QuantizedEmbeddingBag, fused_rows, reference
from gpu_embed.fused_rows import FusedRows

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
FORMATS = [(8, None), (8, 32), (4, None), (4, 32), (4, 128), (4, "row")]
DIMS = [1, 2, 3, 7, 33, 64, 100, 256]
of_every_format = pytest.mark.parametrize(("bits", "group"), FORMATS)
of_both_bits = pytest.mark.parametrize("bits", [8, 4])


def embedding(rows: int, dim: int, dtype: torch.dtype = FP32, **arguments: Any) -> nn.Embedding:
    generator = torch.Generator().manual_seed(rows * 1000 + dim)
    weight = torch.randn(rows, dim, generator=generator).to(dtype)
    return gpu_embed.Embedding(rows, dim, _weight=weight, **arguments)


def integers(rows: int, dim: int, bits: int, dtype: torch.dtype = FP32) -> Tensor:
    """Integers that codes of so many bits hold, the ends in each group: sums of them are exact."""
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randint(0, 2**bits, (rows, dim), generator=generator)
    weight[:, ::32], weight[:, 1::32] = 0, 2**bits - 1
    return weight.to(dtype)


def numbers_of(layer: QuantizedEmbedding) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [V, groups, group_size], scales and offsets [V, groups] in float64, read with NumPy."""
    layout = layer.format
    data = layer.weight.cpu().numpy().reshape(len(layer.weight), layout.groups, layout.group_bytes)
    codes = data[..., : layout.code_bytes]
    if layout.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
    kind = np.float32 if layout.bits == 8 else np.float16
    pairs = np.ascontiguousarray(data[..., layout.code_bytes :]).view(kind).astype(np.float64)
    return codes, pairs[..., 0], pairs[..., 1]


# What a table becomes.


@of_every_format
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=str)
def test_numbers_are_within_half_a_step(bits, group, dim, dtype):
    """Each is at most half its scale away, beside the roundings to fp32 and to the dtype of the output."""
    layer = embedding(9, dim, dtype)
    small = QuantizedEmbedding.from_float(layer, bits, group)
    assert small.dtype == dtype
    _, scale, _ = numbers_of(small)
    step = np.repeat(scale, small.group_size, axis=1)[:, :dim]
    rows = layer.weight.detach().double().numpy()
    meant = small(torch.arange(9)).double().numpy()
    rounding = max(torch.finfo(dtype).eps, torch.finfo(FP32).eps) * np.abs(meant)
    assert (np.abs(meant - rows) <= step / 2 + rounding).all()
    # The largest error is near that bound, so scales are not larger than need be.
    if dim > 4 and dtype == FP32:
        assert (np.abs(meant - rows) > 0.3 * step).any()


@of_both_bits
@pytest.mark.parametrize(("dim", "group"), [(64, 64), (100, 32), (6, "row")])
def test_bytes_are_those_of_a_numpy_quantizer(bits, dim, group):
    """Offset: the largest number that is no larger than the smallest. Scale: the smallest that reaches the largest."""
    layer = embedding(9, dim)
    small = QuantizedEmbedding.from_float(layer, bits, group)
    kind, levels = (np.float32, 255) if bits == 8 else (np.float16, 15)
    size = small.group_size
    rows = layer.weight.detach().double().numpy()
    padded = np.pad(rows, ((0, 0), (0, -dim % size)), mode="edge").reshape(9, -1, size)
    low = padded.min(-1)
    offset = low.astype(kind)
    offset = np.where(offset > low, np.nextafter(offset, kind(-np.inf)), offset).astype(np.float64)
    step = (padded.max(-1) - offset) / levels
    scale = step.astype(kind)
    scale = np.where(scale < step, np.nextafter(scale, kind(np.inf)), scale).astype(kind)
    if bits == 8:
        scale = ((scale.view(np.uint32) + 255) & 0xFFFFFF00).view(np.float32)
    scale = scale.astype(np.float64)
    codes = np.rint((padded - offset[..., None]) / scale[..., None]).clip(0, levels)
    found = numbers_of(small)
    for one, other in zip(found, (codes, scale, offset), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("bits", "group", "most"), [(8, None, 0.27), (4, None, 0.145), (4, 32, 0.16), (4, 128, 0.14)]
)
def test_sizes_in_memory_and_on_disk(bits, group, most, tmp_path):
    layer = embedding(500, 256)
    small = QuantizedEmbedding.from_float(layer, bits, group)
    buffers = sum(buffer.nbytes for buffer in small.buffers())
    assert buffers <= most * layer.weight.nbytes
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="the integration extra is missing"
    )
    sizes = []
    for number, one in enumerate((small, layer)):
        torch.save(one.state_dict(), tmp_path / f"{number}.pt")
        safetensors.save_model(one, str(tmp_path / f"{number}.safetensors"))
        sizes.append(
            [(tmp_path / f"{number}.{end}").stat().st_size for end in ("pt", "safetensors")]
        )
    assert all(one <= most * other for one, other in zip(*sizes, strict=True))


@of_every_format
def test_rows_of_zeros_and_constant_rows(bits, group):
    rows = torch.zeros(6, 70)
    rows[1], rows[2], rows[3], rows[4] = 0.5, -3.0, 0.1, 1e-3
    rows[5] = -0.0
    layer = gpu_embed.Embedding(6, 70, padding_idx=0, _weight=rows)
    small = QuantizedEmbedding.from_float(layer, bits, group)
    assert small.padding_idx == 0
    found = small(torch.arange(6))
    # What the offset holds is kept as it is.
    assert torch.equal(found[[0, 1, 2, 5]], rows[[0, 1, 2, 5]])
    assert torch.allclose(found[3:5], rows[3:5], rtol=0, atol=2.0**-12 / 15)
    assert all(len(row.unique()) == 1 for row in found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@of_both_bits
def test_rows_that_are_not_finite_are_named(bits, value, monkeypatch):
    monkeypatch.setattr(fused_rows, "CHUNK", 64)
    layer = embedding(20, 16)
    with torch.no_grad():
        layer.weight[13, 5] = value
    with pytest.raises(ValueError, match=rf"row 13 holds {value} at column 5; quantize finite"):
        QuantizedEmbedding.from_float(layer, bits)


def test_numbers_too_far_out_are_named():
    """Of 4 bits an offset ends at 65,504, and so does a scale; 8 bits hold what fp32 holds of differences."""
    rows = torch.randn(4, 64)
    rows[2, 7] = -7e4
    layer = gpu_embed.Embedding(4, 64, _weight=rows.clone())
    with pytest.raises(
        ValueError, match=r"row 2 goes from -70000 .* float16 cannot hold; use bits=8"
    ):
        QuantizedEmbedding.from_float(layer, 4)
    QuantizedEmbedding.from_float(layer, 8)
    rows[2, 7] = 1.1e6
    with pytest.raises(ValueError, match=r"row 2 goes from .* to 1\.1e\+06"):
        QuantizedEmbedding.from_float(gpu_embed.Embedding(4, 64, _weight=rows), 4)
    rows[3, :2] = torch.tensor([3e38, -3e38])
    with pytest.raises(ValueError, match=r"row 3 .* float32 cannot hold; scale the table down"):
        QuantizedEmbedding.from_float(gpu_embed.Embedding(4, 64, _weight=rows), 8)
    # What a lookup would return as infinity.
    rows = torch.tensor([[65504.0, -65504.0, 0.0, 0.0]], dtype=FP16)
    with pytest.raises(ValueError, match="row 0 "):
        QuantizedEmbedding.from_float(gpu_embed.Embedding(1, 4, _weight=rows), 4)


@of_both_bits
def test_large_and_tiny_numbers(bits):
    """At the ends of what a scale can hold, too, numbers are within half a step."""
    for factor in (4000.0, 1.0, 1e-3, 1e-6, 1e-9) if bits == 4 else (1e37, 1e-30, 1e-38, 1e-43):
        rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).mul(factor)
        small = QuantizedEmbedding.from_float(gpu_embed.Embedding(5, 64, _weight=rows), bits)
        _, scale, _ = numbers_of(small)
        meant = small(torch.arange(5)).double().numpy()
        error = np.abs(meant - rows.double().numpy())
        assert (error <= scale / 2 + 2.0**-24 * np.abs(meant) + 2.0**-150).all(), factor


def test_the_float_layer_is_left_as_it_is_and_comes_back():
    layer = embedding(9, 40, padding_idx=2).eval()
    before = layer.weight.detach().clone()
    small = QuantizedEmbedding.from_float(layer, 4)
    assert torch.equal(layer.weight, before)
    assert not small.training
    back = small.to_float()
    assert type(back) is gpu_embed.Embedding
    assert (back.padding_idx, back.training, back.weight.requires_grad) == (2, False, True)
    assert torch.equal(back.weight, small(torch.arange(9)))
    # What is quantized stays so: a second time the numbers are as near as their own rounding.
    again = QuantizedEmbedding.from_float(back, 8).to_float()
    assert torch.allclose(again.weight, back.weight, atol=0.02)


# Lookups.


@of_every_format
@pytest.mark.parametrize("dim", [1, 6, 33, 64, 100])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=str)
def test_lookups(target, bits, group, dim, dtype):
    """Bit for bit on every backend what the NumPy reference makes of the bytes, rounded to the dtype."""
    small = QuantizedEmbedding.from_float(embedding(9, dim), bits, group, dtype).to(target.device)
    ids = torch.tensor([[8, 0, 3], [3, 3, 5]])
    found = small(ids.to(target.device))
    meant = reference.dequantize_fused_rows(small.weight.cpu().numpy(), ids.numpy(), *small.format)
    assert found.is_contiguous()
    assert not found.requires_grad
    assert same_bits(found.cpu(), torch.tensor(meant).to(dtype))


@of_both_bits
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (2, 3, 1)])
def test_every_shape_of_ids(target, bits, shape):
    small = QuantizedEmbedding.from_float(embedding(9, 70), bits).to(target.device)
    ids = torch.full(shape, 4, dtype=torch.int32, device=target.device)
    assert torch.equal(small(ids), small.to_float()(ids.long()))


@of_both_bits
def test_tables_without_rows(target, bits):
    """Bounds: no id is in it, and none is an empty result."""
    small = QuantizedEmbedding.from_float(embedding(0, 6), bits).to(target.device)
    assert small(torch.empty(0, dtype=torch.int64, device=target.device)).shape == (0, 6)
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match="id 0 at"):
        small(torch.zeros(1, dtype=torch.int64, device=target.device))


@of_both_bits
def test_transposed_ids_and_more_than_one_program(target, bits):
    small = QuantizedEmbedding.from_float(embedding(90, 100), bits, 32).to(target.device)
    ids = torch.arange(90, device=target.device).repeat(4).view(6, 60).T
    assert torch.equal(small(ids), small.to_float()(ids))


@of_every_format
@pytest.mark.parametrize("dim", [1, 33, 100])
def test_without_torchs_operator(bits, group, dim, monkeypatch):
    """Where torch lacks it, or gets other numbers, its plain operators do the same."""
    small = QuantizedEmbedding.from_float(embedding(9, dim), bits, group)
    ids = torch.tensor([8, 0, 3])
    expected = small(ids)
    assert fused_rows.reads_as_ours(bits)
    take = gpu_embed.backends.load("torch").dequantize_rows.__globals__
    monkeypatch.setitem(take, "reads_as_ours", lambda _: False)
    monkeypatch.setitem(take, "torch_lookup", None)
    assert same_bits(small(ids), expected)


@of_both_bits
def test_wrong_operators_of_torch_are_noticed(bits, monkeypatch):
    right = fused_rows.torch_lookup(bits)

    def wrong(*arguments: Any) -> Tensor:
        found = right(*arguments)
        found[1, 1] += 1e-6
        return found

    monkeypatch.setattr(fused_rows, "torch_lookup", lambda _: wrong)
    assert not fused_rows.reads_as_ours.__wrapped__(bits)

    def missing(_: int) -> Any:
        raise AttributeError

    monkeypatch.setattr(fused_rows, "torch_lookup", missing)
    assert not fused_rows.reads_as_ours.__wrapped__(bits)


@of_both_bits
def test_torchs_own_operators_read_the_bytes(bits):
    small = QuantizedEmbedding.from_float(embedding(9, 64), bits, "row")
    name = "byte" if bits == 8 else "4bit"
    lookup = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets")
    unpack = getattr(torch.ops.quantized, f"embedding_bag_{name}_unpack")
    ids = torch.tensor([8, 0])
    assert torch.equal(lookup(small.weight, ids, torch.arange(2)), small(ids))
    assert torch.allclose(unpack(small.weight), small.to_float().weight, rtol=1e-6)


@needs_mapping
@of_both_bits
def test_more_groups_and_bytes_than_32_bits_count(bits, monkeypatch):
    """64-bit addresses: more than 2**31 groups, and so bytes, of which few are touched; ids of 32 bits too."""
    layout = FusedRows(16, 4, bits) if bits == 8 else FusedRows(32, 4, bits)
    rows = 2**31 // layout.groups + 3
    small = QuantizedEmbedding(1, layout.embedding_dim, bits=bits)
    small.format = layout
    small.weight = mapped(rows, layout.row_bytes, torch.uint8)
    last = torch.arange(layout.embedding_dim)[None].float()
    small.weight[-1] = fused_rows.quantize_rows(last, layout)
    lookup, asked = fused_rows.torch_lookup(bits), []
    take = gpu_embed.backends.load("torch").dequantize_rows.__globals__
    monkeypatch.setitem(
        take, "torch_lookup", lambda _: lambda *given: (asked.append(given[1]), lookup(*given))[1]
    )
    for dtype in (torch.int64, torch.int32):
        found = small(torch.tensor([rows - 1, 0], dtype=dtype))
        assert asked.pop().tolist()[: layout.groups] == [
            (rows - 1) * layout.groups + group for group in range(layout.groups)
        ]
        assert torch.equal(found[:1], fused_rows.dequantize(small.weight[-1:], layout))
        assert found[0].any()
        assert not found[1].any()
    with pytest.raises(IndexError, match=f"id {rows} at"):
        small(torch.tensor([rows]))


def test_ids_of_other_kinds_are_refused_as_by_the_float_layer():
    small = QuantizedEmbedding.from_float(embedding(9, 6))
    with pytest.raises(RuntimeError, match="Long, Int; but got"):
        small(torch.tensor([1.0]))
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        small([1])
    with pytest.raises(RuntimeError, match="same device"):
        small(torch.zeros(2, dtype=torch.int64, device="meta"))
    with one_process():
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        ids = torch.distributed.tensor.distribute_tensor(torch.tensor([1]), mesh)
        with pytest.raises(NotImplementedError, match=r"give it ids.to_local\(\)"):
            small(ids)


# Dtypes and devices.


def test_conversions_change_the_output_and_not_the_codes():
    small = QuantizedEmbedding.from_float(embedding(9, 6), 4)
    codes, ids = small.weight.clone(), torch.tensor([1, 8])
    expected = small(ids)
    model = nn.Sequential(small)
    conversions = {
        FP16: (model.half, partial(model.to, FP16), partial(model.type, FP16)),
        BF16: (model.bfloat16, partial(model.to, dtype=BF16)),
        FP64: (model.double,),
        FP32: (model.float, partial(model.to, "cpu", FP32)),
    }
    for dtype, ways in conversions.items():
        for convert in ways:
            convert()
            assert small.dtype == small(ids).dtype == dtype
            assert small.weight.dtype == torch.uint8
            assert torch.equal(small.weight, codes)
            assert small.weight_format.dtype == torch.int64
            assert torch.equal(small(ids), expected.to(dtype))
    assert model.to("cpu")[0].dtype == FP32
    for wrong in (torch.int32, torch.complex64):
        with pytest.raises(TypeError, match="the output's dtype must be"):
            small.type(wrong)
        assert small.dtype == FP32
        assert torch.equal(small.weight, codes)


def test_a_layer_on_meta_is_filled_by_loading():
    small = QuantizedEmbedding.from_float(embedding(9, 6), 4)
    other = QuantizedEmbedding(9, 6, bits=4, device="meta")
    other.load_state_dict(small.state_dict(), assign=True)
    assert torch.equal(other(torch.arange(9)), small(torch.arange(9)))
    assert small.to("meta").weight.is_meta


def test_a_new_layer_is_of_zeros():
    for kind in (QuantizedEmbedding, QuantizedEmbeddingBag):
        layer = kind(5, 40, bits=4, dtype=BF16)
        found = layer(torch.tensor([[1, 4]]))
        assert found.dtype == BF16
        assert not found.any()


@of_both_bits
def test_another_default_device(bits):
    """Nothing is made there but a new layer; the check of torch's operator neither."""
    layer, bags, tables = embedding(9, 70), gpu_embed.EmbeddingBag(9, 70), batched(bits)
    ids, batch = torch.tensor([[1, 8]]), batch_of("cpu")
    fused_rows.reads_as_ours.cache_clear()
    with torch.device("meta"):
        small = QuantizedEmbedding.from_float(layer, bits)
        found = [small(ids), QuantizedEmbeddingBag.from_float(bags, bits)(ids)]
        found.append(QuantizedEmbeddingBag.from_float(tables, bits)(*batch))
        assert torch.equal(small.to_float()(ids), found[0])
        assert small.half()(ids).device.type == "cpu"
        assert QuantizedEmbedding(9, 70).weight.is_meta
    assert fused_rows.reads_as_ours.cache_info().currsize == 1
    assert torch.equal(found[0], QuantizedEmbedding.from_float(layer, bits)(ids))
    assert torch.equal(found[2], tables(*batch))


# Saving.


@of_every_format
@pytest.mark.parametrize("kind", ["state_dict", "pickle", "deepcopy", "torch.save", "safetensors"])
def test_saved_and_loaded(bits, group, kind, tmp_path):
    small = QuantizedEmbedding.from_float(embedding(9, 70, padding_idx=1), bits, group, BF16).eval()
    fresh = partial(QuantizedEmbedding, 9, 70, 1, bits=bits, group=group, dtype=BF16)
    if kind == "state_dict":
        other = fresh()
        other.load_state_dict(small.state_dict())
    elif kind == "pickle":
        other = pickle.loads(pickle.dumps(small))
    elif kind == "deepcopy":
        other = copy.deepcopy(small)
    elif kind == "torch.save":
        file = io.BytesIO()
        torch.save(small.state_dict(), file)
        file.seek(0)
        other = fresh()
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        safetensors = pytest.importorskip(
            "safetensors.torch", reason="the integration extra is missing"
        )
        path = str(tmp_path / "table.safetensors")
        safetensors.save_model(nn.ModuleDict({"table": small}), path)
        other = fresh()
        safetensors.load_model(nn.ModuleDict({"table": other}), path)
    ids = torch.tensor([8, 1, 0])
    assert torch.equal(other(ids), small(ids))
    assert other.weight.data_ptr() != small.weight.data_ptr()
    assert (other.format, other.padding_idx, other.dtype) == (small.format, 1, BF16)
    assert repr(other) == repr(small)
    assert f"bits={bits}, group_size={small.group_size}, dtype=torch.bfloat16" in repr(small)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        # The same number of bytes a row.
        (QuantizedEmbedding(9, 28, bits=8), "28 columns of 8 bits, 28 columns a scale"),
        (QuantizedEmbedding(9, 64, bits=8), "64 columns of 8 bits"),
        (QuantizedEmbedding(9, 64, bits=4, group=32), "32 columns a scale"),
        (QuantizedEmbedding(8, 64, bits=4), "8 rows of 64 columns"),
        (nn.Embedding(9, 64), r"table of torch.float32: .* quantize that with from_float"),
        (nn.Embedding(9, 36), r"table of torch.float32"),
    ],
    ids=["bytes of int8", "8 bits", "other group", "fewer rows", "floats", "floats of that width"],
)
def test_a_table_of_another_format_is_refused(other, message):
    small = QuantizedEmbedding.from_float(embedding(9, 64), 4)
    before = small.weight.clone()
    model = nn.ModuleDict({"table": small})
    state = {f"table.{name}": value for name, value in other.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=f"table: this QuantizedEmbedding has 9 rows .*{message}"
    ):
        model.load_state_dict(state)
    assert torch.equal(small.weight, before)
    missing = model.load_state_dict({"table.weight": small.weight}, strict=False).missing_keys
    assert missing == ["table.weight_format"]
    del state["table.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


# Training is refused.


def test_it_is_not_trained():
    small = QuantizedEmbedding.from_float(embedding(9, 64))
    model = nn.Sequential(small, nn.Linear(64, 2))
    assert list(small.parameters()) == []
    assert not small.weight.requires_grad
    assert small.requires_grad_(False) is small
    with pytest.raises(RuntimeError, match=r"cannot be trained: .* to_float\(\).* LoRA"):
        small.requires_grad_()
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype"):
        small.weight.requires_grad_()
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(small.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        small(torch.tensor([1])).sum().backward()
    # What lies above is.
    model.requires_grad_()
    model(torch.tensor([1, 8])).sum().backward()
    assert model[1].weight.grad.any()


def test_ddp_and_fsdp():
    """DDP refuses what has no parameters; fully_shard leaves the codes whole, and the lookup right."""
    from torch.distributed.fsdp import fully_shard

    small = QuantizedEmbedding.from_float(embedding(9, 64), 4)
    ids = torch.tensor([1, 8])
    expected = small(ids)
    with one_process():
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        with pytest.raises(RuntimeError, match="any parameter that requires a gradient"):
            nn.parallel.DistributedDataParallel(small)
        model = nn.parallel.DistributedDataParallel(nn.Sequential(small, nn.Linear(64, 2)))
        model(ids).sum().backward()
        assert torch.equal(small(ids), expected)
        sharded = fully_shard(copy.deepcopy(small), mesh=mesh)
        assert torch.equal(sharded(ids), expected)
        with pytest.raises(RuntimeError, match="cannot be trained"):
            sharded.requires_grad_()
        sharded = copy.deepcopy(nn.Sequential(small, nn.Linear(64, 2)))
        expected = sharded(ids)
        fully_shard(sharded, mesh=mesh)
        assert torch.equal(sharded(ids), expected)
        with pytest.raises(NotImplementedError):
            torch.distributed.tensor.parallel.parallelize_module(
                copy.deepcopy(small), mesh, torch.distributed.tensor.parallel.RowwiseParallel()
            )


# What is no table to quantize.


@pytest.mark.parametrize(
    ("layer", "arguments", "error", "message"),
    [
        (
            nn.Linear(4, 4),
            {},
            TypeError,
            "expected torch.nn.Embedding or this package's, got Linear",
        ),
        (nn.EmbeddingBag(4, 4), {}, TypeError, "got EmbeddingBag"),
        (nn.Embedding(4, 4, max_norm=1), {}, ValueError, "set the layer's max_norm to None"),
        (nn.Embedding(4, 4, dtype=torch.complex64), {}, TypeError, "and is torch.complex64"),
        (nn.Embedding(4, 4, device="meta"), {}, TypeError, "on the meta device"),
        (nn.Embedding(4, 0), {}, ValueError, "without columns"),
        (nn.Embedding(4, 4), {"bits": 2}, ValueError, "bits must be 8 or 4, got 2"),
        (
            nn.Embedding(4, 4),
            {"group": 48},
            ValueError,
            'group must be 32, 64 or 128 columns, or "row"',
        ),
        (nn.Embedding(4, 4), {"group": True}, ValueError, "got True"),
        (nn.Embedding(4, 4), {"dtype": torch.int8}, TypeError, "the output's dtype must be"),
    ],
)
def test_what_cannot_be_quantized(layer, arguments, error, message):
    with pytest.raises(error, match=message):
        QuantizedEmbedding.from_float(layer, **arguments)


# Bags.


def bag_arguments(kind: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = torch.tensor([3, 1, 1, 8, 0, 3, 7])
    return {
        "2-D": ((ids[:6].view(3, 2),), {}),
        "offsets": ((ids, torch.tensor([0, 2, 2, 5])), {}),
        "last offset": ((ids.int(), torch.tensor([0, 2, 2, 5])), {"include_last_offset": True}),
        "no ids": ((ids[:0], torch.tensor([0, 0])), {}),
    }[kind]


@of_both_bits
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("kind", ["2-D", "offsets", "last offset", "no ids"])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_bags(target, bits, mode, kind, padding_idx, dtype):
    """Of integers that codes hold: as the float layer's, bit for bit."""
    arguments, more = bag_arguments(kind)
    arguments = tuple(argument.to(target.device) for argument in arguments)
    layer = gpu_embed.EmbeddingBag(
        9, 40, mode=mode, padding_idx=padding_idx, _weight=integers(9, 40, bits, dtype), **more
    ).to(target.device)
    small = QuantizedEmbeddingBag.from_float(layer, bits, 32)
    assert torch.equal(small.to_float().weight, layer.weight)
    found = small(*arguments)
    assert found.dtype == dtype
    assert torch.equal(found, layer(*arguments))


@of_both_bits
def test_per_sample_weights_have_a_gradient(target, bits):
    layer = gpu_embed.EmbeddingBag(9, 40, mode="sum", padding_idx=3, _weight=integers(9, 40, bits))
    small = QuantizedEmbeddingBag.from_float(layer, bits, 32).to(target.device)
    layer.to(target.device)
    (ids, offsets), _ = bag_arguments("offsets")
    ids, offsets = ids.to(target.device), offsets.to(target.device)
    results = []
    for one in (small, layer):
        weights = torch.arange(7.0, device=target.device, requires_grad=True)
        output = one(ids, offsets, weights)
        output.sum().backward()
        results.append((output.detach(), weights.grad))
    assert all(map(torch.equal, *results))
    small.half()
    with pytest.raises(RuntimeError, match="same type as tensor"):
        small(ids, offsets, torch.ones(7, device=target.device))
    halves = torch.ones(7, dtype=FP16, device=target.device)
    assert torch.equal(small(ids, offsets, halves), layer(ids, offsets, halves.float()).half())


@of_both_bits
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_ids_out_of_range_in_bags(target, bits, mode):
    """Bounds: the error is the float layer's, and what it returns where none is recorded, too."""
    layer = gpu_embed.EmbeddingBag(9, 40, mode=mode, _weight=integers(9, 40, bits)).to(
        target.device
    )
    small = QuantizedEmbeddingBag.from_float(layer, bits, 32)
    ids = torch.tensor([3, 9, -1, 8, 0, 1, 7], device=target.device)
    offsets = torch.tensor([0, 1, 4], device=target.device)
    messages = []
    for one in (small, layer):
        with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError) as error:
            one(ids, offsets)
        messages.append(str(error.value))
    assert messages[0].partition("found idx")[0] == messages[1].partition("found idx")[0]
    assert "bag 1" in messages[0]
    assert "9 rows, so ids go from 0 to 8" in messages[0]
    with gpu_embed.set_bounds_check("off"):
        assert torch.equal(small(ids, offsets), layer(ids, offsets))


def test_bags_refuse_what_the_float_layer_refuses():
    small = QuantizedEmbeddingBag.from_float(gpu_embed.EmbeddingBag(9, 8))
    ids, weights = torch.tensor([1, 2]), torch.ones(2)
    with pytest.raises(NotImplementedError, match="only supported for mode='sum'"):
        small(ids, torch.tensor([0]), weights)
    with pytest.raises(ValueError, match="offsets has to be a 1D Tensor but got None"):
        small(ids)
    with pytest.raises(RuntimeError, match=r"offsets\[0\] has to be 0"):
        small(ids, torch.tensor([1]))
    small.mode = "median"
    with pytest.raises(ValueError, match="mode has to be one of"):
        small(ids, torch.tensor([0]))
    with pytest.raises(TypeError, match=r"expected torch\.nn\.EmbeddingBag"):
        QuantizedEmbeddingBag.from_float(nn.Embedding(9, 8))
    assert "mode='median'" in repr(small)


# Batched tables.

SIZES = {"user": (9, 40), "item": (7, 8), "shop": (5, 40)}


def batched(
    bits: int, dtype: torch.dtype = FP32, **arguments: Any
) -> gpu_embed.TableBatchedEmbeddingBag:
    layer = gpu_embed.TableBatchedEmbeddingBag(
        SIZES,
        padding_idx={"item": 3},
        features={"u": "user", "i": "item", "seen": "item", "s": "shop"},
        dtype=dtype,
        **arguments,
    )
    with torch.no_grad():
        for name, (rows, dim) in SIZES.items():
            layer[name].copy_(integers(rows, dim, bits))
    return layer


def batch_of(device: str, **changes: Any) -> gpu_embed.tables.inputs.TableInput:
    ids = {
        "u": [[8, 0, 3], [1, 1, 1]],
        "i": [[6, 3], [3, 3]],
        "seen": [[0], [3]],
        "s": [[4, 4], [0, 1]],
        **changes,
    }
    return gpu_embed.batch_padded(
        {name: torch.tensor(rows, device=device) for name, rows in ids.items()}
    )


@of_both_bits
@pytest.mark.parametrize("mode", ["sum", {"user": "max", "item": "mean"}], ids=["sum", "mixed"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_batched_bags(target, bits, mode, dtype):
    layer = batched(bits, dtype, mode=mode).to(target.device)
    small = QuantizedEmbeddingBag.from_float(layer, bits, 32)
    assert isinstance(small, gpu_embed.QuantizedTableBatchedEmbeddingBag)
    batch = batch_of(target.device)
    found = small(*batch)
    assert found.dtype == dtype
    assert torch.equal(found, layer(*batch))
    back = small.to_float()
    assert all(torch.equal(back[name], rows) for name, rows in layer.items())
    assert torch.equal(back(*batch), found)
    # In another order, with batch sizes of their own, and ids behind the last offset.
    names = dict(reversed(list(zip("uis", ([[8, 0]], [[6], [3], [1]], [[4], [1]]), strict=True))))
    batch = batch_of(target.device, **names)
    batch = batch._replace(input=torch.cat([batch.input, batch.input[:3] - 100]))
    assert torch.equal(small(*batch), layer(*batch))
    assert [part.shape[1] for part in small.split(found)] == [40, 8, 8, 40]


@of_both_bits
def test_batched_bags_with_sample_weights(target, bits):
    layer = batched(bits).to(target.device)
    small = QuantizedEmbeddingBag.from_float(layer, bits, 32)
    batch = batch_of(target.device)
    results = []
    for one in (small, layer):
        weights = torch.arange(float(len(batch.input)), device=target.device, requires_grad=True)
        output = one(batch.input, batch.offsets, weights)
        output.sum().backward()
        results.append((output.detach(), weights.grad))
    assert all(map(torch.equal, *results))


@of_both_bits
def test_batched_rows(target, bits):
    sizes = {"user": (9, 40), "item": (7, 40)}
    layer = gpu_embed.TableBatchedEmbedding(sizes, padding_idx={"item": 3}).to(target.device)
    with torch.no_grad():
        for name in sizes:
            layer[name].copy_(integers(*sizes[name], bits))
    small = QuantizedEmbedding.from_float(layer, bits, 32)
    assert isinstance(small, gpu_embed.QuantizedTableBatchedEmbedding)
    ids = {"user": torch.tensor([[8, 0]]), "item": torch.tensor([[6, 3]])}
    ids = {name: one.to(target.device) for name, one in ids.items()}
    for given in (ids, dict(reversed(ids.items()))):
        batch = gpu_embed.batch_padded(given)
        assert torch.equal(small(*batch), layer(*batch))
    with pytest.raises(NotImplementedError, match="per_sample_weights are for bags"):
        small(batch.input, batch.offsets, torch.ones(4))


@of_both_bits
def test_batched_ids_out_of_range(target, bits):
    """Bounds: the message names the feature, its table and the bag, as the float layer's does."""
    layer = batched(bits).to(target.device)
    small = QuantizedEmbeddingBag.from_float(layer, bits, 32)
    batch = batch_of(target.device, seen=[[0], [7]])
    messages = []
    for one in (small, layer):
        with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError) as error:
            one(*batch)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "feature 'seen' (table 'item')" in messages[0]
    with gpu_embed.set_bounds_check("off"):
        assert torch.equal(small(*batch), layer(*batch))


def test_batched_tables_saved_converted_and_refused():
    layer = batched(4)
    small = QuantizedEmbeddingBag.from_float(layer, 4, 32)
    batch = batch_of("cpu")
    expected = small(*batch)
    for other in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert torch.equal(other(*batch), expected)
    with torch.no_grad():
        layer.weight.zero_()
    other = QuantizedEmbeddingBag.from_float(layer, 4, 32)
    assert not other(*batch).any()
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(*batch), expected)
    with pytest.raises(RuntimeError, match="other tables, bits or groups"):
        QuantizedEmbeddingBag.from_float(layer, 8).load_state_dict(small.state_dict())
    assert small.bfloat16()(*batch).dtype == BF16
    with pytest.raises(RuntimeError, match="cannot be trained"):
        small.requires_grad_()
    assert "user: (9, 40)" in repr(small)
    with torch.no_grad():
        layer["item"][2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 2 of table 'item' holds nan at column 1"):
        QuantizedEmbeddingBag.from_float(layer)
    with pytest.raises(TypeError, match="expected TableBatchedEmbedding, got"):
        gpu_embed.QuantizedTableBatchedEmbedding.from_float(layer)
    with pytest.raises(TypeError, match="no sharded or meta one"):
        QuantizedEmbeddingBag.from_float(batched(4).to("meta"))


def test_batched_tables_without_ids():
    small = QuantizedEmbeddingBag.from_float(batched(8), 8)
    empty = torch.empty(0, dtype=torch.int64)
    assert not small(empty, torch.zeros(9, dtype=torch.int64)).any()
    assert small(empty, torch.zeros(1, dtype=torch.int64)).shape == (0, 96)


# Graphs.


@of_both_bits
def test_compiled_without_a_break(bits):
    table = QuantizedEmbedding.from_float(embedding(9, 70), bits)
    bags = QuantizedEmbeddingBag.from_float(gpu_embed.EmbeddingBag(9, 70, padding_idx=1), bits)
    tables = QuantizedEmbeddingBag.from_float(batched(bits), bits)
    ids = torch.tensor([[1, 8], [3, 0]])
    for layer, arguments in ((table, (ids,)), (bags, (ids,)), (tables, tuple(batch_of("cpu")))):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        assert torch.equal(compiled(*arguments), layer(*arguments))


def test_vmap():
    small = QuantizedEmbedding.from_float(embedding(9, 70), 4)
    ids = torch.tensor([[1, 8], [3, 0]])
    assert torch.equal(torch.func.vmap(small)(ids), small(ids))


@of_both_bits
def test_exported_lookups_are_plain_operators(bits):
    small = QuantizedEmbedding.from_float(embedding(9, 70), bits)
    ids = torch.tensor([[1, 8], [3, 0]])
    program = torch.export.export(small, (ids,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("gpu_embed" in target for target in targets)
    assert torch.equal(program.module()(ids), small(ids))
    more = ids.repeat(3, 1)
    assert torch.equal(program.module()(more), small(more))


def test_numbers_made_of_bytes_by_arithmetic():
    """All of fp16, and of fp32 subnormal ones and the ends too: what graphs for ONNX do."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(FP16)
    generator = torch.Generator().manual_seed(0)
    floats = (
        torch.randint(-(2**31), 2**31, (10**5,), generator=generator).to(torch.int32).view(FP32)
    )
    ends = [0.0, -0.0, 1e-45, -1e-40, 3.4028234e38, 1.0]
    for numbers in (halves, torch.cat([floats, torch.tensor(ends)])):
        numbers = numbers[numbers.isfinite()]
        data = numbers.view(torch.uint8).view(len(numbers), -1)
        assert torch.equal(fused_rows._from_bytes(data, numbers.dtype), numbers.float())
    layout = FusedRows(70, 32, 4)
    rows = fused_rows.quantize_rows(embedding(9, 70).weight, layout)
    expected = fused_rows.dequantize(rows, layout)
    assert same_bits(fused_rows.dequantize(rows, layout, for_onnx=True), expected)
