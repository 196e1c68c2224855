"""Gradients of bags of every order and kind, torch.func, torch.compile and export, and opcheck."""

import pytest
import torch
import torch.nn.functional as F
from cases import integer_gradient
from torch import func
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import gpu_embed
from gpu_embed.functional import embedding_bag
from gpu_embed.ops import bag as bag_ops

# torch's own: about its compiler and its sparse tensors.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`torch.jit.script` is deprecated",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Attempted to insert a get_attr Node",
        "Sparse invariant checks are implicitly disabled",
    )
]

V, D = 4, 2
MODES = ("sum", "mean", "weighted", "max")
ARGUMENTS = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "padding, scaled": {"padding_idx": 1, "scale_grad_by_freq": True},
}
each_mode = pytest.mark.parametrize("mode", MODES)


def integers(rows, columns, device, dtype=torch.float64):
    """Distinct integers, so that products of a few are exact and no two rows tie."""
    values = torch.arange(rows * columns) * 7 % (rows * columns) - rows * columns // 2
    return values.view(rows, columns).to(dtype).to(device)


def lookup(target, form="offsets"):
    """Ids [6] in three bags, one of them empty, or ids [3, 2]; the arguments that go with them."""
    indices = torch.tensor([1, 2, 2, 0, 3, 3], device=target.device)
    if form == "2-D":
        return indices.view(3, 2), {}
    return indices, {"offsets": torch.tensor([0, 4, 4], device=target.device)}


def bag_function(target, mode, form="offsets", **arguments):
    """A function of the tables, and the tables: the weight, and for "weighted" the weights of samples."""
    indices, more = lookup(target, form)
    weight = integers(V, D, target.device).requires_grad_()
    if mode != "weighted":

        def of_table(weight):
            return embedding_bag(indices, weight, mode=mode, **more, **arguments)

        return of_table, (weight,)
    weights = (torch.arange(6.0, dtype=torch.float64, device=target.device) - 2).view(indices.shape)

    def of_both(weight, weights):
        return embedding_bag(
            indices, weight, mode="sum", per_sample_weights=weights, **more, **arguments
        )

    return of_both, (weight, weights.requires_grad_())


def quick(target):
    """One random projection instead of every entry of the Jacobian where kernels run at 10 ms each."""
    return {"fast_mode": str(target) == "triton-cpu"}


# Autograd: first and second order, backward and forward.


@pytest.mark.parametrize("kind", ["plain", "padding"])
@each_mode
def test_gradcheck(target, mode, kind):
    """As torch: reverse mode, forward mode, and batches of gradients."""
    function, tables = bag_function(target, mode, **ARGUMENTS[kind])
    assert gradcheck(
        function, tables, check_forward_ad=True, check_batched_grad=True, **quick(target)
    )


@pytest.mark.full
@pytest.mark.parametrize("kind", ["plain", "padding, scaled"])
@each_mode
def test_gradgradcheck(target, mode, kind):
    """As torch: the gradient's own gradients, by all that it depends on; torch has none."""
    arguments = ARGUMENTS[kind]
    if mode == "max":
        arguments = {name: arguments[name] for name in arguments if name == "padding_idx"}
    function, tables = bag_function(target, mode, **arguments)
    assert gradgradcheck(function, tables, check_fwd_over_rev=True, **quick(target))


@pytest.mark.full
def test_gradgradcheck_of_counts_with_ids_in_no_bag(target):
    """Ids behind the last offset are not counted in any order."""
    indices = torch.tensor([1, 2, 2, 2, 3, 3], device=target.device)
    offsets = torch.tensor([0, 2, 3], device=target.device)

    def function(weight):
        return embedding_bag(
            indices, weight, offsets, include_last_offset=True, scale_grad_by_freq=True, mode="sum"
        )

    weight = integers(V, D, target.device).requires_grad_()
    grad = torch.autograd.grad(function(weight).sum(), weight, create_graph=True)[0]
    # The third 2 is in no bag, and neither is a 3.
    assert grad.sum(1).tolist() == [0, D, D, 0]
    assert gradgradcheck(function, (weight,), check_fwd_over_rev=True, **quick(target))


