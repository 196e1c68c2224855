"""`accumulate_in_place`: gradients are added to the `.grad` that is there, where nobody can tell."""

import copy
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import table_cases
import torch
from cases import GRADIENT_DTYPES, ID_DTYPES, same_bits
from torch import func
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gpu_embed
from gpu_embed import accumulate_in_place
from gpu_embed.backends._torch import lookup as torch_lookup
from gpu_embed.ops import in_place

# torch's own: about its compiler, and about gradients that this test makes on purpose.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`torch.jit.script` is deprecated",
        "grad and param do not obey the gradient layout contract",
        "Using backward\\(\\) with create_graph=True",
    )
]

HAS_GRAD_DTYPE = hasattr(torch.nn.Parameter, "grad_dtype")


@pytest.fixture
def added(monkeypatch):
    """The gradients that were added to in place, one after the other."""
    tensors = []
    increment = torch.autograd.graph.increment_version

    def record(tensor):
        # torch itself hands over tuples.
        if isinstance(tensor, torch.Tensor):
            tensors.append(tensor)
        increment(tensor)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", record)
    return tensors


def integers(*shape, seed=0, low=-2, high=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


# Values, against a gradient in fp64 that is added once.

# Counts and bag sizes that are powers of two, so that every mean is exact.
IDS = torch.tensor([[1, 1, 4, 7], [6, 4, 7, 7], [2, 2, 2, 2]])


def lookup(**arguments):
    return (lambda **kind: gpu_embed.Embedding(9, 6, **arguments, **kind)), lambda layer: layer(
        IDS.to(layer.weight.device)
    )


def bags(weighted=False, **arguments):
    def call(layer):
        ids = IDS.to(layer.weight.device)
        weights = integers(*IDS.shape, low=1).to(layer.weight) if weighted else None
        return layer(ids, per_sample_weights=weights)

    return (lambda **kind: gpu_embed.EmbeddingBag(9, 6, **arguments, **kind)), call


def offset_bags(**arguments):
    offsets = torch.tensor([0, 4, 4, 6, 10])

    def call(layer):
        return layer(IDS.reshape(-1).to(layer.weight.device), offsets.to(layer.weight.device))

    return (lambda **kind: gpu_embed.EmbeddingBag(9, 6, **arguments, **kind)), call


def tables(sizes, **arguments):
    def make(**kind):
        return gpu_embed.TableBatchedEmbeddingBag(table_cases.TABLES[sizes], **arguments, **kind)

    return make, lambda layer: layer(*table_cases.random_input(layer, 4))


LAYERS = {
    "lookup": lookup(),
    "padding": lookup(padding_idx=7),
    "scaled": lookup(scale_grad_by_freq=True),
    "sum": bags(mode="sum"),
    "mean": bags(mode="mean"),
    "max": bags(mode="max"),
    "weighted": bags(mode="sum", weighted=True),
    "offsets": offset_bags(mode="sum", include_last_offset=True, padding_idx=7),
    "scaled bags": bags(mode="sum", scale_grad_by_freq=True),
    "tables": tables("uniform"),
    "mixed tables": tables("mixed", mode=["mean", "sum", "max"]),
}
layers = pytest.mark.parametrize("layer", LAYERS)


def gradient_dtypes():
    """Dtypes of a table and of its gradient."""
    pairs = [(dtype, dtype) for dtype in GRADIENT_DTYPES]
    if HAS_GRAD_DTYPE:
        pairs += [(dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)]
    others = (torch.float64, torch.float16)
    params = [
        pytest.param(
            pair, id=f"{pair[0]}-{pair[1]}", marks=[pytest.mark.full] * (pair[0] in others)
        )
        for pair in pairs
    ]
    return pytest.mark.parametrize("dtypes", params)


def backward_in(make, call, dtype, device, grad=None):
    """A layer of integers after a backward of integers from a `.grad` that exists."""
    layer = make(dtype=dtype, device=device)
    weight = layer.weight
    with torch.no_grad():
        weight.copy_(integers(*weight.shape, seed=1))
    if grad is not None:
        if grad.dtype != dtype:
            weight.grad_dtype = grad.dtype
        weight.grad = grad
        accumulate_in_place(layer)
    output = call(layer)
    output.backward(integers(*output.shape, seed=2).to(output))
    return layer


@layers
@gradient_dtypes()
def test_rows_are_added_and_rounded_once(target, layer, dtypes, added):
    """Accumulation: as the sum in fp64, rounded once; rows that no id names keep their bits."""
    make, call = LAYERS[layer]
    exact = backward_in(make, call, torch.float64, target.device).weight.grad
    # Above 256 bf16 has no odd numbers, and half of one shows whether the sum was rounded before.
    former = (integers(*exact.shape, seed=3) + 256).to(target.device, dtypes[1])
    former[exact == 0] = torch.nan
    into = former.clone()
    result = backward_in(make, call, dtypes[0], target.device, into).weight.grad
    assert result is into
    assert len(added) == 1
    expected = torch.where(exact == 0, former, (former.double() + exact).to(former.dtype))
    assert same_bits(result[exact != 0], expected[exact != 0])
    assert result[exact == 0].isnan().all()


STRIDES = {
    "transposed": lambda rows, columns: torch.zeros(columns, rows).T,
    "slice of columns": lambda rows, columns: torch.zeros(rows, columns + 3)[:, 2:-1],
    "every second row": lambda rows, columns: torch.zeros(2 * rows, columns)[::2],
    "every second column": lambda rows, columns: torch.zeros(rows, 2 * columns)[:, ::2],
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("layer", ["lookup", "mean", "max"])
def test_a_gradient_of_any_strides(target, layer, strides):
    make, call = LAYERS[layer]
    expected = backward_in(make, call, torch.float32, target.device).weight.grad
    into = STRIDES[strides](9, 6).to(target.device)
    if into.is_contiguous():
        into = STRIDES[strides](9, 6)
    result = backward_in(make, call, torch.float32, target.device, into).weight.grad
    assert result is into
    assert torch.equal(result, expected)


def test_ids_out_of_range_add_nothing(target, added):
    """Bounds: a bad id is recorded as ever, and the others' rows are added."""
    layer = gpu_embed.Embedding(9, 6, device=target.device)
    layer.weight.grad = torch.ones(9, 6, device=target.device)
    accumulate_in_place(layer)
    with gpu_embed.set_bounds_check("off"):
        layer(torch.tensor([1, -1, 9, 1], device=target.device)).sum().backward()
    assert len(added) == 1
    assert layer.weight.grad[:, 0].tolist() == [1, 3, *[1] * 7]


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_of_each_dtype(target, id_dtype, dtype, added):
    layer = gpu_embed.Embedding(9, 4, padding_idx=2, dtype=dtype, device=target.device)
    layer.weight.grad = torch.ones_like(layer.weight)
    accumulate_in_place(layer)
    layer(torch.tensor([[5, 2], [5, 8]], dtype=id_dtype, device=target.device)).sum().backward()
    assert len(added) == 1
    assert layer.weight.grad[:, 1].tolist() == [1, 1, 1, 1, 1, 3, 1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("add", ["_add_in_chunks", "_add_without_sync"])
def test_runs_that_are_longer_than_a_chunk(dtype, scale, add, monkeypatch):
    monkeypatch.setattr(torch_lookup, "CHUNK_BYTES", 3 * 4 * 4)
    ids = torch.tensor([5, 2, 2, 9, 2, 2, 5, 2, 2, 0, 2, 2, -1, 7, 0, 1, 8])
    kept = (ids >= 0) & (ids < 9)
    rows = integers(17, 4, seed=5).to(dtype)
    into = integers(9, 4, seed=6).to(dtype)
    expected = into.double().index_add(0, ids[kept], rows[kept].double())
    if scale:
        counts = torch.bincount(ids[kept], minlength=9).clamp(min=1)[:, None]
        expected = into.double() + (expected - into.double()) / counts
    read = partial(torch_lookup._rows_at, rows)
    result = getattr(torch_lookup, add)(into, ids, kept, read, scale)
    assert result is into
    assert torch.equal(result, expected.to(dtype))


def test_no_row_changes_without_ids_that_are_kept():
    into = torch.ones(3, 4, dtype=torch.bfloat16)
    ids = torch.tensor([7, -1])
    for add in (torch_lookup._add_in_chunks, torch_lookup._add_without_sync):
        add(into, ids, torch.tensor([False, False]), torch.ones(2, 4).__getitem__, True)
    assert torch.equal(into, torch.ones(3, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "limit"),
    [
        (torch.float32, torch.float32, 1 << 20),
        (torch.bfloat16, torch.bfloat16, 1 << 24),
        pytest.param(
            torch.bfloat16,
            torch.float32,
            1 << 24,
            marks=pytest.mark.skipif(not HAS_GRAD_DTYPE, reason="this torch has no grad_dtype"),
        ),
    ],
)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.full
def test_what_a_backward_allocates(dtype, grad_dtype, limit, padding_idx):
    """No gradient of the table's size, and none of the output's either."""
    with gpu_embed.use_backend("torch"):
        layer = gpu_embed.Embedding(40_000, 512, padding_idx=padding_idx, dtype=dtype)
        accumulate_in_place(layer)
        if grad_dtype != dtype:
            layer.weight.grad_dtype = grad_dtype
        layer.weight.grad = torch.zeros_like(layer.weight, dtype=grad_dtype)
        output = layer(torch.arange(4096) * 7)
        grad = torch.ones_like(output)
        with torch.profiler.profile(profile_memory=True) as profile:
            output.backward(grad)
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= limit


# Who could tell the difference: each case is the same with the mark, and in place where it says so.


def grad_of(*shape):
    return integers(*shape, seed=8).float()


def lookups(layer):
    output = layer(torch.tensor([1, 4, 1]))
    return output, grad_of(*output.shape)


def one(layer):
    output, grad = lookups(layer)
    output.backward(grad)


def first(layer):
    layer.weight.grad = None
    one(layer)
    layer.weight.grad[0, 0] += 1


def second(layer):
    layer.weight.grad = None
    one(layer)
    one(layer)


def zeroed(layer):
    layer.zero_grad(set_to_none=False)
    one(layer)


def replaced_after_the_forward(layer):
    output, grad = lookups(layer)
    layer.weight.grad = torch.full_like(layer.weight, 7)
    output.backward(grad)


def gone_after_the_forward(layer):
    output, grad = lookups(layer)
    layer.weight.grad = None
    output.backward(grad)


def sparse(layer):
    layer.weight.grad = layer.weight.grad.to_sparse()
    one(layer)
    layer.weight.grad = layer.weight.grad.to_dense()


def with_a_graph(layer):
    layer.weight.grad = layer.weight.grad * layer.weight.new_ones((), requires_grad=True)
    one(layer)
    layer.weight.grad = layer.weight.grad.detach()


def create_graph(layer):
    output, grad = lookups(layer)
    grad.requires_grad_()
    output.backward(grad, create_graph=True)
    layer.weight.grad.sum().backward()
    layer.weight.grad = layer.weight.grad.detach()
    return grad.grad


def captured(layer):
    output, grad = lookups(layer)
    return torch.autograd.grad(output, layer.weight, grad)


def captured_beside_another(layer):
    other = torch.ones(3, 1, requires_grad=True)
    output, grad = lookups(layer)
    return torch.autograd.grad(output * other, [other, layer.weight], grad)


def for_another(layer):
    other = torch.ones(3, 1, requires_grad=True)
    output, grad = lookups(layer)
    (output * other).backward(grad, inputs=[other])
    return other.grad


def for_the_weight(layer):
    output, grad = lookups(layer)
    output.backward(grad, inputs=[layer.weight])


def of_twice_the_weight(layer):
    output = gpu_embed.functional.embedding(torch.tensor([1, 4, 1]), layer.weight * 2)
    output.backward(grad_of(*output.shape))


def tensor_hook(layer):
    seen = []
    handle = layer.weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
    one(layer)
    handle.remove()
    return seen


def tensor_hook_after_the_forward(layer):
    seen = []
    output, grad = lookups(layer)
    handle = layer.weight.register_hook(seen.append)
    output.backward(grad)
    handle.remove()
    return seen


def removed_tensor_hook(layer):
    layer.weight.register_hook(lambda grad: grad * 2).remove()
    one(layer)


def post_accumulate_hook(layer):
    seen = []
    handle = layer.weight.register_post_accumulate_grad_hook(
        lambda weight: seen.append(weight.grad.clone())
    )
    one(layer)
    handle.remove()
    return seen


def hook_on_the_accumulator(layer):
    seen = []
    node = torch.autograd.graph.get_gradient_edge(layer.weight).node
    handle = node.register_hook(lambda *_: seen.append(layer.weight.grad.clone()))
    one(layer)
    handle.remove()
    return seen


def frozen_after_the_forward(layer):
    output, grad = lookups(layer)
    layer.weight.requires_grad_(False)
    output.backward(grad)


def retain_graph(layer):
    output, grad = lookups(layer)
    output.backward(grad, retain_graph=True)
    output.backward(grad)


def several_lookups(layer):
    (lookups(layer)[0] * 3 + layer(torch.tensor([0, 1, 1]))).backward(grad_of(3, 4))


def tied_head(layer):
    layer.weight.grad = None
    for _ in range(2):
        (lookups(layer)[0] @ layer.weight.T).backward(grad_of(3, 9))


def checkpointed(layer):
    checkpoint(layer, torch.tensor([1, 4, 1]), use_reentrant=False).backward(grad_of(3, 4))


def checkpointed_reentrant(layer):
    scale = torch.ones((), requires_grad=True)
    run = lambda ids, scale: layer(ids) * scale  # noqa: E731
    checkpoint(run, torch.tensor([1, 4, 1]), scale, use_reentrant=True).backward(grad_of(3, 4))


def saved_on_cpu(layer):
    with torch.autograd.graph.save_on_cpu():
        one(layer)


def functional_call(layer):
    def loss(weight):
        output = func.functional_call(layer, {"weight": weight}, torch.tensor([1, 4, 1]))
        return (output * grad_of(3, 4)).sum()

    return func.grad(loss)(layer.weight)


def per_sample(layer):
    output, grad = lookups(layer)
    return torch.autograd.grad(
        output, layer.weight, torch.stack([grad, 2 * grad]), is_grads_batched=True
    )


def forward_over_reverse(layer):
    output, grad = lookups(layer)
    with forward_ad.dual_level():
        (result,) = torch.autograd.grad(
            output, layer.weight, forward_ad.make_dual(grad, grad + 1), retain_graph=True
        )
        tangent = forward_ad.unpack_dual(result).tangent.clone()
        output.backward(forward_ad.make_dual(grad, grad + 1))
        layer.weight.grad = layer.weight.grad.clone()
    layer.weight.grad = forward_ad.unpack_dual(layer.weight.grad, level=0).primal
    return tangent


def autocast(layer):
    with torch.autocast("cpu", torch.bfloat16):
        output, grad = lookups(layer)
        output = output @ torch.eye(4)
    output.backward(grad.to(output.dtype))


def scaled(layer):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    output, grad = lookups(layer)
    scaler.scale((output * grad).sum()).backward()
    scaler.unscale_(torch.optim.SGD(layer.parameters(), 1.0))


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def watched(layer):
    output, grad = lookups(layer)
    with Watch() as watch:
        output.backward(grad)
    return len(watch.names)


def anomaly(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            one(layer)


def anomaly_of_nan(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            output = layer(torch.tensor([1, 2]))
            with pytest.raises(RuntimeError, match="returned nan values"):
                output.backward(torch.full_like(output, torch.nan))


def profiled(layer):
    with torch.profiler.profile():
        one(layer)


def deterministic(layer):
    torch.use_deterministic_algorithms(True)
    try:
        one(layer)
    finally:
        torch.use_deterministic_algorithms(False)


def negative_view(layer):
    output, grad = lookups(layer)
    output.backward(torch._neg_view(grad))


def of_its_own_memory(layer):
    lookups(layer)[0].backward(layer.weight.grad[1:4])


def expanded(layer):
    layer(torch.tensor([1, 4, 1])).sum().backward()


def no_ids(layer):
    layer(torch.tensor([], dtype=torch.int64)).sum().backward()


# How many additions are in place.
CASES = {
    one: 1,
    first: 0,
    second: 1,
    zeroed: 1,
    replaced_after_the_forward: 1,
    gone_after_the_forward: 0,
    sparse: 0,
    with_a_graph: 0,
    create_graph: 0,
    captured: 0,
    captured_beside_another: 0,
    for_another: 0,
    for_the_weight: 1,
    of_twice_the_weight: 0,
    tensor_hook: 0,
    tensor_hook_after_the_forward: 0,
    removed_tensor_hook: 1,
    post_accumulate_hook: 1,
    hook_on_the_accumulator: 1,
    frozen_after_the_forward: 0,
    retain_graph: 2,
    several_lookups: 2,
    tied_head: 1,
    checkpointed: 1,
    checkpointed_reentrant: 1,
    saved_on_cpu: 1,
    functional_call: 0,
    per_sample: 0,
    forward_over_reverse: 0,
    autocast: 1,
    scaled: 1,
    watched: 0,
    anomaly: 0,
    anomaly_of_nan: 0,
    profiled: 1,
    deterministic: 1,
    negative_view: 0,
    of_its_own_memory: 0,
    expanded: 1,
    no_ids: 1,
}


def outcome(case, marked, **arguments):
    """What a case returns, raises and leaves in `.grad`."""
    layer = gpu_embed.Embedding(9, 4, **arguments)
    with torch.no_grad():
        layer.weight.copy_(integers(9, 4))
    layer.weight.grad = grad_of(9, 4)
    before = layer.weight.grad
    handle = accumulate_in_place(layer) if marked else None
    result = case(layer)
    grad = layer.weight.grad
    del handle
    return result, grad, grad is before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("known", [False, True], ids=["first call", "known table"])
def test_nobody_can_tell(case, known, added):
    def run(layer):
        if known:
            layer(torch.tensor([0]))
        return case(layer)

    with gpu_embed.use_backend("torch"):
        without = outcome(run, False)
        assert not added
        result, grad, same = outcome(run, True)
    assert torch.equal(grad, without[1])
    torch.testing.assert_close(result, without[0], rtol=0, atol=0)
    assert same == without[2]
    assert len(added) == CASES[case]


def test_a_backward_that_saved_the_gradient_notices():
    """As autograd's own addition, one in place makes what saved `.grad` raise."""

    def case(layer):
        other = torch.ones(9, 4, requires_grad=True)
        output = other * layer.weight.grad
        one(layer)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    for marked in (False, True):
        outcome(case, marked)


def test_an_overlapping_gradient_is_refused_by_torch(added):
    def case(layer):
        layer.weight.grad = torch.zeros(1, 4).expand(9, 4)
        with pytest.raises(RuntimeError, match="refers to a single memory location"):
            one(layer)

    for marked in (False, True):
        outcome(case, marked)
    assert not added


def test_the_buffer_of_tables_is_added_to_only_where_it_is_contiguous(added):
    def run(marked):
        layer = table_cases.integer_layer([(7, 4), (3, 4)])
        layer.weight.grad = torch.ones(4, 10).T
        if marked:
            accumulate_in_place(layer)
        layer(torch.tensor([1, 1, 2]), torch.tensor([0, 2, 3])).sum().backward()
        return layer.weight.grad

    assert torch.equal(run(True), run(False))
    assert not added


def test_ids_changed_in_place_raise_and_nothing_is_added(added):
    def case(layer):
        ids = torch.tensor([1, 4, 1])
        output = layer(ids)
        ids[0] = 2
        before = layer.weight.grad.clone()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        assert torch.equal(layer.weight.grad, before)

    outcome(case, True)
    assert not added


def test_a_sparse_gradient_goes_to_a_dense_one_as_before(added):
    without, marked = (outcome(one, marked, sparse=True)[1] for marked in (False, False))
    layer = gpu_embed.Embedding(9, 4, sparse=True)
    layer.weight.grad = grad_of(9, 4)
    accumulate_in_place(layer.weight)
    one(layer)
    assert torch.equal(layer.weight.grad, without)
    assert torch.equal(marked, without)
    assert not added


def test_a_weight_whose_shape_changed_after_the_forward(added):
    def case(layer):
        output, grad = lookups(layer)
        layer.weight.grad = None
        layer.weight.data = torch.zeros(2, 4)
        layer.weight.grad = torch.zeros(2, 4)
        with pytest.raises(RuntimeError):
            output.backward(grad)

    for marked in (False, True):
        outcome(case, marked)
    assert not added


def test_complex_tables_are_as_before(added):
    def grad(marked):
        layer = gpu_embed.Embedding(9, 4, dtype=torch.complex64)
        layer.weight.grad = torch.ones(9, 4, dtype=torch.complex64)
        if marked:
            accumulate_in_place(layer)
        layer(torch.tensor([1, 1])).real.sum().backward()
        return layer.weight.grad

    assert torch.equal(grad(True), grad(False))
    assert not added


def test_threads_lose_no_addition():
    layer = gpu_embed.Embedding(5, 64)
    layer.weight.grad = torch.zeros(5, 64)
    accumulate_in_place(layer)
    ids = torch.arange(5).repeat(200)

    def work():
        for _ in range(10):
            layer(ids).sum().backward()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (layer.weight.grad == 4 * 10 * 200).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_fork_while_a_thread_adds_leaves_the_child_usable():
    """A lock that was copied while another thread held it would never be free in the child."""
    layer, own = gpu_embed.Embedding(2000, 64), gpu_embed.Embedding(5, 3)
    for table in (layer, own):
        table.weight.grad = torch.zeros_like(table.weight)
    handle = accumulate_in_place([layer.weight, own.weight])
    ids, done = torch.randint(2000, (20_000,)), threading.Event()

    def work():
        while not done.is_set():
            layer(ids).sum().backward()

    thread = threading.Thread(target=work)
    thread.start()
    statuses = []
    for _ in range(5):
        time.sleep(0.01)
        child = os.fork()
        if child == 0:
            # Ends the child by a signal where it hangs.
            signal.alarm(20)
            own(torch.tensor([1])).sum().backward()
            os._exit(0 if own.weight.grad[1].tolist() == [1, 1, 1] else 1)
        statuses.append(os.waitpid(child, 0)[1])
    done.set()
    thread.join()
    handle.remove()
    assert statuses == [0] * 5


@pytest.mark.full
@pytest.mark.parametrize("compiled_backward", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compiled_as_without(compiled_backward, added):
    def case(layer):
        run = torch.compile(layer, backend="aot_eager", fullgraph=True)
        output = run(torch.tensor([1, 4, 1]))
        with torch._dynamo.config.patch(compiled_autograd=compiled_backward):
            backward = lambda: output.backward(grad_of(3, 4))  # noqa: E731
            (torch.compile(backward, backend="aot_eager") if compiled_backward else backward)()

    assert torch.equal(outcome(case, True)[1], outcome(case, False)[1])
    assert not added


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", None])
def test_compiled_autograd_of_an_eager_lookup(backend, added):
    from torch._dynamo import compiled_autograd

    def case(layer):
        output, grad = lookups(layer)
        compiler = (lambda graph: graph) if backend is None else torch.compile(backend=backend)
        with compiled_autograd._enable(compiler):
            output.backward(grad)

    assert torch.equal(outcome(case, True)[1], outcome(case, False)[1])
    assert not added


# Processes.


def model():
    layers = torch.nn.Sequential(gpu_embed.Embedding(9, 4), torch.nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(integers(*parameter.shape))
    return layers


def micro_steps(wrapped, rank, without_sync):
    """The gradients after three micro-steps, of which the last is in sync."""
    for step in range(3):
        with without_sync(step < 2):
            ids = torch.tensor([rank, 4, step, 4])
            wrapped(ids).backward(integers(4, 2, seed=step).float())
    return [p.grad for p in wrapped.parameters()]


def count_additions():
    counts, increment = [], torch.autograd.graph.increment_version

    def record(tensor):
        counts.extend([1] * isinstance(tensor, torch.Tensor))
        increment(tensor)

    torch.autograd.graph.increment_version = record
    return counts


def in_processes(rank, world_size, store):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    store = torch.distributed.FileStore(store, world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    counts = count_additions()
    for arguments in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        grads = []
        for marked in (False, True):
            one = DistributedDataParallel(model(), **arguments)
            if marked:
                accumulate_in_place(one)
            skip = lambda wanted, one=one: one.no_sync() if wanted else nullcontext()  # noqa: E731
            grads.append(micro_steps(one, rank, skip))
            assert len(counts) == (2 if marked else 0), (arguments, marked, counts)
        counts.clear()
        assert all(map(torch.equal, *grads))
    mesh, grads = init_device_mesh("cpu", (world_size,)), []
    for marked in (False, True):
        one = fully_shard(model(), mesh=mesh)
        if marked:
            accumulate_in_place(one)

        @contextmanager
        def skip(wanted, one=one):
            one.set_requires_gradient_sync(not wanted)
            yield

        grads.append([grad.full_tensor() for grad in micro_steps(one, rank, skip)])
    assert all(map(torch.equal, *grads))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2])
def test_data_parallel_training(tmp_path, world_size):
    """DDP adds in place in its last micro-step too; FSDP2 has parameters of its own, and is as without the mark."""
    arguments = world_size, str(tmp_path / "store")
    torch.multiprocessing.spawn(in_processes, arguments, nprocs=world_size)


# Versions of torch that tell less.


@pytest.mark.parametrize(
    ("engine", "additions"),
    [((True, True), 1), ((True, False), 0)],
)
def test_hooks_that_would_not_run_get_their_gradient(engine, additions, added, monkeypatch):
    monkeypatch.setattr(in_place, "_engine", lambda: in_place.Engine(*engine))
    layer = gpu_embed.Embedding(9, 4)
    layer.weight.grad = grad_of(9, 4)
    accumulate_in_place(layer)
    assert len(post_accumulate_hook(layer)) == 1
    assert len(added) == additions


def test_without_the_private_function_gradients_are_returned(added, monkeypatch):
    monkeypatch.setattr(in_place, "_will_execute", None)
    monkeypatch.setattr(in_place, "_engine", in_place._engine.__wrapped__)
    layer = gpu_embed.Embedding(9, 4)
    layer.weight.grad = torch.zeros(9, 4)
    accumulate_in_place(layer)
    one(layer)
    assert layer.weight.grad.any()
    assert not added


def test_this_torch_tells():
    with torch.inference_mode():
        assert in_place._engine.__wrapped__() == (True, True)


class FakeStream:
    def __init__(self):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


def test_streams_wait_for_each_other(monkeypatch):
    """What is added on one stream is there before another adds, and before autograd's own stream does."""
    leaf = torch.ones(2, requires_grad=True)
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    current, one, two = [], FakeStream(), FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    for _ in range(2):
        for stream in (one, one, two):
            current.append(stream)
            in_place._join_streams(node, torch.device("cuda"))
        current.append(one)
        (leaf * 1).sum().backward()
        assert (one.waited_for, two.waited_for) == ([two], [one])
        one.waited_for.clear()
        two.waited_for.clear()
    current.append(two)
    (leaf * 1).sum().backward()
    assert two.waited_for == []


# The mark and its handle.


def adds_in_place(layer, added):
    layer.weight.grad = torch.zeros_like(layer.weight)
    one(layer)
    found = len(added)
    added.clear()
    return found == 1


def test_a_handle_ends_it(added):
    layer = gpu_embed.Embedding(9, 4)
    first, second = accumulate_in_place(layer), accumulate_in_place([layer.weight])
    assert adds_in_place(layer, added)
    first.remove()
    first.remove()
    assert adds_in_place(layer, added)
    second.remove()
    assert not adds_in_place(layer, added)
    with accumulate_in_place(layer.parameters()) as third:
        assert adds_in_place(layer, added)
        third.remove()
        assert not adds_in_place(layer, added)
    with pytest.raises(KeyError), accumulate_in_place(layer):
        raise KeyError
    assert not adds_in_place(layer, added)
    assert not in_place.in_force & {id(first), id(second), id(third)}


def test_a_mark_outlives_its_handle_and_no_handle_its_leaves(added):
    layer = gpu_embed.Embedding(9, 4)
    before = set(in_place.in_force)
    accumulate_in_place(layer)
    gc.collect()
    assert adds_in_place(layer, added)
    weight = weakref.ref(layer.weight)
    handle = accumulate_in_place(layer)
    del layer
    assert weight() is None
    assert in_place.in_force - before == {id(handle)}
    del handle
    assert not in_place.in_force - before


@pytest.mark.full
def test_the_interpreter_exits_in_silence():
    code = (
        "import gpu_embed, torch\n"
        "layer = torch.keep = gpu_embed.Embedding(3, 2)\n"
        "gpu_embed.accumulate_in_place(layer)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_what_a_module_means(added):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = gpu_embed.Embedding(9, 4)
            self.frozen = gpu_embed.Embedding(9, 4).requires_grad_(False)
            self.bags = gpu_embed.EmbeddingBag(9, 4)
            self.tables = gpu_embed.TableBatchedEmbeddingBag([(3, 4), (2, 8)])
            self.sparse = gpu_embed.Embedding(9, 4, sparse=True)
            self.theirs = torch.nn.Embedding(9, 4)
            self.head = torch.nn.Linear(4, 9)
            self.computed = torch.nn.utils.parametrizations.weight_norm(gpu_embed.Embedding(9, 4))

    model = Model()
    accumulate_in_place(model)
    marked = {name for name, weight in model.named_parameters() if in_place.is_marked(weight)}
    assert marked == {f"{name}.weight" for name in ("own", "frozen", "bags", "tables")}
    assert adds_in_place(model.own, added)
    model.frozen.requires_grad_()
    assert adds_in_place(model.frozen, added)


def test_tied_layers_and_plain_leaves(added):
    weight = torch.zeros(9, 4, requires_grad=True)
    accumulate_in_place(weight)
    weight.grad = torch.zeros(9, 4)
    gpu_embed.functional.embedding(torch.tensor([1, 1]), weight).sum().backward()
    assert weight.grad[1].tolist() == [2] * 4
    assert len(added) == 1


def test_the_mark_lives_with_the_parameter(added):
    layer = gpu_embed.Embedding(9, 4)
    accumulate_in_place(layer)
    layer.to(torch.float64).to(torch.float32)
    layer.load_state_dict(gpu_embed.Embedding(9, 4).state_dict())
    assert adds_in_place(layer, added)
    layer.load_state_dict(layer.state_dict(keep_vars=True))
    torch.nn.utils.vector_to_parameters(torch.zeros(36), layer.parameters())
    assert adds_in_place(layer, added)


def test_copies_and_files_have_no_mark():
    layer = gpu_embed.Embedding(9, 4)
    accumulate_in_place(layer)
    layer.weight.note = "kept"
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    copies = [
        copy.deepcopy(layer).weight,
        pickle.loads(pickle.dumps(layer)).weight,
        torch.load(file, weights_only=True),
        layer.state_dict()["weight"],
    ]
    assert not any(in_place.is_marked(other) for other in copies)
    assert copies[2].note == "kept"
    plain = torch.zeros(3, 4, requires_grad=True)
    accumulate_in_place(plain)
    assert not in_place.is_marked(copy.deepcopy(plain))
    accumulate_in_place(copies[1])
    assert in_place.is_marked(copies[1])


def test_swapped_contents_and_conversions_that_make_a_parameter(added):
    """`swap_tensors` swaps attributes too, as it does hooks."""
    layer, other = gpu_embed.Embedding(9, 4), gpu_embed.Embedding(9, 4)
    accumulate_in_place(layer)
    torch.utils.swap_tensors(layer.weight, other.weight)
    assert not in_place.is_marked(layer.weight)
    assert adds_in_place(other, added)
    accumulate_in_place(layer)
    layer.to("meta")
    meta = gpu_embed.Embedding(9, 4, device="meta")
    accumulate_in_place(meta)
    meta.to_empty(device="cpu")
    torch.nn.init.zeros_(meta.weight)
    adds_in_place(meta, added)


def test_a_moved_mark_serves_known_tables_too(added):
    layer = gpu_embed.Embedding(9, 4)
    for _ in range(3):
        layer(torch.tensor([1]))
    with accumulate_in_place(layer):
        assert adds_in_place(layer, added)
    assert not adds_in_place(layer, added)


WRONG = {
    "number": (3, TypeError, "expected a module, a parameter or an iterable .* got int"),
    "none": (None, TypeError, "got NoneType"),
    "names": (
        gpu_embed.Embedding(2, 2).named_parameters(),
        TypeError,
        "got tuple at position 0",
    ),
    "nothing": ([], ValueError, "got no parameters"),
    "result": (
        [torch.ones(2, requires_grad=True) * 2],
        ValueError,
        r"the tensor \[2\] at position 0 is no leaf but the output of MulBackward0",
    ),
    "theirs": (torch.nn.Embedding(2, 2), ValueError, "Embedding holds no layer .*replace_embedd"),
    "sparse": (gpu_embed.Embedding(2, 2, sparse=True), ValueError, "with a dense gradient"),
}


@pytest.mark.parametrize(("argument", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(argument, error, message):
    with pytest.raises(error, match=message):
        accumulate_in_place(argument)


def test_a_refused_list_marks_nothing():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(TypeError):
        accumulate_in_place([weight, 3])
    assert not in_place.is_marked(weight)
