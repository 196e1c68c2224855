"""Operators of a shard under autograd, forward mode, opcheck and torch.compile; its first row may be a symbol."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from cases import integer_gradient
from targets import MODELS, params
from tiers import where
from torch import func
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import gpu_embed
from gpu_embed.ops import bag as bags
from gpu_embed.ops import lookup as ops

# Of the operators alone: what each backend computes is tests/backends/test_shard.py.
pytestmark = [
    pytest.mark.parametrize(
        "target",
        [
            one
            if one.id == "torch-cpu"
            else pytest.param(*one.values, id=one.id, marks=[*one.marks, pytest.mark.full])
            for one in params(*MODELS)
        ],
        indirect=True,
    ),
    # torch's own.
    pytest.mark.filterwarnings("ignore:`torch.jit.\\w+` is deprecated"),
]

V, FIRST_ROW, ROWS, DIM = 9, 2, 3, 2
SHARD = [FIRST_ROW, V]
# Of the shard's rows 2, 3 and 4, its neighbours, padding, and counts that are powers of two.
IDS = [[2, 4, 1], [4, 5, 8], [3, 0, 5]]
OFFSETS = [0, 4, 4]
PADDING = {"no padding": -1, "padding here": 4, "padding elsewhere": 5}
each_padding = pytest.mark.parametrize("padding_idx", PADDING.values(), ids=PADDING)


# Past the dispatcher, or through it.
each_way = pytest.mark.parametrize("way", ["call", "operator"])


def ids_of(device):
    return torch.tensor(IDS, device=device)


def bag_arguments(device):
    return ids_of(device).view(-1), torch.tensor(OFFSETS, device=device), False


# The operator, the shapes of the tensors that it is linear in, and which of them, or of the output (-1), is a table.
KINDS = {
    "lookup": (ops, "embedding", [(ROWS, DIM)], 0),
    "gradient": (ops, "embedding_dense_backward", [(3, 3, DIM)], -1),
    "double backward": (ops, "embedding_dense_double_backward", [(ROWS, DIM)], 0),
    "sum": (bags, "embedding_bag", [(ROWS, DIM), (9,)], 0),
    "mean": (bags, "embedding_bag", [(ROWS, DIM)], 0),
    "gradient of sum": (bags, "embedding_bag_dense_backward", [(3, DIM), (9,)], -1),
    "gradient of mean": (bags, "embedding_bag_dense_backward", [(3, DIM)], -1),
    "sample weights": (bags, "embedding_bag_sample_weights_backward", [(3, DIM), (ROWS, DIM)], 1),
}


class Case:
    """One operator on a shard, and the same out of the operator on the whole table."""

    def __init__(self, way, kind, device, padding_idx, scale=False, sparse=False):
        module, name, self.shapes, self.table = KINDS[kind]
        self.op = getattr(module, f"call_{name}" if way == "call" else name)
        self.kind, self.device = kind, device
        self.ids, self.cut = ids_of(device), bag_arguments(device)
        self.padding_idx, self.scale, self.sparse = padding_idx, scale, sparse

    def arguments(self, num_rows):
        """What stands between the tensors that it is linear in and the shard."""
        scale, bag = self.scale, (*self.cut, self.padding_idx)
        return {
            "lookup": (self.ids, self.padding_idx, scale, self.sparse),
            "gradient": (self.ids, num_rows, self.padding_idx, scale),
            "double backward": (self.ids, self.padding_idx, scale),
            "sum": (*bag, "sum", scale, self.sparse),
            "mean": (None, *bag, "mean", scale, self.sparse),
            "gradient of sum": (*bag, "sum", scale, num_rows),
            "gradient of mean": (None, *bag, "mean", scale, num_rows),
            "sample weights": bag,
        }[self.kind]

    def shard(self, *tensors, shard=SHARD):
        return self.op(*tensors, *self.arguments(ROWS), shard)

    def whole(self, *tensors):
        """Rows of other shards are zeros, or left out of the result."""
        tensors = list(tensors)
        if self.table >= 0:
            tensors[self.table] = F.pad(
                tensors[self.table], (0, 0, FIRST_ROW, V - FIRST_ROW - ROWS)
            )
        output = self.op(*tensors, *self.arguments(V))
        return output if self.table >= 0 else output[FIRST_ROW : FIRST_ROW + ROWS]

    def tensors(self, dtype=torch.float64):
        return [
            integer_gradient(shape, dtype, self.device).add_(i + 1).mul_(4).requires_grad_()
            for i, shape in enumerate(self.shapes)
        ]


each_kind = pytest.mark.parametrize("kind", KINDS)


@each_way
@each_kind
@each_padding
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_derivatives_are_the_whole_tables(target, way, kind, padding_idx, scale_grad_by_freq):
    """Exactly: the output, gradients of first and second order, and the tangent of forward mode."""
    case = Case(way, kind, target.device, padding_idx, scale_grad_by_freq)

    def derivatives(function):
        tensors = case.tensors()
        output = function(*tensors)
        grad_output = integer_gradient(tuple(output.shape), output.dtype, target.device) * 3 + 1
        grads = torch.autograd.grad(
            output, tensors, grad_output.requires_grad_(), create_graph=True
        )
        inputs = (grad_output, *tensors) if len(tensors) > 1 else (grad_output,)
        seconds = torch.autograd.grad(sum((grad**2).sum() for grad in grads), inputs)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, x.flip(0)) for x in case.tensors()]
            tangent = forward_ad.unpack_dual(function(*duals)).tangent
        return output, *grads, *seconds, tangent

    for actual, expected in zip(derivatives(case.shard), derivatives(case.whole), strict=True):
        assert torch.equal(actual, expected)
        assert actual.any()


# The lookup reads its padding row, which has no gradient: no Jacobian says so.
no_padding_of_lookups = where(lambda kind, padding_idx: kind != "lookup" or padding_idx != 4)


@each_way
@pytest.mark.full
@no_padding_of_lookups
@each_kind
@each_padding
def test_gradcheck(target, way, kind, padding_idx):
    case = Case(way, kind, target.device, padding_idx)
    assert gradcheck(case.shard, case.tensors(), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(case.shard, case.tensors(), check_fwd_over_rev=True, fast_mode=True)


TRANSFORMS = {
    "vmap": func.vmap,
    "jacrev": func.jacrev,
    "jacfwd": func.jacfwd,
    "hessian": lambda f: func.hessian(lambda *x: (f(*x) ** 2).sum()),
}


@each_kind
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(target, kind, transform):
    """Drop-in: vmap takes one example after the other; the others go by it."""
    case = Case("operator", kind, target.device, padding_idx=5)
    tensors = [x.detach() for x in case.tensors()]
    if transform == "vmap":
        tensors = [torch.stack([x, 2 * x]) for x in tensors]
    actual, expected = (TRANSFORMS[transform](f)(*tensors) for f in (case.shard, case.whole))
    assert torch.equal(actual, expected)
    assert actual.any()


@pytest.mark.parametrize("in_dims", [(None, 0), (0, 0)], ids=str)
def test_vmap_over_the_ids(target, in_dims):
    weight = torch.arange(12.0, device=target.device).view(2, 3, 2)
    weight = weight if in_dims[0] == 0 else weight[0]
    ids = torch.tensor([[1, 2, 4], [4, 8, 3]], device=target.device)

    def look_up(weight, ids):
        return ops.embedding(weight, ids, -1, False, False, SHARD)

    def renormed(weight, ids):
        weight = weight.clone()
        ops.embedding_renorm_(weight, ids, 1.0, 2.0, SHARD)
        return weight

    for function in (look_up, renormed)[: 1 + (in_dims == (0, 0))]:
        actual = func.vmap(function, in_dims)(weight, ids)
        each = [function(weight if in_dims[0] is None else weight[i], ids[i]) for i in range(2)]
        assert torch.equal(actual, torch.stack(each))


# Gradients that are sparse, or added in place.


@each_way
@pytest.mark.parametrize("kind", ["lookup", "sum", "mean"])
@each_padding
def test_sparse_gradients_have_rows_of_the_shard(target, way, kind, padding_idx):
    """As torch: one entry for each id of the shard but padding, in their order."""
    dense, sparse = (
        Case(way, kind, target.device, padding_idx, sparse=sparse) for sparse in (False, True)
    )
    found = []
    for case in (dense, sparse):
        tensors = case.tensors()
        output = case.shard(*tensors)
        grad_output = integer_gradient(tuple(output.shape), output.dtype, target.device) + 4
        found.append(torch.autograd.grad(output, tensors, grad_output))
    (expected, *_), (actual, *_) = found
    assert actual.layout == torch.sparse_coo
    # A mean's is divided here, and there multiplied by the inverse, which is rounded too.
    torch.testing.assert_close(
        actual.to_dense(), expected, rtol=2 * torch.finfo(expected.dtype).eps, atol=0
    )
    if target.device == "cpu":
        local = [row - FIRST_ROW for row in ids_of("cpu").view(-1).tolist() if row != padding_idx]
        assert actual._indices()[0].tolist() == [row for row in local if 0 <= row < ROWS]


@pytest.mark.parametrize("kind", ["lookup", "sum", "mean"])
def test_gradients_are_added_in_place(target, kind):
    """To a `.grad` that is there, whose other rows keep what they hold."""
    case = Case("call", kind, target.device, padding_idx=4)
    weight, *rest = case.tensors(torch.float32)
    grads = []
    for marked in (False, True):
        parameter = torch.nn.Parameter(weight.detach().clone())
        parameter.grad = torch.ones_like(parameter)
        before = parameter.grad
        if marked:
            gpu_embed.accumulate_in_place(parameter)
        output = case.shard(parameter, *rest)
        output.backward(integer_gradient(tuple(output.shape), output.dtype, target.device))
        assert (parameter.grad is before) or not marked
        grads.append(parameter.grad)
    assert torch.equal(*grads)


# torch.library.opcheck: schema, registration, fake tensors, and tracing with dynamic shapes.


@each_kind
def test_opcheck(target, kind):
    """Drop-in: torch.library's own checks."""
    case = Case("operator", kind, target.device, padding_idx=5)
    torch.library.opcheck(case.op, (*case.tensors(torch.float32), *case.arguments(ROWS), SHARD))


