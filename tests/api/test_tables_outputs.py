"""Batched tables whose features have a batch size each, and whose outputs have a dtype of their own."""

import pytest
import torch
from table_cases import (
    TABLES,
    Result,
    assert_same,
    by_layer,
    by_torch,
    gradient_like,
    integer_layer,
    integers,
    random_input,
)
from targets import has_method
from tiers import where
from torch._dynamo.testing import CompileCounterWithBackend

import gpu_embed
from gpu_embed import batch_bags, batch_padded
from gpu_embed.backends._plan import tables as tables_plan
from gpu_embed.ops import tables as table_ops
from gpu_embed.tables import inputs as table_inputs

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Of the tables and of the output. The host build of the CUDA C++ has these, and those of the fourth pair.
DTYPES = [(FP32, BF16), (FP16, FP32), (BF16, FP16)]
MORE_DTYPES = [(BF16, FP32), (FP32, FP16), (FP16, BF16)]
every_dtype = pytest.mark.parametrize(
    "dtypes",
    [*DTYPES, *(pytest.param(pair, marks=pytest.mark.full) for pair in MORE_DTYPES)],
    ids=str,
)
mixed_or_not = pytest.mark.parametrize(
    "sizes", [TABLES["uniform"], TABLES["mixed"]], ids=["uniform", "mixed"]
)
MODES = ("mean", "max", "sum")


def is_built(target, dtypes):
    return str(target) != "cupy-cpu" or dtypes in [*DTYPES, (BF16, FP32)]


def is_not_ptx(target):
    """Where the launches are those of other tests: compiled PTX takes its time."""
    return not target.ptx


def serves(method, dtypes):
    return method != "atomic" or dtypes[0] == FP32


@pytest.fixture(params=["atomic", "sorted"])
def method(request, target):
    """Forces one gradient kernel where the backend has two; the others run once."""
    with gpu_embed.use_gradient_method(request.param):
        yield request.param


pytestmark = where(has_method)


def rounded(expected: Result, dtype: torch.dtype) -> Result:
    return expected._replace(output=expected.output.to(dtype))


# A dtype of the output.


@where(is_built)
@where(serves)
@every_dtype
@mixed_or_not
def test_outputs_and_gradients_of_each_dtype(target, method, dtypes, sizes):
    """Accumulation: the output in its own dtype, the gradient in the tables'; exact for integers."""
    table, output = dtypes
    layer = integer_layer(
        sizes, target.device, table, mode=MODES, padding_idx=[None, 0, -1], output_dtype=output
    )
    ids, offsets = random_input(layer, 3)
    actual = by_layer(layer, ids, offsets)
    assert actual.output.dtype == output
    assert actual.tables[0].dtype == table
    assert_same(actual, rounded(by_torch(layer, ids, offsets), output))


@where(is_built)
@where(serves)
@every_dtype
@mixed_or_not
def test_per_sample_weights_are_of_the_tables_dtype(target, method, dtypes, sizes):
    table, output = dtypes
    layer = integer_layer(sizes, target.device, table, padding_idx=0, output_dtype=output)
    ids, offsets = random_input(layer, 3)
    weights = integers(len(ids), seed=1).to(target.device, table)
    actual = by_layer(layer, ids, offsets, per_sample_weights=weights)
    assert actual.per_sample_weights.dtype == table
    expected = by_torch(layer, ids, offsets, per_sample_weights=weights)
    assert_same(actual, rounded(expected, output))


@where(is_not_ptx)
@pytest.mark.full
@where(is_built)
@where(serves)
@every_dtype
def test_rows_without_pooling_in_another_dtype(target, method, dtypes):
    table, output = dtypes
    sizes = TABLES["uniform"]
    layer = gpu_embed.TableBatchedEmbedding(
        sizes, padding_idx=0, device=target.device, dtype=table, output_dtype=output
    )
    ids, offsets = random_input(layer, 3)
    rows = layer(ids, offsets)
    assert rows.dtype == output
    exact = gpu_embed.TableBatchedEmbedding(sizes, padding_idx=0, dtype=FP64)
    with torch.no_grad():
        exact.weight.copy_(layer.weight)
    expected = exact(ids.cpu(), offsets.cpu())
    assert torch.equal(rows.cpu(), expected.to(output))
    rows.backward(gradient_like(rows))
    expected.backward(gradient_like(expected))
    assert torch.equal(layer.weight.grad.cpu(), exact.weight.grad.to(table))