@pytest.mark.full
def test_third_order(target):
    """The three operators are one another's derivatives, so there is no last order."""
    function, tables = bag_function(target, "weighted", padding_idx=1)

    def second(weight, weights):
        output = function(weight, weights)
        grads = torch.autograd.grad((output**2).sum(), (weight, weights), create_graph=True)
        return sum((grad**2).sum() for grad in grads)

    assert gradgradcheck(second, tables, fast_mode=True)


OPS = {
    "bag": lambda w, p, *bags: bag_ops.embedding_bag(w, p, *bags, False, 1, "sum", False, False),
    "backward": lambda w, p, *bags: bag_ops.embedding_bag_dense_backward(
        w[:3], p, *bags, False, 1, "sum", True, V
    ),
    "backward of mean": lambda w, p, *bags: bag_ops.embedding_bag_dense_backward(
        w[:3] * p.sum(), None, *bags, False, 1, "mean", False, V
    ),
    "weights' backward": lambda w, p, *bags: bag_ops.embedding_bag_sample_weights_backward(
        w[:3] * p[0], w, *bags, False, 1
    ),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_each_op_has_gradients_of_its_own(target, op):
    """Reverse and forward mode through each, alone: they close under differentiation."""
    indices, more = lookup(target)
    _, tables = bag_function(target, "weighted")
    assert gradcheck(
        lambda w, p: op(w, p, indices, more["offsets"]),
        tables,
        check_forward_ad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("wanted", ["weight", "weights"])
def test_only_what_is_asked_for_is_computed(target, wanted):
    """A frozen table still has weights of samples to learn, which torch's does not."""
    function, tables = bag_function(target, "weighted")
    place = ("weight", "weights").index(wanted)
    expected = torch.autograd.grad(function(*tables).sum(), tables)[place]
    tables[1 - place].requires_grad_(False)
    output = function(*tables)
    output.sum().backward()
    assert torch.equal(tables[place].grad, expected)
    assert tables[1 - place].grad is None


@pytest.mark.parametrize("name", ["ids", "offsets"])
@each_mode
def test_changed_ids_and_offsets_are_noticed(target, mode, name):
    """What backward reads must be what forward read."""
    indices, more = lookup(target)
    weight = integers(V, D, target.device).requires_grad_()
    weights = {}
    if mode == "weighted":
        weights["per_sample_weights"] = torch.ones(6, dtype=weight.dtype, device=target.device)
    mode = "sum" if mode == "weighted" else mode
    output = embedding_bag(indices, weight, mode=mode, **more, **weights)
    (indices if name == "ids" else more["offsets"]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_table_that_changed_matters_to_the_weights_alone(target):
    """The table's own gradient does not read the table: optimizers may step before it."""
    function, (weight, weights) = bag_function(target, "weighted")
    output = function(weight, weights.detach())
    with torch.no_grad():
        weight.zero_()
    output.sum().backward()
    output = function(weight, weights)
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_mode
def test_forward_mode(target, mode):
    function, tables = bag_function(target, mode)
    tangents = [table.detach().flip(0) for table in tables]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*both) for both in zip(tables, tangents, strict=True)]
        actual = forward_ad.unpack_dual(function(*duals))
    _, expected = func.jvp(function, tuple(t.detach() for t in tables), tuple(tangents))
    step = 2**-10
    moved = [t.detach() + step * tangent for t, tangent in zip(tables, tangents, strict=True)]
    back = [t.detach() - step * tangent for t, tangent in zip(tables, tangents, strict=True)]
    slope = (function(*moved) - function(*back)) / (2 * step)  # exact: no more than bilinear
    assert torch.equal(actual.primal, function(*tables))
    assert torch.equal(actual.tangent, expected)
    assert torch.allclose(actual.tangent, slope, rtol=0, atol=1e-9)


# torch.func.

TRANSFORMS = {
    "grad": lambda f, *t: func.grad(lambda *t: (f(*t) ** 2).sum())(*t),
    "vjp": lambda f, *t: func.vjp(f, *t)[1](torch.ones_like(f(*t))),
    "jacrev": lambda f, *t: func.jacrev(f)(*t),
    "jacfwd": lambda f, *t: func.jacfwd(f)(*t),
    "hessian": lambda f, *t: func.hessian(lambda *t: (f(*t) ** 2).sum())(*t),
    "functionalize": lambda f, *t: func.functionalize(func.grad(lambda *t: f(*t).sum()))(*t),
}


def by_rows(indices, weight, offsets=None, mode="sum", per_sample_weights=None):
    """Bags out of torch's own differentiable operators."""
    rows = weight[indices]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    bags = rows.unbind() if offsets is None else rows.tensor_split(offsets.tolist()[1:])
    empty = weight.new_zeros(weight.shape[1])
    reduced = {
        "sum": lambda bag: bag.sum(0),
        "mean": lambda bag: bag.sum(0) / max(len(bag), 1),
        "max": lambda bag: bag.max(0).values if len(bag) else empty,
    }
    return torch.stack([reduced[mode](bag) for bag in bags])


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@each_mode
def test_torch_func(target, mode, transform):
    """Drop-in: what functorch makes of it is what it makes of its definition."""
    indices, more = lookup(target, "2-D")
    _, tables = bag_function(target, mode, "2-D")
    tables = [table.detach() for table in tables]
    kind = "sum" if mode == "weighted" else mode

    def run(bag):
        def function(weight, weights=None):
            return bag(indices, weight, mode=kind, per_sample_weights=weights, **more)

        return torch.utils._pytree.tree_leaves(transform(function, *tables))

    actual, expected = run(embedding_bag), run(by_rows)
    assert all(map(torch.equal, actual, expected))


@each_mode
@pytest.mark.parametrize("in_dims", [(None, 0), (0, None), (0, 0)], ids=str)
def test_vmap_equals_a_loop(target, mode, in_dims):
    """Drop-in: over ids, tables and both; outputs, and gradients inside."""
    kind = "sum" if mode == "weighted" else mode
    weight = torch.stack([integers(V, D, target.device) * (i + 1) for i in range(2)])
    indices = torch.tensor([[[1, 2], [3, 3]], [[0, 1], [2, 1]]], device=target.device)
    weight = weight if in_dims[0] == 0 else weight[0]
    indices = indices if in_dims[1] == 0 else indices[0]
    weights = integer_gradient((2, 2), torch.float64, target.device) if mode == "weighted" else None

    def loss(weight, indices):
        return (embedding_bag(indices, weight, mode=kind, per_sample_weights=weights) ** 2).sum()

    actual = func.vmap(func.grad_and_value(loss), in_dims)(weight, indices)
    for i in range(2):
        example = (
            weight[i] if in_dims[0] == 0 else weight,
            indices[i] if in_dims[1] == 0 else indices,
        )
        for found, expected in zip(actual, func.grad_and_value(loss)(*example), strict=True):
            assert torch.equal(found[i], expected)


# Compilers and tracers.

COMPILED = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "padding": {"mode": "mean", "padding_idx": -2},
    "scaled": {"mode": "sum", "scale_grad_by_freq": True},
    "max_norm": {"mode": "mean", "max_norm": 2.5},
    "sparse": {"mode": "mean", "sparse": True},
    "last offset": {"mode": "sum", "include_last_offset": True},
}


