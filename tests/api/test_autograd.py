"""Gradients of every order and kind: autograd, forward mode, torch.func, sparse, hooks, opcheck."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT_DTYPES, ID_DTYPES, integer_gradient, table
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import gpu_embed
from gpu_embed.functional import embedding
from gpu_embed.ops import lookup as ops

# torch's own: about its compiler, its optimizers and its hooks on layers whose input is integer.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`torch.jit.script` is deprecated",
        "Attempted to insert a get_attr Node",
        "Sparse invariant checks are implicitly disabled",
        "Full backward hook is firing",
    )
]

ARGUMENTS = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "scaled": {"scale_grad_by_freq": True},
    "padding, scaled": {"padding_idx": 1, "scale_grad_by_freq": True},
}
every_argument = pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)


def integers(num_embeddings, embedding_dim, device, dtype=torch.float64):
    """A table of small integers, so that sums and products of a few rows are exact."""
    return table(num_embeddings, embedding_dim, dtype, device).round()


def tensor(values, target):
    return torch.tensor(values, device=target.device)


def quick(target):
    """One random projection instead of every entry of the Jacobian where kernels run at 10 ms each."""
    return {"fast_mode": str(target) == "triton-cpu"}


# Autograd: double backward and forward mode.


@pytest.mark.full
@every_argument
def test_gradgradcheck(target, arguments):
    """As torch: the gradient's own gradient obeys padding_idx and scale_grad_by_freq too."""
    weight = table(3, 2, torch.float64, target.device).requires_grad_()
    indices = tensor([[1, 2], [2, 0]], target)
    assert gradgradcheck(
        lambda weight: embedding(indices, weight, **arguments),
        (weight,),
        check_fwd_over_rev=True,
        check_batched_grad=True,
        **quick(target),
    )


LINEAR_OPS = {
    "embedding": lambda x, i, *_: ops.embedding(x, i, -1, False, False),
    "backward": lambda x, i, padding_idx, scale: ops.embedding_dense_backward(
        x[i], i, 3, padding_idx, scale
    ),
    "double backward": ops.embedding_dense_double_backward,
}


@pytest.mark.parametrize("padding_idx", [-1, 1])
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("op", LINEAR_OPS.values(), ids=LINEAR_OPS)
def test_each_op_has_gradients_of_its_own(target, op, padding_idx, scale_grad_by_freq):
    """Reverse and forward mode through each of the three, alone: they close under differentiation."""
    x = table(3, 2, torch.float64, target.device).requires_grad_()
    indices = tensor([1, 2, 2, 0], target)
    assert gradcheck(
        lambda x: op(x, indices, padding_idx, scale_grad_by_freq),
        (x,),
        check_forward_ad=True,
        check_batched_grad=True,
        fast_mode=True,
    )


@every_argument
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
def test_double_backward_is_the_adjoint_of_backward(target, dtype, arguments):
    """As torch: rows over counts, zero at padding; torch's formula forgets scale_grad_by_freq."""
    weight = integers(5, 3, target.device, dtype).requires_grad_()
    indices = tensor([[1, 4, 4], [4, 1, 0]], target)
    grad_output = integer_gradient((2, 3, 3), dtype, target.device).requires_grad_()
    (grad_weight,) = torch.autograd.grad(
        embedding(indices, weight, **arguments), weight, grad_output, create_graph=True
    )
    vector = integers(5, 3, target.device, dtype).flip(0)
    (actual,) = torch.autograd.grad(grad_weight, grad_output, vector)
    expected = vector[indices]
    if "scale_grad_by_freq" in arguments:
        expected = expected / indices.flatten().bincount()[indices][..., None]
    if "padding_idx" in arguments:
        expected[indices == arguments["padding_idx"]] = 0
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
@every_argument
def test_forward_mode(target, arguments, grad_mode):
    """The tangent is looked up as the table is, padding row included, as in torch."""
    weight, tangent = integers(5, 3, target.device), integers(5, 3, target.device).flip(0)
    indices = tensor([[1, 4, 4], [4, 1, 0]], target)
    with forward_ad.dual_level(), grad_mode():
        dual = forward_ad.make_dual(weight.requires_grad_(), tangent)
        actual = forward_ad.unpack_dual(embedding(indices, dual, **arguments))
        expected = forward_ad.unpack_dual(F.embedding(indices, dual, **arguments))
    assert torch.equal(actual.primal, weight[indices])
    assert torch.equal(actual.tangent, tangent[indices])
    assert torch.equal(actual.tangent, expected.tangent)


