"""What only a GPU can show of batched tables: huge buffers, CUDA graphs, host syncs, memory, late errors."""

from collections.abc import Iterator

import pytest
import torch
from cases import same_bits
from gpu_cases import DEVICE, captured, forced, integers, no_host_sync, random_ids
from table_cases import by_torch, integer_layer
from torch import Tensor

import gpu_embed
from gpu_embed import TableBatchedEmbeddingBag, optim

pytestmark = pytest.mark.gpu

SIZES = {
    "uniform": [(500, 32), (3000, 32), (40, 32), (900, 32)],
    "mixed": [(500, 32), (3000, 64), (40, 4), (900, 20)],
    "odd": [(500, 33), (3000, 7), (40, 1), (900, 130)],
}
MODES = {
    "sums": ["sum"] * 4,
    "means": ["mean", "sum", "mean", "sum"],
    "maxima": ["max", "sum", "mean", "max"],
}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
every_mode = pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
every_dtype = pytest.mark.parametrize(
    ("dtype", "method"),
    [
        pytest.param(dtype, method, id=f"{dtype}-{method}".removeprefix("torch."))
        for dtype, method in (
            (torch.float32, "atomic"),
            (torch.float32, "sorted"),
            (torch.float64, "atomic"),
            (torch.float64, "sorted"),
            (torch.bfloat16, "sorted"),
            (torch.float16, "sorted"),
        )
    ],
)
OPTIMIZERS = [optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam, optim.AdamW]