def step(layer, bag, indices, offsets):
    """The output, and the table after a step."""
    output = bag(indices, offsets)
    layer.weight.grad = None
    (output * integer_gradient(tuple(output.shape), output.dtype, output.device)).sum().backward()
    with torch.no_grad():
        layer.weight -= layer.weight.grad.to_dense()
    return output.detach(), layer.weight.detach().clone()


@pytest.mark.full
@pytest.mark.parametrize("arguments", COMPILED.values(), ids=COMPILED)
def test_compiled_training_equals_eager(target, arguments):
    """Drop-in: one graph, forward and backward; new lengths do not break it."""
    torch._dynamo.reset()
    eager, compiled = (
        gpu_embed.EmbeddingBag(
            V, D, _weight=integers(V, D, target.device, torch.float32), **arguments
        )
        for _ in range(2)
    )
    graph = torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")
    for values, cuts in (([1, 2, 2, 0, 3], [0, 2, 5]), ([3, 1, 2, 2, 3, 0], [0, 0, 4, 6])):
        given = (torch.tensor(v, device=target.device) for v in (values, cuts))
        indices, offsets = given
        for found, expected in zip(
            step(compiled, graph, indices, offsets),
            step(eager, eager, indices, offsets),
            strict=True,
        ):
            assert torch.equal(found, expected)
    torch._dynamo.reset()