def test_forward_mode_without_a_tangent(target):
    """Inside a dual level a table that is not dual has no tangent."""
    weight = integers(4, 2, target.device)
    with forward_ad.dual_level():
        output = embedding(tensor([3, 1], target), weight)
        assert forward_ad.unpack_dual(output).tangent is None
    assert torch.equal(output, weight[[3, 1]])


def test_complex_gradients(target):
    """Beyond torch, which refuses to differentiate complex lookups: of first and second order."""
    weight = table(3, 2, torch.complex128, target.device).requires_grad_()
    indices = tensor([1, 2, 2, 0], target)

    def look_up(weight):
        return embedding(indices, weight, padding_idx=-1)

    assert gradgradcheck(look_up, (weight,), fast_mode=True)
    assert gradcheck(
        lambda weight: embedding(indices, weight), (weight,), check_forward_ad=True, fast_mode=True
    )


# torch.func.

LOSS_WEIGHTS = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [2.0, 1.0], [4.0, -2.0]]).double()


def square_loss(output):
    return (output * output * LOSS_WEIGHTS.to(output.device)).sum()


FIRST_ORDER = {
    "grad": lambda f, w: func.grad(lambda w: square_loss(f(w)))(w),
    "vjp": lambda f, w: func.vjp(f, w)[1](LOSS_WEIGHTS.to(w.device)),
    "jacrev": lambda f, w: func.jacrev(f)(w),
    "functionalize": lambda f, w: func.functionalize(func.grad(lambda w: f(w).sum()))(w),
}
FORWARD_AND_HIGHER_ORDER = {
    "jvp": lambda f, w: func.jvp(f, (w,), (w.flip(0),)),
    "jacfwd": lambda f, w: func.jacfwd(f)(w),
    "linearize": lambda f, w: func.linearize(f, w)[1](w.flip(0)),
    "hessian": lambda f, w: func.hessian(lambda w: square_loss(f(w)))(w),
    "reverse over reverse": lambda f, w: func.jacrev(func.jacrev(lambda w: square_loss(f(w))))(w),
    "reverse over forward": lambda f, w: func.jacrev(func.jacfwd(lambda w: square_loss(f(w))))(w),
    "third derivative": lambda f, w: func.grad(
        lambda w: func.grad(lambda w: func.grad(lambda w: (f(w) ** 3).sum())(w).sum())(w).sum()
    )(w),
}


@pytest.mark.parametrize(
    ("transform", "arguments"),
    [
        *[
            pytest.param(transform, arguments, id=f"{name} {kind}")
            for name, transform in FIRST_ORDER.items()
            for kind, arguments in ARGUMENTS.items()
        ],
        # With scale_grad_by_freq, torch's second derivatives are wrong.
        *[
            pytest.param(transform, ARGUMENTS[kind], id=f"{name} {kind}")
            for name, transform in FORWARD_AND_HIGHER_ORDER.items()
            for kind in ("plain", "padding")
        ],
    ],
)
def test_torch_func(target, transform, arguments):
    """Drop-in: every functorch transform gives what it gives with torch's function."""
    weight = integers(3, 2, target.device)
    indices = tensor([1, 2, 2, 0], target)  # counts are powers of two, so 1 / count is exact
    actual = transform(lambda w: embedding(indices, w, **arguments), weight)
    expected = transform(lambda w: F.embedding(indices, w, **arguments), weight)
    actual, expected = (torch.utils._pytree.tree_leaves(result) for result in (actual, expected))
    assert len(actual) == len(expected)
    assert all(map(torch.equal, actual, expected))


def test_hessian_obeys_scale_grad_by_freq(target):
    """As torch: by hand, since torch's second derivative ignores the argument."""
    weight = integers(3, 1, target.device)
    indices = tensor([1, 2, 2, 0], target)
    hessian = func.jacrev(
        func.grad(lambda w: (embedding(indices, w, scale_grad_by_freq=True) ** 2).sum())
    )(weight)
    # d/dw of (sum over a row's positions of 2 w) / count, whose derivative is scaled once more.
    assert torch.equal(hessian.flatten(), torch.tensor([2.0, 0, 0, 0, 2, 0, 0, 0, 1]).to(hessian))