@where(is_built)
@pytest.mark.parametrize(("dtypes", "large"), [((FP16, FP32), 2048), ((BF16, FP16), 256)], ids=str)
@mixed_or_not
def test_sums_and_gradients_are_rounded_once(target, dtypes, large, sizes):
    """Accumulation: one more than a large number, which the tables' dtype cannot hold and the output's can."""
    table, output = dtypes
    layer = integer_layer(sizes, target.device, table, output_dtype=output)
    with torch.no_grad():
        layer.weight.zero_()
        layer["0"][:2] = torch.tensor([[large], [1]])
    ids = torch.tensor([0, 1, 0], device=target.device)
    offsets = torch.tensor([0, 2, 3, 3, 3, 3, 3], device=target.device)
    grad_output = torch.zeros(2, sum(dim for _, dim in sizes), dtype=output, device=target.device)
    grad_output[:, 0] = torch.tensor([large + 1, -large])
    actual = by_layer(layer, ids, offsets, grad_output)
    assert actual.output[:, 0].tolist() == [large + 1, large]
    # Row 0 is in both bags.
    assert actual.tables[0][0, 0] == 1


@where(is_built)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_long_bags_of_another_dtype(target, dtypes, mode, monkeypatch):
    """Their parts are summed in fp32, and rounded to the output's dtype."""
    monkeypatch.setattr(tables_plan, "MIN_SPLIT_LENGTH", 4)
    table, output = dtypes
    layer = integer_layer(
        TABLES["mixed"][:2], target.device, table, mode=["sum", mode], output_dtype=output
    )
    ids = integers(44, low=0, high=2).to(target.device)
    offsets = torch.tensor([0, 12, 44], device=target.device)
    expected = by_torch(layer, ids, offsets)
    assert_same(by_layer(layer, ids, offsets), rounded(expected, output))


@where(is_not_ptx)
@pytest.mark.full
@where(is_built)
@where(serves)
@every_dtype
@mixed_or_not
def test_sparse_gradients_are_of_the_tables_dtype(target, dtypes, sizes):
    table, output = dtypes
    layer = integer_layer(sizes, target.device, table, mode=MODES, sparse=True, output_dtype=output)
    ids, offsets = random_input(layer, 3)
    actual = by_layer(layer, ids, offsets)
    assert layer.weight.grad.dtype == table
    assert_same(actual, rounded(by_torch(layer, ids, offsets), output))
    before = layer.weight.detach().clone()
    gpu_embed.optim.SGD(layer.parameters(), lr=1.0).step()
    assert torch.equal(layer.weight, before - layer.weight.grad.to_dense())


@where(is_not_ptx)
@pytest.mark.full
@where(is_built)
@where(serves)
@every_dtype
@mixed_or_not
def test_gradients_are_added_in_place(target, method, dtypes, sizes, monkeypatch):
    table, output = dtypes
    layer = integer_layer(sizes, target.device, table, mode=MODES, output_dtype=output)
    ids, offsets = random_input(layer, 3)
    by_layer(layer, ids, offsets)
    gradient, before = layer.weight.grad, layer.weight.grad.clone()
    added = []
    monkeypatch.setattr(torch.autograd.graph, "increment_version", added.append)
    handle = gpu_embed.accumulate_in_place(layer)
    sums = layer(ids, offsets)
    sums.backward(gradient_like(sums))
    handle.remove()
    assert any(one is gradient for one in added)
    assert torch.equal(layer.weight.grad, 2 * before)