@pytest.mark.full
@each_mode
def test_opcheck(target, mode):
    """Schema, fake tensors, autograd registration and AOT dispatch of every operator."""
    indices, more = lookup(target)
    _, tables = bag_function(target, "weighted")
    weight, weights = tables
    bags = (indices, more["offsets"], False, 1)
    grad_output = integers(3, D, target.device).requires_grad_()
    if mode == "max":
        torch.library.opcheck(bag_ops.embedding_bag_max, (weight, *bags, True))
        torch.library.opcheck(bag_ops.embedding_bag_max, (weight.detach(), *bags, False))
        torch.library.opcheck(bag_ops.embedding_counts, (indices, V))
        return
    given = weights if mode == "weighted" else None
    kind = "mean" if mode == "mean" else "sum"
    torch.library.opcheck(bag_ops.embedding_bag, (weight, given, *bags, kind, False, False))
    torch.library.opcheck(
        bag_ops.embedding_bag_dense_backward, (grad_output, given, *bags, kind, True, V)
    )
    if mode == "weighted":
        torch.library.opcheck(
            bag_ops.embedding_bag_sample_weights_backward, (grad_output, weight, *bags)
        )


@pytest.mark.full
def test_opcheck_of_ids_in_rows(target):
    """Without offsets; the ids' shape is that of the weights' gradient."""
    indices, _ = lookup(target, "2-D")
    _, (weight, weights) = bag_function(target, "weighted", "2-D")
    bags = (indices, None, False, -1)
    torch.library.opcheck(bag_ops.embedding_bag, (weight, weights, *bags, "sum", False, False))
    torch.library.opcheck(
        bag_ops.embedding_bag_sample_weights_backward,
        (integers(3, D, target.device).requires_grad_(), weight, *bags),
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_export_with_a_dynamic_batch(mode):
    """Drop-in: torch.export of the layer."""
    layer = gpu_embed.EmbeddingBag(V, D, mode=mode)
    indices, offsets = torch.tensor([1, 2, 2, 0, 3]), torch.tensor([0, 2])
    program = torch.export.export(
        layer, (indices, offsets), dynamic_shapes=({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    )
    assert not any("gpu_embed" in str(node.target) for node in program.graph.nodes)
    other = torch.tensor([3, 0, 1]), torch.tensor([0, 0, 1])
    assert torch.equal(program.module()(*other), layer(*other))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_fake_tensors_have_the_right_shapes(mode):
    """Nothing is computed: the shapes alone tell."""
    with FakeTensorMode():
        weight = torch.empty(5, 3, requires_grad=True)
        indices, offsets = torch.zeros(7, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        output = embedding_bag(indices, weight, offsets, mode=mode, include_last_offset=True)
        assert output.shape == (3, 3)
        output.sum().backward()
        assert weight.grad.shape == (5, 3)
        assert embedding_bag(indices.view(7, 1), weight, mode=mode).shape == (7, 3)


def test_make_fx_traces_the_gradient():
    indices, offsets = torch.tensor([1, 2, 2, 0, 3]), torch.tensor([0, 2])

    def gradient(*bags):
        return func.grad(lambda w: (embedding_bag(bags[0], w, bags[1]) ** 2).sum())(bags[2])

    bags = (indices, offsets, integers(V, D, "cpu"))
    graph = make_fx(gradient, tracing_mode="symbolic")(*bags)
    names = {str(node.target) for node in graph.graph.nodes}
    assert "gpu_embed.embedding_bag.default" in names
    assert "gpu_embed.embedding_bag_dense_backward.default" in names
    assert torch.equal(graph(*bags), gradient(*bags))


def test_torchs_own_gradients_agree(target):
    """First order, against torch's function, with weights of samples."""
    function, tables = bag_function(target, "weighted")
    indices, more = lookup(target)
    expected = F.embedding_bag(indices, tables[0], mode="sum", per_sample_weights=tables[1], **more)
    output = function(*tables)
    grad_output = integer_gradient(tuple(output.shape), torch.float64, target.device)
    for ours, theirs in zip(
        torch.autograd.grad(output, tables, grad_output),
        torch.autograd.grad(expected, tables, grad_output),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