@every_argument
def test_per_sample_gradients_equal_a_loop(target, arguments):
    """Drop-in: vmap(grad) over the ids; each example counts its own."""
    weight = integers(4, 3, target.device)
    indices = tensor([[3, 1, 1, 3], [0, 0, 0, 0], [2, 1, 0, 3]], target)

    def loss(weight, indices):
        return (embedding(indices, weight, **arguments) ** 2).sum()

    actual = func.vmap(func.grad(loss), (None, 0))(weight, indices)
    expected = []
    for example in indices:
        leaf = weight.clone().requires_grad_()
        (F.embedding(example, leaf, **arguments) ** 2).sum().backward()
        expected.append(leaf.grad)
    assert torch.equal(actual, torch.stack(expected))
    chunked = func.vmap(func.grad(loss), (None, 0), chunk_size=1)(weight, indices)
    assert torch.equal(chunked, actual)


def moved(tensor, dim):
    """[B, ...] with its first dimension moved to `dim`; the first example where it is not vmapped."""
    return tensor[0] if dim is None else tensor.movedim(0, dim).contiguous()


IN_DIMS = [(None, 0), (None, 1), (0, None), (2, None), (0, 0), (1, 1)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@every_argument
def test_vmap_equals_a_loop(target, arguments, in_dims):
    """Drop-in: over ids, tables and both; outputs, and gradients taken outside of the vmap."""
    batched = torch.stack([integers(4, 2, target.device) + i for i in range(3)])
    weight = moved(batched, in_dims[0]).requires_grad_()
    # Counts are powers of two in each example, and not all over.
    indices = moved(tensor([[3, 1, 1, 0], [0, 0, 0, 0], [2, 2, 3, 3]], target), in_dims[1])
    output = func.vmap(lambda w, i: embedding(i, w, **arguments), in_dims)(weight, indices)
    grad_output = integer_gradient(tuple(output.shape), torch.float64, target.device)
    (grad_weight,) = torch.autograd.grad(output, weight, grad_output)

    leaf = weight.detach().requires_grad_()
    expected = torch.stack(
        [
            F.embedding(
                indices if in_dims[1] is None else indices.select(in_dims[1], i),
                leaf if in_dims[0] is None else leaf.select(in_dims[0], i),
                **arguments,
            )
            for i in range(3)
        ]
    )
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad_output)
    assert torch.equal(output, expected)
    assert torch.equal(grad_weight, expected_grad)


@pytest.mark.parametrize("inner", [(None, 0), (0, None), (0, 0)], ids=str)
@pytest.mark.parametrize("outer", [(None, 0), (0, None), (0, 0)], ids=str)
def test_nested_vmap_equals_nested_loops(target, outer, inner):
    """Drop-in: two levels, over ids, tables and both."""
    weight = torch.stack([integers(4, 2, target.device) + i for i in range(6)]).view(2, 3, 4, 2)
    indices = torch.arange(24, device=target.device).view(2, 3, 4) * 5 % 4
    for dim, (weight_dim, indices_dim) in enumerate((outer, inner)):
        # A level that does not batch an argument sees one example of it.
        weight = weight if weight_dim == 0 else weight.narrow(dim, 0, 1)
        indices = indices if indices_dim == 0 else indices.narrow(dim, 0, 1)
    expected = torch.stack(
        [
            torch.stack(
                [
                    weight.expand(2, 3, -1, -1)[i, j][indices.expand(2, 3, -1)[i, j]]
                    for j in range(3)
                ]
            )
            for i in range(2)
        ]
    )
    weight, indices = (
        argument.reshape(*[n for n in argument.shape[:2] if n > 1], *argument.shape[2:])
        for argument in (weight, indices)
    )

    def look_up(weight, indices):
        return embedding(indices, weight)

    actual = func.vmap(func.vmap(look_up, inner), outer)(weight, indices)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("in_dims", [(None, 0), (0, None), (0, 0)], ids=str)
def test_vmap_over_max_norm_equals_single_calls(target, in_dims):
    """Drop-in: tables are renormalised in place, example by example."""
    batched = torch.stack([integers(4, 2, target.device) + i for i in range(3)])
    weight = moved(batched, in_dims[0]).clone()
    indices = moved(tensor([[3, 1], [0, 0], [2, 3]], target), in_dims[1])
    expected = weight.clone()
    for i in range(3):
        embedding(
            indices if in_dims[1] is None else indices[i],
            expected if in_dims[0] is None else expected[i],
            max_norm=1.5,
        )
    output = func.vmap(lambda w, i: embedding(i, w, max_norm=1.5), in_dims)(weight, indices)
    assert torch.equal(weight, expected)
    assert torch.equal(output, func.vmap(lambda w, i: w[i], in_dims)(expected, indices))