def test_opcheck_of_what_has_no_gradient(target):
    weight = torch.ones(ROWS, DIM, device=target.device)
    ids, cut = ids_of(target.device), bag_arguments(target.device)
    torch.library.opcheck(ops.embedding_renorm_, (weight, ids, 0.5, 2.0, SHARD))
    torch.library.opcheck(bags.embedding_counts, (ids, ROWS, SHARD))
    torch.library.opcheck(bags.embedding_bag_shard_max, (weight, *cut, 5, SHARD))


# Compilers: a rank's first row is a number that the graph reads from a tensor.


def check_compiled(function, tensors, backend):
    """One graph serves every first row, and its backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def results(function, first_row):
        outputs = function(torch.tensor(first_row, device=tensors[0].device), *tensors)
        if not outputs[0].requires_grad:
            return outputs
        grad_output = integer_gradient(tuple(outputs[0].shape), torch.float32, outputs[0].device)
        return *outputs, *torch.autograd.grad(outputs[0], tensors, grad_output)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        graph = torch.compile(function, fullgraph=True, backend=counter)
        for first_row in (FIRST_ROW, 0, V - ROWS):
            actual, expected = (results(f, first_row) for f in (graph, function))
            assert all(map(torch.equal, actual, expected))
    assert counter.frame_count == 1
    torch._dynamo.reset()


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.full,
            pytest.mark.skipif(
                shutil.which("g++") is None, reason="inductor compiles C++ with g++"
            ),
        ],
    ),
]
each_compiler = pytest.mark.parametrize("backend", BACKENDS)


@each_compiler
@each_kind
def test_compiled_for_every_first_row(target, kind, backend):
    """Drop-in: nothing branches on it, in forward or backward."""
    case = Case("call", kind, target.device, padding_idx=5)

    def function(first_row, *tensors):
        return (case.shard(*tensors, shard=[first_row.item(), V]),)

    check_compiled(function, case.tensors(torch.float32), backend)


@each_compiler
def test_compiled_maxima_renorm_and_counts(target, backend):
    cut = bag_arguments(target.device)

    def function(first_row, weight):
        shard = [first_row.item(), V]
        weight = weight.clone()
        ops.embedding_renorm_(weight, cut[0], 2.0, 2.0, shard)
        found = bags.embedding_bag_shard_max(weight, *cut, 5, shard)
        return weight, *found, bags.embedding_counts(cut[0], ROWS, shard)

    weight = torch.arange(6.0, device=target.device).view(ROWS, DIM)
    check_compiled(function, [weight], backend)
