"""torch.export records torch's operators alone, and what it records computes what the layers do."""

import copy

import pytest
import torch
from served import (
    CASES,
    UNIFORM,
    Bags,
    D,
    Lookup,
    Rows,
    Tables,
    V,
    exported,
    integers,
    is_torchs,
    made,
    operators,
    with_integers,
)
from tiers import where
from torch.export import Dim

import gpu_embed

# torch's own, about its exporter.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Sparse invariant checks are implicitly disabled",
    )
]
each_way = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@where(lambda dynamic, strict: dynamic or not strict)
@each_way
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("case", CASES)
def test_a_program_holds_torchs_operators_alone(case, dynamic, strict):
    """Drop-in: bit for bit, also decomposed, for batches of other sizes."""
    model = made(case)
    program = exported(model, dynamic=dynamic, strict=strict)
    assert all(map(is_torchs, operators(program))), operators(program)
    assert any(name.startswith("aten.embedding") for name in operators(program))
    decomposed = program.run_decompositions()
    assert all(map(is_torchs, operators(decomposed))), operators(decomposed)
    assert "aten.promote_types.default" not in operators(program)
    for size in (4, 3, 9) if dynamic else (4,):
        batch = model.batch(size)
        expected = model(*batch)
        assert expected.shape[0] > 0
        for one in (program, decomposed):
            assert torch.equal(one.module()(*batch), expected)


@each_way
@pytest.mark.parametrize(
    "case",
    [
        "lookup",
        "rows, max",
        "rows, mean, padding",
        "bags, sum",
        "tables, padded",
        "swapped",
        "quantized rows, padding",
        "quantized tables, padded",
    ],
)
@pytest.mark.parametrize("size", [1, 0])
def test_one_example_and_none(case, size, strict):
    """What was exported with several serves one, and none."""
    model = made(case)
    batch = model.batch(size)
    assert torch.equal(exported(model, strict=strict).module()(*batch), model(*batch))


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if "fp16" not in case and "uint8" not in case and "quantized" not in case
    ],
)
def test_gradients_of_a_program(case):
    """Drop-in: rows of padding get none, the first of equal maxima gets all, sparse ones stay sparse."""
    model = made(case)
    other = copy.deepcopy(model)
    batch = [
        one.clone().requires_grad_() if one.is_floating_point() else one for one in model.batch(4)
    ]
    program = exported(other).module()
    outputs = model(*batch), program(*batch)
    grad_output = integers(*outputs[0].shape, seed=3, dtype=outputs[0].dtype)
    grads = []
    for output, one in zip(outputs, (model, other), strict=True):
        for tensor in (*batch, *one.parameters()):
            tensor.grad = None
        output.backward(grad_output)
        tensors = [one for one in batch if one.requires_grad] + list(one.parameters())
        grads.append([tensor.grad.to_dense().clone() for tensor in tensors])
    exact = (
        "mean" not in case
        and "int16" not in case
        and "per table" not in case
        and "padded" not in case
    )
    for ours, theirs in zip(*grads, strict=True):
        # A third of a gradient is rounded, and added in another order: at most 12 of them, each below 4.
        atol = 0 if exact else 12 * 12 * 4 * 2**-24
        torch.testing.assert_close(theirs, ours, rtol=0, atol=atol)


@pytest.mark.parametrize("sizes", [UNIFORM, {"a": (V, 4), "b": (V, 8)}])
def test_the_kind_of_a_sparse_gradient(sizes):
    """As torch's where torch has one: a COO tensor, of tables of one dim."""
    model = with_integers(Tables(sizes=sizes, sparse=True))
    exported(model).module()(*model.batch(4)).sum().backward()
    assert model.tables.weight.grad.is_sparse == (sizes is UNIFORM)