@pytest.mark.parametrize("bad", [4, -1, 7])
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_reports_ids_out_of_range(target, in_dims, bad):
    """Bounds: the id as the caller wrote it, and the rows of one table, not of all stacked."""
    weight = moved(torch.zeros(2, 4, 3, device=target.device), in_dims[0])
    indices = moved(tensor([[0, bad], [bad, 2]], target), in_dims[1])
    look_up = func.vmap(lambda w, i: embedding(i, w), in_dims)
    with (
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match=f"id {bad} at .* has 4 rows"),
    ):
        look_up(weight, indices)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_masks_ids_out_of_range(target, in_dims):
    """Bounds: an id past one table's end does not reach into the next one."""
    weight = moved(torch.ones(2, 4, 3, device=target.device), in_dims[0]).requires_grad_()
    indices = moved(tensor([[4, -1], [3, 5]], target), in_dims[1])
    with gpu_embed.set_bounds_check("off"):
        output = func.vmap(lambda w, i: embedding(i, w), in_dims)(weight, indices)
        (grad_weight,) = torch.autograd.grad(output.sum(), weight)
    reads = 0 if in_dims[1] is None else 3
    assert output.sum().item() == reads
    assert grad_weight.sum().item() == reads


# Sparse gradients.

SPARSE_IDS = {
    "duplicates": [5, 1, 5, 0, 1],
    "2-D": [[3, 2], [2, 3]],
    "0-d": 4,
    "empty": [],
    "padding alone": [2, 2],
}


def assert_same_sparse(actual, expected):
    """Same entries in the same order, not only the same sum."""
    assert actual.layout == expected.layout == torch.sparse_coo
    assert actual.is_coalesced() == expected.is_coalesced()
    assert actual.shape == expected.shape
    assert actual._indices().dtype == torch.int64
    assert torch.equal(actual._indices(), expected._indices())
    assert actual._values().dtype == expected._values().dtype
    assert torch.equal(actual._values(), expected._values())


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("values", SPARSE_IDS.values(), ids=SPARSE_IDS)
def test_sparse_gradients_are_torchs(target, values, padding_idx):
    """As torch: int64 ids in input order, duplicates kept, padding dropped, uncoalesced.

    No host sync: not on CUDA, where torch waits for the GPU to drop it, and where it is zeros here.
    """
    ours = integers(6, 2, target.device).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    indices = tensor(values, target).to(torch.int64)
    grad_output = integer_gradient((*indices.shape, 2), torch.float64, target.device)
    embedding(indices, ours, padding_idx, sparse=True).backward(grad_output)
    # Flat, since torch itself fails on 0-d ids with padding.
    flat = F.embedding(indices.reshape(-1), theirs, padding_idx, sparse=True)
    flat.backward(grad_output.reshape(-1, 2))
    if target.device == "cuda" and padding_idx is not None:
        assert ours.grad._nnz() == indices.numel()
        assert torch.equal(ours.grad.to_dense(), theirs.grad.to_dense())
        if theirs.grad._nnz():
            ours.grad, theirs.grad = ours.grad.coalesce(), theirs.grad.coalesce()
            assert_same_sparse(ours.grad, theirs.grad)
    else:
        assert_same_sparse(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([True, True, True], [3, 9, 1]),
        ([True, False, True], [3, 3, 1]),
        ([False, False, True], [1, 1, 1]),
        ([False, False, False], [0, 0, 0]),
    ],
)
def test_entries_without_a_gradient_become_zeros_of_a_row_that_has_one(kept, expected):
    ids, values = torch.tensor([3, 9, 1]), torch.full((3, 2), math.nan)
    kept = torch.tensor(kept)
    values[kept] = 5
    ids, values = ops._zeroed(ids, values, kept)
    assert ids.tolist() == expected
    assert torch.equal(values, 5.0 * kept[:, None].expand(3, 2))