@pytest.fixture(params=["triton", "cupy"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend with kernels of our own, forced; no error of an earlier lookup may be left over."""
    yield from forced(request.param)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batch(layer: TableBatchedEmbeddingBag, num_bags: int, length: int = 8, seed: int = 0) -> tuple:
    """Ids and offsets of so many bags a table, of random lengths, some of them empty; always as many ids."""
    num_tables = len(layer)
    per_table = num_bags * length
    ids = torch.cat(
        [
            # Powers make some rows hot.
            (random_ids(per_table, 1000, seed + table) / 1000.0).pow(3).mul(rows).long()
            for table, rows in enumerate(layer.layout.num_embeddings)
        ]
    )
    cuts = random_ids(num_tables * num_bags, per_table, seed).view(num_tables, num_bags)
    begins = cuts.sort(1).values + per_table * torch.arange(num_tables, device=DEVICE)[:, None]
    begins[:, 0] = per_table * torch.arange(num_tables, device=DEVICE)
    end = begins.new_full((1,), num_tables * per_table)
    return ids, torch.cat([begins.flatten(), end])


def results(layer: TableBatchedEmbeddingBag, ids: Tensor, offsets: Tensor, grad_output: Tensor):
    output = layer(ids, offsets)
    return output, *torch.autograd.grad(output, layer.weight, grad_output)


@every_size
@every_mode
@every_dtype
def test_they_equal_torchs_bags_in_fp64(backend, sizes, modes, dtype, method):
    """Accumulation: small integers, so sums and maxima are exact; means are divided once."""
    layer = integer_layer(sizes, DEVICE, dtype, mode=modes, padding_idx=[0, None, -1, 3])
    ids, offsets = batch(layer, 300)
    grad_output = integers(300, len(layer.tables.table_of_column), dtype=dtype, seed=1)
    with gpu_embed.use_gradient_method(method):
        output, grad = results(layer, ids, offsets, grad_output)
    expected = by_torch(layer, ids, offsets, grad_output)
    eps = torch.finfo(dtype).eps
    bound = eps * expected.output.cpu().double().abs() if "mean" in modes else 0
    assert ((output.cpu().double() - expected.output.cpu().double()).abs() <= bound).all()
    for number, right in enumerate(expected.tables):
        actual = layer.layout.view(grad, number).cpu().double()
        # At most 2400 terms of at most 2, each rounded twice, and one rounding of each sum.
        bound = eps * right.cpu().double().abs()
        if "mean" in modes:
            bound += 2400 * 2 * 3 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert ((actual - right.cpu().double()).abs() <= bound).all()


@every_size
@every_mode
@pytest.mark.parametrize("method", ["atomic", "sorted"])
def test_cuda_graphs_replay_forward_and_backward(backend, sizes, modes, method):
    """No host sync: one capture serves ids, offsets and gradients that change."""
    layer = integer_layer(sizes, DEVICE, mode=modes)
    ids, offsets = batch(layer, 300)
    grad_output = integers(300, len(layer.tables.table_of_column))
    with gpu_embed.use_gradient_method(method):
        graph, found = captured(lambda: results(layer, ids, offsets, grad_output))
        for tensor, other in zip((ids, offsets), batch(layer, 300, seed=1), strict=True):
            tensor.copy_(other)
        grad_output.copy_(integers(*grad_output.shape, seed=1))
        graph.replay()
        output, grad = (tensor.clone() for tensor in found)
        expected = results(layer, ids, offsets, grad_output)
    assert torch.equal(output, expected[0])
    if method == "sorted":
        assert torch.equal(grad, expected[1])
    else:
        # Atomics add means in any order: at most 2400 terms of at most 2.
        assert ((grad - expected[1]).abs() <= 2400 * 2 * 2**-23).all()


@every_size
@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.Adagrad, optim.RowWiseAdagrad])
def test_cuda_graphs_replay_steps(backend, sizes, optimizer_class):
    """No host sync: ids, offsets and the learning rate may change between replays."""
    layers = [integer_layer(sizes, DEVICE, mode=MODES["maxima"], sparse=True) for _ in range(2)]
    ids, offsets = batch(layers[0], 100)
    lr = torch.tensor(0.5, device=DEVICE)
    grad_output = integers(100, len(layers[0].tables.table_of_column))
    optimizers = [optimizer_class(layer.parameters(), lr=lr) for layer in layers]

    def step(which: int = 0) -> tuple[Tensor, ...]:
        optimizers[which].zero_grad()
        layers[which](ids, offsets).backward(grad_output)
        optimizers[which].step()
        return ()

    graph, _ = captured(step)
    # What the warm-up did, the twin does too; capturing itself runs nothing.
    for _ in range(2):
        step(1)
    for seed in (1, 2):
        for tensor, other in zip((ids, offsets), batch(layers[0], 100, seed=seed), strict=True):
            tensor.copy_(other)
        lr.fill_(0.25 * seed)
        graph.replay()
        step(1)
        assert same_bits(layers[0].weight.detach(), layers[1].weight.detach())


@every_size
@every_mode
@pytest.mark.parametrize("method", ["atomic", "sorted"])
def test_no_host_sync(backend, sizes, modes, method):
    """No host sync: forward, backward and double backward wait for nothing."""
    layer = integer_layer(sizes, DEVICE, mode=modes, padding_idx=0)
    ids, offsets = batch(layer, 100)
    grad_output = integers(100, len(layer.tables.table_of_column)).requires_grad_()

    def step() -> None:
        output = layer(ids, offsets)
        (grad,) = torch.autograd.grad(output, layer.weight, grad_output, create_graph=True)
        torch.autograd.grad(grad, grad_output, torch.ones_like(grad))

    with gpu_embed.use_gradient_method(method):
        step()
        with no_host_sync():
            step()


@every_size
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("in_backward", [False, True])
def test_no_host_sync_for_optimizers(backend, sizes, optimizer_class, in_backward):
    """No host sync: not for groups of tables, chosen rows, random rounding, clipping or scaling."""
    layer = integer_layer(
        sizes, DEVICE, torch.bfloat16, mode=MODES["maxima"], padding_idx=0, sparse=True
    )
    ids, offsets = batch(layer, 100)
    params = [
        {"params": layer.parameters_of("0", "1"), "lr": torch.tensor(0.1, device=DEVICE)},
        {"params": layer.parameters_of("3"), "rows": range(400)},
    ]
    arguments = {"lr": 0.1, "stochastic_rounding": True, "seed": 1}
    if in_backward:
        optim.apply_in_backward(params, optimizer_class, **arguments)
    else:
        optimizer = optimizer_class(params, **arguments)

    def step() -> None:
        layer(ids, offsets).sum().backward()
        if not in_backward:
            optim.clip_grad_norm_(layer.parameters(), 1.0)
            layer.weight.grad.mul_(0.5)
            optimizer.step()
            optimizer.zero_grad()

    step()
    with no_host_sync():
        step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_size
def test_gradients_repeat_bit_for_bit(backend, deterministic, sizes, dtype):
    """Determinism: also where rounding depends on the order."""
    layer = integer_layer(sizes, DEVICE, dtype, mode=MODES["maxima"])
    ids, offsets = batch(layer, 3000)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (3000, len(layer.tables.table_of_column))
    grad_output = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    first, second = (results(layer, ids, offsets, grad_output)[1] for _ in range(2))
    assert same_bits(first, second)


@every_size
def test_bad_ids_are_reported_late_and_by_the_name_of_their_table(backend, sizes):
    """Bounds: at the backward of the call; the tables and the next call are right."""
    names = dict(zip(("user", "item", "shop", "day"), sizes, strict=True))
    layer = integer_layer(names, DEVICE, mode=MODES["maxima"])
    ids, offsets = batch(layer, 100)
    good = layer(ids, offsets)
    bad = ids.clone()
    bad[801] = 3000  # one past the end of the second table, whose bags begin at position 800
    output = layer(bad, offsets)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"found idx to be 3000, at .* of table 'item'"):
        output.sum().backward()
    assert torch.equal(layer(ids, offsets), good)
    good.sum().backward()


@every_size
@pytest.mark.parametrize("method", ["atomic", "sorted"])
def test_memory_of_a_backward(backend, sizes, method):
    """Beyond the gradient 40 bytes an id and 64 MiB, and 4 bytes a bag."""
    layer = integer_layer([(1000 * rows, dim) for rows, dim in sizes], DEVICE)
    ids, offsets = batch(layer, 50_000)
    grad_output = integers(50_000, len(layer.tables.table_of_column))
    with gpu_embed.use_gradient_method(method):
        results(layer, ids, offsets, grad_output)
        output = layer(ids, offsets)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (grad,) = torch.autograd.grad(output, layer.weight, grad_output)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak <= grad.nbytes + 40 * len(ids) + 4 * len(offsets) + 64 * 2**20


@every_size
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_memory_of_a_step(backend, sizes, optimizer_class):
    """Beyond state and gradient: 32 bytes an id and 64 MiB, whatever the tables' height."""
    layer = integer_layer([(1000 * rows, dim) for rows, dim in sizes], DEVICE, sparse=True)
    optimizer = optimizer_class(layer.parameters())
    for num_bags in (10, 10_000):
        ids, offsets = batch(layer, num_bags)
        optimizer.zero_grad()
        layer(ids, offsets).sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() - before
    sums = 0
    if backend == "cupy" and optimizer_class is optim.RowWiseAdagrad:
        # It takes two steps there: the values, where they lie, and their sums.
        sums = 6 * 4 * len(ids) * max(dim for _, dim in sizes)
    assert peak <= 32 * len(ids) + 64 * 2**20 + sums


# Past 2**31 elements: the last of the tables begins behind them.


def huge_layer(**arguments: object) -> tuple[TableBatchedEmbeddingBag, int]:
    """Tables of different widths, zero; and the rows of the last but one."""
    rows = 2**26
    layer = TableBatchedEmbeddingBag(
        [(5, 8), (rows, 32), (7, 8)], dtype=torch.bfloat16, device="meta", **arguments
    )
    layer = layer.to_empty(device=DEVICE)
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.layout.first_elements[2] > 2**31
    return layer, rows


@pytest.mark.large
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_rows_past_2_31_elements(backend, mode):
    """64-bit addresses: 64-bit addresses of rows that are read, and of their gradients."""
    layer, rows = huge_layer(mode=mode)
    with torch.no_grad():
        layer["1"][-1] = 3
        layer["2"][-1] = 5
        layer["2"][-2] = 4
    ids = torch.tensor([4, rows - 1, 0, 6, 5], device=DEVICE)
    offsets = torch.tensor([0, 1, 3, 5], device=DEVICE)
    output = layer(ids, offsets)
    assert output[0, [0, 8, 40]].tolist() == [0, 3, 9 if mode == "sum" else 5]
    output.sum().backward()
    grad = layer.weight.grad
    last = [layer.layout.view(grad, number) for number in range(3)]
    assert last[1][-1].tolist() == [1] * 32
    assert last[2][:, 0].tolist() == [0, 0, 0, 0, 0, 1 if mode == "sum" else 0, 1]
    expected = 8 + 32 * (2 if mode == "sum" else 1) + 8 * (2 if mode == "sum" else 1)
    assert grad.sum(dtype=torch.float64) == expected


@pytest.mark.large
@pytest.mark.parametrize("optimizer_class", [optim.SGD, optim.RowWiseAdagrad])
def test_rows_past_2_31_elements_are_updated(backend, optimizer_class):
    """64-bit addresses: 64-bit addresses of weight and state."""
    layer, rows = huge_layer(sparse=True)
    optimizer = optimizer_class(layer.parameters(), lr=0.5)
    ids = torch.tensor([4, rows - 1, 0, 6, 5], device=DEVICE)
    layer(ids, torch.tensor([0, 1, 3, 5], device=DEVICE)).sum().backward()
    optimizer.step()
    # A constant gradient of 1: both move by lr times its sign, but for eps.
    for name, touched in (("0", [4]), ("1", [rows - 1, 0]), ("2", [6, 5])):
        assert layer[name][touched].eq(-0.5).all()
    assert layer.weight.count_nonzero() == 8 + 2 * 32 + 2 * 8


@pytest.mark.large
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_outputs_past_2_31_elements(backend, mode):
    """64-bit addresses: 64-bit addresses of outputs, and of the gradients that they get."""
    num_bags = 2**26 + 5
    layer = integer_layer([(100, 24), (50, 8)], DEVICE, torch.bfloat16, mode=mode)
    ids = torch.cat([random_ids(num_bags, 100), random_ids(num_bags, 50, 1)])
    offsets = torch.arange(2 * num_bags + 1, device=DEVICE)
    output = layer(ids, offsets)
    for start in range(0, num_bags, 2**22):
        part = slice(start, min(start + 2**22, num_bags))
        second = ids[num_bags + part.start : num_bags + part.stop]
        assert torch.equal(output[part, :24], layer["0"][ids[part]]), start
        assert torch.equal(output[part, 24:], layer["1"][second]), start
    grad_output = torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE).expand_as(output)
    (grad,) = torch.autograd.grad(output, layer.weight, grad_output)
    for number, own in enumerate((ids[:num_bags], ids[num_bags:])):
        rows = layer.layout.view(grad, number)
        counts = own.bincount(minlength=len(rows))
        assert torch.equal(rows[:, 0], counts.to(torch.bfloat16))


# Small enough to run under compute-sanitizer: `make gpu` picks tests by the word in their names.


@every_size
@every_mode
def test_sanitizer_finds_nothing_in_batched_tables(backend, sizes, modes):
    """Bounds: lookups, gradients and updates, with ids and offsets that are wrong."""
    small = [(1 + rows % 19, dim) for rows, dim in sizes]
    for sparse in (False, True):
        layer = integer_layer(small, DEVICE, mode=modes, padding_idx=0, sparse=sparse)
        ids, offsets = batch(layer, 12)
        for method in ("auto", "sorted"):
            with gpu_embed.use_gradient_method(method):
                layer(ids, offsets).sum().backward()
        ids[5], ids[-1], offsets[7], offsets[9] = 20, -1, 2**40, -5
        with gpu_embed.set_bounds_check("off"):
            layer(ids, offsets).sum().backward()
        for optimizer_class in OPTIMIZERS if sparse else ():
            optimizer_class(layer.parameters()).step()
    torch.cuda.synchronize()