@each_way
@pytest.mark.parametrize(
    "argument", [{"max_norm": 2.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_arguments_that_change_the_table_or_its_gradient(argument, strict):
    model = with_integers(Lookup(padding_idx=1, **argument))
    program = exported(copy.deepcopy(model), strict=strict).module()
    for _ in range(2):
        batch = model.batch(5)
        results = []
        for one in (model, program):
            one.zero_grad()
            output = one(*batch)
            output.sum().backward()
            (weight,) = one.parameters()
            assert weight.grad.is_sparse == ("sparse" in argument)
            results.append((output, weight, weight.grad.to_dense()))
        # torch's renormalization, unlike ours, rounds its factor before it multiplies.
        rtol = 2**-21 if "max_norm" in argument else 0
        torch.testing.assert_close(*results, rtol=rtol, atol=0)


WRONG_IDS = {
    "lookup": (Lookup, lambda ids: ids),
    "rows, sum": (lambda: Rows(mode="sum"), lambda ids: ids),
    "rows, max": (lambda: Rows(mode="max"), lambda ids: ids),
    "bags": (lambda: Bags(mode="mean"), lambda ids: ids),
}


@pytest.mark.parametrize("wrong", [-1, V, 10**6])
@pytest.mark.parametrize("case", WRONG_IDS)
def test_an_id_out_of_range_is_the_operators_error(case, wrong):
    model = with_integers(WRONG_IDS[case][0]())
    program = exported(model).module()
    ids, *rest = model.batch(4)
    ids.view(-1)[0] = wrong
    with pytest.raises(
        (IndexError, RuntimeError), match=r"index out of range|Expected idx|valid range"
    ):
        program(ids, *rest)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("feature", range(3))
@pytest.mark.parametrize("wrong", [-1, "rows", 10**6])
def test_no_program_reads_rows_of_another_table(pooled, feature, wrong):
    """An id that its table does not have is an error, though the buffer has a row there."""
    model = with_integers(Tables(pooled=pooled, sizes=UNIFORM))
    program = exported(model).module()
    ids, offsets = model.batch(4)
    first, end = offsets[feature * 4], offsets[feature * 4 + 4]
    assert first < end
    ids[first] = model.tables.layout.num_embeddings[feature] if wrong == "rows" else wrong
    with pytest.raises(IndexError, match="index out of range"):
        program(ids, offsets)
    with pytest.raises(IndexError):
        model(ids, offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_sums_of_fractions(mode, dtype):
    """Within the rounding of sums of n numbers in fp32, and of two roundings to the table's dtype."""
    model = Rows(mode=mode, dtype=dtype)
    values = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.table.weight.copy_(torch.randn(V, D, generator=values))
    ids = torch.randint(V, (5, 40), generator=values)
    program = torch.export.export(model, (ids,)).module()
    rows = model.table.weight.double()[ids]
    exact, size = rows.sum(1), ids.shape[1]
    bound = size * 2**-24 * rows.abs().sum(1)
    if mode == "mean":
        exact, bound = exact / size, bound / size
    bound = bound + 2 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert ((program(ids).double() - exact).abs() <= bound).all()


def test_bags_of_one_dimension_with_the_batch_as_a_named_dim():
    model = with_integers(Tables(sizes=UNIFORM))
    batch = Dim("batch")
    shapes = ((({0: Dim.DYNAMIC}), {0: 3 * batch + 1}),)
    program = torch.export.export(model, model.batch(4), dynamic_shapes=shapes, strict=True)
    for size in (6, 2):
        other = model.batch(size)
        assert torch.equal(program.module()(*other), model(*other))


def test_batch_sizes_of_their_own():
    """Features with a batch size each."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = gpu_embed.TableBatchedEmbeddingBag({"a": (V, 3), "b": (V, 5)}, "mean")

        def forward(self, ids, offsets):
            return self.tables(ids, offsets, batch_sizes={"a": 3, "b": 1})

    model = with_integers(Model())
    batch = integers(6, low=0, high=V).long(), torch.tensor([0, 2, 2, 3, 6])
    program = torch.export.export(model, batch)
    assert all(map(is_torchs, operators(program)))
    assert torch.equal(program.module()(*batch), model(*batch))


def test_torch_compile_keeps_our_operator_after_an_export():
    model = made("lookup")
    exported(model)
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    torch.compile(model, backend=backend, fullgraph=True)(*model.batch(4))
    (graph,) = graphs
    targets = {str(node.target) for node in graph.graph.nodes}
    assert "gpu_embed.embedding.default" in targets