@where(is_not_ptx)
@pytest.mark.full
@where(is_built)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_second_derivatives_of_each_dtype(target, dtypes):
    """As torch: the sum of grad_output times a gradient's weights is a lookup of these, in the output's dtype."""
    table, output = dtypes
    layer = integer_layer(TABLES["mixed"], target.device, table, output_dtype=output)
    ids, offsets = random_input(layer, 3)
    weights = integers(len(ids), seed=1).to(target.device, table).requires_grad_()
    sums = layer(ids, offsets, weights)
    grad_output = gradient_like(sums.detach()).requires_grad_()
    inputs = layer.weight, weights
    first = torch.autograd.grad(sums, inputs, grad_output, create_graph=True)
    assert [one.dtype for one in first] == [table, table]
    directions = [integers(*one.shape, seed=2).to(one) for one in first]
    second = torch.autograd.grad(first, (grad_output, *inputs), directions)
    assert [one.dtype for one in second] == [output, table, table]
    ours = layer.weight.detach(), weights.detach()
    exact = gpu_embed.TableBatchedEmbeddingBag(TABLES["mixed"], dtype=FP64)

    def look_up(weight, per_sample_weights):
        one = {"weight": weight.cpu().double()}
        bags = (ids.cpu(), offsets.cpu(), per_sample_weights.cpu().double())
        with gpu_embed.use_backend("torch"):
            return torch.func.functional_call(exact, one, bags)

    product = look_up(directions[0], ours[1]) + look_up(ours[0], directions[1])
    assert torch.equal(second[0].cpu().double(), product.detach())


@where(is_not_ptx)
@pytest.mark.full
def test_opcheck_of_another_dtype(target):
    """Drop-in: torch.library's own checks."""
    layer = integer_layer([(3, 4), (2, 4)], target.device, FP32, mode=["max", "mean"])
    ids, offsets = random_input(layer, 1)
    shape = layer.layout.shape(True)._replace(table_dtype=FP32, output_dtype=BF16)
    tables = (layer.tables.fields, layer.tables.table_of_column, None, *shape)
    op = table_ops.table_batched_embedding_max
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, (layer.weight, ids, offsets, *tables, False, True), test_utils=checks)
    _, max_positions = op(layer.weight, ids, offsets, *tables, False, True)
    arguments = (layer.weight, None, ids, offsets, max_positions, *tables, False, False)
    torch.library.opcheck(table_ops.table_batched_embedding, arguments, test_utils=checks)


@where(is_not_ptx)
def test_empty_outputs_have_their_dtype(target):
    layer = integer_layer([(3, 4), (2, 4)], target.device, output_dtype=BF16)
    none = torch.zeros(0, dtype=torch.int64, device=target.device)
    sums = layer(none, torch.zeros(5, dtype=torch.int64, device=target.device))
    assert (sums.dtype, sums.shape) == (BF16, (2, 8))
    sums.sum().backward()
    assert layer.weight.grad.dtype == FP32
    assert not layer.weight.grad.any()


def test_wrong_output_dtypes():
    with pytest.raises(TypeError, match=r"output_dtype must be torch.float32, .*got torch.int64"):
        gpu_embed.TableBatchedEmbeddingBag([(3, 4)], output_dtype=torch.int64)
    ids = torch.tensor([0]), torch.tensor([0, 1])
    for dtype, output in ((FP64, FP32), (BF16, FP64)):
        layer = integer_layer([(3, 4)], dtype=dtype, output_dtype=output)
        with pytest.raises(RuntimeError, match=f"output_dtype is {output}, but the tables are"):
            layer(*ids)
    layer = integer_layer([(3, 4)], output_dtype=FP32)
    assert "output_dtype=torch.float32" in repr(layer)
    # Kept where the tables are converted.
    assert layer.bfloat16()(*ids).dtype == FP32


# A batch size a feature.


SIZES = {"a": (7, 4), "b": (3, 12), "c": (5, 8)}
NUM_BAGS = {"a": 4, "b": 1, "c": 0}