@pytest.mark.parametrize("ids_dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", GRADIENT_DTYPES, ids=str)
def test_sparse_gradients_of_every_dtype(target, dtype, ids_dtype):
    """As torch: the ids of the gradient are int64, whatever those of the input are."""
    ours = integers(6, 2, target.device, dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    indices = tensor([5, 1, 5], target)
    grad_output = integer_gradient((3, 2), dtype, target.device)
    embedding(indices.to(ids_dtype), ours, sparse=True).backward(grad_output)
    F.embedding(indices, theirs, sparse=True).backward(grad_output)
    assert_same_sparse(ours.grad, theirs.grad)


def test_sparse_gradients_have_gradients(target):
    """Double backward through the entries, padding dropped, as in torch."""
    indices = tensor([2, 1, 2, 0], target)
    vector = integers(3, 2, target.device)
    found = []
    for look_up in (embedding, F.embedding):
        weight = integers(3, 2, target.device).requires_grad_()
        grad_output = integer_gradient((4, 2), torch.float64, target.device).requires_grad_()
        output = look_up(indices, weight, padding_idx=1, sparse=True)
        (sparse,) = torch.autograd.grad(output, weight, grad_output, create_graph=True)
        (grad,) = torch.autograd.grad((sparse.to_dense() * vector).sum(), grad_output)
        found.append(grad)
    assert torch.equal(found[0], vector[indices] * (indices != 1)[:, None])
    assert torch.equal(*found)


def test_sparse_with_scale_grad_by_freq_fails_at_backward(target):
    """As torch: torch's error, and not before backward."""
    weight = integers(3, 2, target.device).requires_grad_()
    indices = tensor([0, 0], target)
    messages = []
    for look_up in (embedding, F.embedding):
        output = look_up(indices, weight, scale_grad_by_freq=True, sparse=True)
        with pytest.raises(RuntimeError, match="not supported with sparse gradients") as raised:
            output.sum().backward()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.5),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_take_sparse_gradients(target, optimizer):
    """As torch: three steps end where torch's layer ends, bit for bit."""
    indices = tensor([[5, 1], [5, 0]], target)
    tables = []
    for layer in (gpu_embed.Embedding, torch.nn.Embedding):
        module = layer.from_pretrained(
            integers(6, 2, target.device), freeze=False, padding_idx=0, sparse=True
        )
        step = optimizer(module.parameters())
        for _ in range(3):
            step.zero_grad()
            (module(indices) ** 2).sum().backward()
            step.step()
        tables.append(module.weight)
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], integers(6, 2, target.device))


# What autograd saves and notices.

SPARSITY = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@SPARSITY
def test_ids_changed_in_place_are_noticed(target, sparse):
    """A gradient for other ids than those looked up would be silently wrong."""
    weight = integers(3, 2, target.device).requires_grad_()
    indices = tensor([0, 2], target)
    output = embedding(indices, weight, sparse=sparse)
    indices.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_ids_changed_before_the_double_backward_are_noticed(target):
    weight = integers(3, 2, target.device).requires_grad_()
    indices = tensor([0, 2], target)
    output = embedding(indices, weight)
    grad_output = torch.ones_like(output).requires_grad_()
    (grad_weight,) = torch.autograd.grad(output, weight, grad_output, create_graph=True)
    indices.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad_weight.sum().backward()


def test_the_table_may_change_in_place(target):
    """Only the ids are saved, so an optimizer may step between forward and backward, as with torch."""
    weight = integers(3, 2, target.device).requires_grad_()
    indices = tensor([0, 2, 2], target)
    output = embedding(indices, weight)
    before = output.detach().clone()
    with torch.no_grad():
        weight.zero_()
    output.backward(torch.ones_like(output))
    assert torch.equal(output, before)
    assert weight.grad[:, 0].tolist() == [1, 0, 2]


@SPARSITY
def test_only_the_ids_are_saved(target, sparse):
    """Neither the table nor the output is kept alive by the graph."""
    weight = integers(3, 2, target.device).requires_grad_()
    indices = tensor([0, 2], target)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = embedding(indices, weight, sparse=sparse)
    assert [tensor.data_ptr() for tensor in saved] == [indices.data_ptr()]
    output.sum().backward()
    assert weight.grad.sum() == 4


def test_the_graph_is_freed_with_its_output(target):
    """No cycle keeps the ids alive until the garbage collector runs."""
    weight = integers(3, 2, target.device).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        indices = tensor([0, 2], target)
        alive = weakref.ref(indices)
        output = embedding(indices, weight, max_norm=1.0)
        output.sum().backward()
        del indices, output
        assert alive() is None
    finally:
        gc.enable()


@SPARSITY
def test_retain_graph_gives_the_same_gradient_twice(target, sparse):
    weight = integers(3, 2, target.device).requires_grad_()
    output = embedding(tensor([0, 2, 2], target), weight, sparse=sparse)
    output.sum().backward(retain_graph=True)
    once = weight.grad.to_dense().clone()
    output.sum().backward()
    assert torch.equal(weight.grad.to_dense(), 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


@pytest.mark.parametrize(
    "sparse", [(False, False), (True, True), (True, False), (False, True)], ids=str
)
def test_two_calls_of_one_table_accumulate(target, sparse):
    """One backward over two lookups, dense and sparse, gives torch's sum and layout."""
    grads = []
    for look_up in (embedding, F.embedding):
        weight = integers(4, 2, target.device).requires_grad_()
        first = look_up(tensor([0, 2, 2], target), weight, sparse=sparse[0])
        second = look_up(tensor([[2], [1]], target), weight, sparse=sparse[1])
        (first.sum() + 3 * second.sum()).backward()
        grads.append(weight.grad)
    assert grads[0].layout == grads[1].layout
    assert torch.equal(grads[0].to_dense(), grads[1].to_dense())
    assert grads[0].to_dense()[:, 0].tolist() == [1, 3, 5, 0]


def test_gradients_accumulate_over_backwards(target):
    weight = integers(4, 2, target.device).requires_grad_()
    for values in ([0, 2, 2], [2], [1, 0]):
        embedding(tensor(values, target), weight).sum().backward()
    assert weight.grad[:, 0].tolist() == [2, 1, 3, 0]


def test_frozen_tables_have_no_graph(target):
    """Drop-in: `requires_grad` decides, as with torch's layer."""
    weight = integers(4, 2, target.device)
    indices = tensor([0, 2], target)
    assert embedding(indices, weight).grad_fn is None
    weight.requires_grad_()
    assert embedding(indices, weight).grad_fn is not None
    with torch.no_grad():
        assert not embedding(indices, weight).requires_grad
    assert embedding(indices, weight.detach()).grad_fn is None


def test_integer_tables_have_no_graph(target):
    output = embedding(tensor([0, 2], target), torch.arange(8, device=target.device).view(4, 2))
    assert not output.requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=str)
def test_empty_tables_have_empty_gradients(target, shape):
    weight = torch.zeros(shape, device=target.device, requires_grad=True)
    indices = torch.empty(0, 2, dtype=torch.int64, device=target.device)
    embedding(indices, weight).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
@every_argument
def test_no_ids_give_a_gradient_of_zeros(target, shape, arguments):
    weight = integers(4, 2, target.device).requires_grad_()
    indices = torch.empty(shape, dtype=torch.int64, device=target.device)
    embedding(indices, weight, **arguments).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_lazily_negated_gradients_are_resolved(target):
    """Kernels read raw memory, which lacks the sign that such a view carries as a flag."""
    weight = integers(3, 2, target.device).requires_grad_()
    grad_output = torch.ones(4, 2, dtype=torch.complex128, device=target.device).mul(1j).conj().imag
    assert grad_output.is_neg()
    embedding(tensor([1, 2, 2, 0], target), weight).backward(grad_output)
    assert weight.grad[:, 0].tolist() == [-1, -1, -2]


# Hooks, modes and checkpoints.


def test_hooks_see_and_replace_gradients(target):
    """Drop-in: on the output, the table and the layer, in autograd's order."""
    layer = gpu_embed.Embedding.from_pretrained(integers(4, 2, target.device), freeze=False)
    seen = []
    layer.weight.register_hook(lambda grad: seen.append("table") or 2 * grad)
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append("accumulated"))
    layer.register_forward_hook(lambda module, args, output: seen.append("forward"))
    layer.register_full_backward_pre_hook(lambda module, grad: seen.append("layer before"))
    layer.register_full_backward_hook(lambda module, grads, outputs: seen.append("layer after"))
    output = layer(tensor([3, 1, 3], target))
    output.register_hook(lambda grad: seen.append("output") or 5 * grad)
    output.backward(torch.ones_like(output))
    assert seen[:2] == ["forward", "output"]
    assert sorted(seen[2:]) == ["accumulated", "layer after", "layer before", "table"]
    assert seen.index("table") < seen.index("accumulated")
    assert layer.weight.grad[:, 0].tolist() == [0, 10, 0, 20]