def ragged(
    device: str, num_bags: dict[str, int] = NUM_BAGS
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, offsets and weights of each feature."""
    bags = {}
    for number, (name, count) in enumerate(num_bags.items()):
        lengths = integers(count, seed=number, low=0, high=4)
        ends = lengths.cumsum(0)
        ids = integers(int(lengths.sum()), seed=number, low=0, high=SIZES[name][0])
        weights = integers(len(ids), seed=9).float()
        bags[name] = tuple(one.to(device) for one in (ids, ends - lengths, weights))
    return bags


def alone(layer, name, ids, offsets, weights=None):
    """What a layer of this feature's table says."""
    module = layer.to_modules()[name]
    return torch.nn.functional.embedding_bag(
        ids, module.weight, offsets, mode=module.mode, per_sample_weights=weights
    )


@where(is_not_ptx)
@pytest.mark.parametrize("order", ["abc", "cba"])
@pytest.mark.parametrize("mode", ["sum", "weighted", "max"])
def test_features_of_different_batch_sizes(target, method, order, mode):
    """Each feature's sums and gradients are those of its own bags; behind them there are zeros."""
    layer = integer_layer(SIZES, target.device, mode={"a": "max"} if mode == "max" else "sum")
    bags = ragged(target.device)
    if mode != "weighted":
        bags = {name: one[:2] for name, one in bags.items()}
    batch = batch_bags({name: bags[name] for name in order})
    assert batch.batch_sizes == {name: NUM_BAGS[name] for name in order}
    assert len(batch.offsets) == sum(NUM_BAGS.values()) + 1
    output = layer(*batch)
    assert output.shape == (4, 24)
    parts = layer.split(output, batch.batch_sizes)
    for name, part in zip(layer, parts, strict=True):
        assert part.shape == (NUM_BAGS[name], SIZES[name][1])
        if NUM_BAGS[name]:
            assert torch.equal(part, alone(layer, name, *bags[name]))
    for part, size in zip(layer.split(output), NUM_BAGS.values(), strict=True):
        assert not part[size:].any()
    torch.autograd.backward(parts, [gradient_like(part) for part in parts])
    for number, (name, rows) in enumerate(layer.to_modules().items()):
        rows.weight.requires_grad_()
        if NUM_BAGS[name]:
            sums = torch.nn.functional.embedding_bag(
                bags[name][0],
                rows.weight,
                bags[name][1],
                mode=rows.mode,
                per_sample_weights=bags[name][2] if mode == "weighted" else None,
            )
            sums.backward(gradient_like(sums))
            expected = rows.weight.grad
        else:
            expected = torch.zeros_like(rows.weight)
        assert torch.equal(layer.layout.view(layer.weight.grad, number), expected)


@where(is_not_ptx)
@pytest.mark.full
def test_rows_of_different_batch_sizes(target):
    layer = gpu_embed.TableBatchedEmbedding(
        {"a": (7, 4), "b": (3, 4), "c": (5, 4)}, device=target.device
    )
    bags = {name: one[:2] for name, one in ragged(target.device).items()}
    rows = layer(*batch_bags({name: bags[name] for name in "bca"}))
    expected = [layer[name][bags[name][0]] for name in "bca"]
    assert torch.equal(rows, torch.cat(expected))
    # Offsets as KeyedJaggedTensor has them, with the sizes in the order of the ids.
    ids = torch.cat([bags[name][0] for name in "abc"])
    offsets = batch_bags(bags).offsets
    assert torch.equal(
        layer(ids, offsets, batch_sizes=[4, 1, 0]), torch.cat([expected[2], *expected[:2]])
    )


@pytest.mark.parametrize("how", ["last offset", "padding", "lengths"])
def test_every_way_to_a_batch(how):
    """A batch of different sizes has the bags of its features, whatever it is made of, and by name or not."""
    user = torch.tensor([[1, 2, 0], [3, 0, 0], [0, 0, 0]])
    item = torch.tensor([[4, 4]])
    if how == "padding":
        make = lambda ids: batch_padded(ids, padding_value=0)  # noqa: E731
    elif how == "lengths":
        make = lambda ids: batch_padded(  # noqa: E731
            ids, lengths=[torch.tensor([2, 1, 0]), torch.tensor([2])]
        )
    else:
        make = lambda ids: batch_bags(  # noqa: E731
            [
                (ids[0].flatten()[[0, 1, 3]], torch.tensor([0, 2, 3, 3])),
                (ids[1][0], torch.tensor([0, 2])),
            ],
            include_last_offset=True,
        )
    batch = make([user, item])
    assert batch.offsets.tolist() == [0, 2, 3, 3, 5]
    assert batch.input[:5].tolist() == [1, 2, 3, 4, 4]
    assert batch.batch_sizes == (3, 1)


def test_equal_sizes_are_no_batch_sizes():
    good = torch.tensor([1, 2]), torch.tensor([0, 1])
    assert batch_bags({"a": good, "b": good}).batch_sizes is None
    assert batch_padded(torch.zeros(2, 3, 4, dtype=torch.int64)).batch_sizes is None


def test_batches_where_the_host_does_not_look(monkeypatch):
    """As on CUDA and in a graph: wrong offsets stay within their feature, right ones as they are."""
    bags = [one[:2] for one in ragged("cpu").values()]
    for last in (False, True):
        if last:
            bags = [
                (ids, torch.cat([begins, begins.new_tensor([len(ids)])])) for ids, begins in bags
            ]
        seen = batch_bags(bags, last)
        monkeypatch.setattr(table_inputs, "_is_traced", lambda: True)
        unseen = batch_bags(bags, last)
        monkeypatch.undo()
        assert torch.equal(seen.offsets, unseen.offsets)
        assert torch.equal(seen.input, unseen.input)
        assert seen.batch_sizes == unseen.batch_sizes


@pytest.mark.full
def test_compiled_batches_of_different_sizes():
    """Drop-in: one graph from ids to gradients, which other sizes do not compile anew."""
    torch._dynamo.reset()
    layer = integer_layer(SIZES)

    def look_up(bags):
        batch = batch_bags(bags)
        return layer.split(layer(*batch), batch.batch_sizes)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(look_up, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for sizes in ((2, 3, 5), (3, 6, 2), (7, 6, 8), (12, 5, 6)):
        bags = ragged("cpu", dict(zip("abc", sizes, strict=True)))
        bags = {name: one[:2] for name, one in bags.items()}
        found = []
        for function in (look_up, compiled):
            layer.weight.grad = None
            parts = function(bags)
            torch.autograd.backward(parts, [gradient_like(part) for part in parts])
            found.append([*parts, layer.weight.grad])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        counts.append(counter.frame_count)
    # The first call has as many ids in one feature as bags in another, which torch takes for one symbol.
    assert counts[1:] == counts[1:2] * 3
    torch._dynamo.reset()


@where(is_not_ptx)
def test_the_errors_name_the_feature_and_the_bag(target):
    """Bounds: bags are counted as they were given."""
    layer = integer_layer(SIZES, target.device)
    bags = {name: one[:2] for name, one in ragged(target.device).items()}
    bags["b"] = torch.tensor([1, 99], device=target.device), torch.tensor([0], device=target.device)
    with (
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match="position 1 of bag 0 of table 'b'"),
    ):
        layer(*batch_bags(bags))


IDS, OFFSETS = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3])
WRONG = {
    "too few": ([2], ValueError, "batch_sizes has 1 numbers, but there are 2 features: 'a', 'b'"),
    "another sum": ([2, 2], ValueError, r"offsets has to be of shape \[5\], .* got \[4\]"),
    "negative": ([4, -1], ValueError, "batch_sizes: feature 'b' has -1 bags"),
    "no int": ([1.5, 1.5], TypeError, "batch_sizes: feature 'a' must be an int, got 1.5"),
    "a number": (3, TypeError, "batch_sizes must be ints, one a feature: a mapping"),
    "other names": (
        {"a": 2, "c": 1},
        ValueError,
        "given for 'a', 'c', but the features are 'a', 'b'",
    ),
}


@pytest.mark.parametrize(("sizes", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_batch_sizes(sizes, error, message):
    layer = integer_layer({"a": (3, 4), "b": (3, 4)})
    with pytest.raises(error, match=message):
        layer(IDS, OFFSETS, batch_sizes=sizes)


def test_wrong_calls_of_different_batch_sizes():
    layer = integer_layer({"a": (3, 4), "b": (3, 4)})
    with pytest.raises(
        ValueError, match=r"where each has a B of its own, give them as batch_sizes"
    ):
        layer(IDS, OFFSETS)
    with pytest.raises(RuntimeError, match=r"offsets\[1\] is 2 and offsets\[2\] is 1"):
        layer(IDS, torch.tensor([0, 2, 1, 3]), batch_sizes={"a": 1, "b": 2})
    with pytest.raises(TypeError, match=r"argument 'offsets' must be Tensor"):
        layer(IDS, batch_sizes=[1, 2])
    with pytest.raises(ValueError, match="split: an output of at most 3 bags a feature"):
        layer.split(torch.zeros(2, 8), [1, 3])