@pytest.mark.parametrize("max_norm", [None, 1.5], ids=["plain", "max_norm"])
def test_inference_mode(target, max_norm):
    """As torch: as with torch, also for tables that were made there."""
    indices = tensor([3, 1], target)
    found = []
    for look_up in (embedding, F.embedding):
        weight = integers(4, 2, target.device, torch.float32).requires_grad_()
        with torch.inference_mode():
            output = look_up(indices, weight, max_norm=max_norm)
            made_inside = integers(4, 2, target.device, torch.float32)
            inside = look_up(indices, made_inside, max_norm=max_norm)
            assert torch.equal(inside, made_inside[indices])
        outside = look_up(indices, made_inside, max_norm=max_norm)
        assert torch.equal(output, weight[indices])
        assert torch.equal(outside, made_inside[indices])
        flags = [(t.is_inference(), t.requires_grad) for t in (output, inside, outside)]
        found.append((flags, (weight._version > 0) == (max_norm is not None)))
    assert found[0] == found[1]
    assert found[0][1]


def test_autocast_leaves_the_dtype_alone(target):
    """Exact copy: lookups are copies under autocast too, and gradients keep the table's dtype."""
    weight = integers(4, 2, target.device, torch.float32).requires_grad_()
    indices = tensor([3, 1], target)
    with torch.autocast(target.device, torch.bfloat16):
        output = embedding(indices, weight)
        product = output @ output.t()
    assert product.dtype == torch.bfloat16
    assert output.dtype == torch.float32
    assert torch.equal(output, weight[indices])
    product.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(target, use_reentrant):
    """The recomputed lookup gives the same gradient."""
    weight = integers(4, 2, target.device).requires_grad_()
    indices = tensor([3, 1, 3], target)

    def block(weight):
        return embedding(indices, weight, padding_idx=1) ** 2

    checkpoint(block, weight, use_reentrant=use_reentrant).sum().backward()
    expected = torch.zeros_like(weight)
    expected[3] = 4 * weight[3]
    assert torch.equal(weight.grad, expected)


# torch.library.opcheck: schema, registration, fake tensors, and tracing with dynamic shapes.

OPCHECK_IDS = {"2-D": [[2, 0], [2, 1]], "0-d": 3, "empty": [], "narrow": torch.uint8}


@pytest.fixture(params=OPCHECK_IDS.values(), ids=OPCHECK_IDS)
def opcheck_ids(request, target):
    if request.param == torch.uint8:
        return tensor([3, 1], target).to(torch.uint8)
    return tensor(request.param, target).to(torch.int64)


@pytest.mark.parametrize(
    "arguments",
    [(-1, False, False), (2, True, False), (2, False, True)],
    ids=["plain", "padding, scaled", "sparse"],
)
def test_opcheck_embedding(target, opcheck_ids, arguments):
    """Drop-in: torch.library's own checks of the lookup."""
    weight = table(4, 3, torch.float32, target.device).requires_grad_()
    # aot_autograd has no tracing of sparse gradients, torch's own included.
    traced = [] if arguments[2] else ["test_aot_dispatch_dynamic"]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", *traced]
    torch.library.opcheck(ops.embedding, (weight, opcheck_ids, *arguments), test_utils=utils)


@pytest.mark.parametrize("arguments", [(-1, False), (2, True)], ids=["plain", "padding, scaled"])
def test_opcheck_backward(target, opcheck_ids, arguments):
    """Drop-in: torch.library's own checks of the gradient."""
    grad_output = torch.ones(*opcheck_ids.shape, 3, device=target.device, requires_grad=True)
    torch.library.opcheck(ops.embedding_dense_backward, (grad_output, opcheck_ids, 4, *arguments))


@pytest.mark.parametrize("arguments", [(-1, False), (2, True)], ids=["plain", "padding, scaled"])
def test_opcheck_double_backward(target, opcheck_ids, arguments):
    """Drop-in: torch.library's own checks of the gradient's gradient."""
    grad = table(4, 3, torch.float32, target.device).requires_grad_()
    torch.library.opcheck(ops.embedding_dense_double_backward, (grad, opcheck_ids, *arguments))


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_opcheck_renorm(target, opcheck_ids, norm_type):
    """Drop-in: torch.library's own checks of the renormalisation in place."""
    weight = table(4, 3, torch.float32, target.device)
    torch.library.opcheck(ops.embedding_renorm_, (weight, opcheck_ids, 0.5, norm_type))
