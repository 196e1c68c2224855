"""torch.compile, torch.export, make_fx, meta and fake tensors: the same values as eager, no graph break."""

import io
import shutil

import pytest
import torch
from cases import FORWARD_DTYPES, ID_DTYPES, integer_gradient, table
from torch import func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gpu_embed
from gpu_embed.functional import embedding, embedding_bag

# torch's own, about its exporter's and its tracer's use of the standard library.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "`torch.jit.\\w+` is deprecated",
        "Converting a tensor to a Python boolean",
        "Dynamo does not know how to trace the builtin",
    )
]

ARGUMENTS = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "scaled": {"scale_grad_by_freq": True},
    "max_norm": {"max_norm": 2.5},
    "sparse": {"sparse": True},
    "all but sparse": {"padding_idx": -1, "scale_grad_by_freq": True, "max_norm": 2.5},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inductor(test):
    has_compiler = pytest.mark.skipif(
        shutil.which("g++") is None, reason="inductor compiles C++ with g++"
    )
    return pytest.mark.full(has_compiler(test))


@pytest.fixture
def cheap_inductor():
    options = {"compile_threads": 1, "cpp_cache_precompile_headers": False}
    # torch's caches of graphs do not know this package's code: they would bring back what another version recorded.
    with (
        torch._inductor.config.patch(options | {"fx_graph_cache": False}),
        torch._functorch.config.patch({"enable_autograd_cache": False}),
    ):
        yield


def layer(device, *, frozen=False, **arguments):
    """A table of 7 rows of small integers."""
    weight = table(7, 3, torch.float32, device).round()
    return gpu_embed.Embedding(7, 3, _weight=weight, _freeze=frozen, **arguments)


def train(module, look_up, indices):
    """Three steps whose gradients are small integers or halves, exact in any order; the final table."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    grad_output = integer_gradient((*indices.shape, 3), torch.float32, indices.device)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (look_up(indices) * grad_output).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.cat([module.weight.detach().flatten(), torch.stack(losses)])


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_compiled_training_equals_eager(target, arguments):
    """Drop-in: one graph, forward and backward, on every backend and with every argument."""
    indices = torch.tensor([[5, 1, 0], [1, 6, 1], [0, 5, 3]], device=target.device)[:, [0, 1, 1, 2]]
    eager, compiled = (layer(target.device, **arguments) for _ in range(2))
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    assert torch.equal(train(compiled, graph, indices), train(eager, eager, indices))
    assert not torch.equal(eager.weight, layer(target.device).weight)


@inductor
def test_inductor_on_the_cpu(cheap_inductor):
    """Drop-in: with generated code around the op."""
    indices = torch.tensor([[5, 1, 0, 1], [1, 6, 1, 6]])
    eager, compiled = (layer("cpu", **ARGUMENTS["all but sparse"]) for _ in range(2))
    graph = torch.compile(compiled, fullgraph=True, dynamic=True)
    assert torch.equal(train(compiled, graph, indices), train(eager, eager, indices))
    assert torch.equal(graph(indices[:, :3]), eager(indices[:, :3]))


@pytest.mark.full
@pytest.mark.parametrize(
    ("dynamic", "settled"), [(True, 1), (None, 2)], ids=["from the start", "found out"]
)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_new_lengths_do_not_recompile(arguments, dynamic, settled):
    """Drop-in: the first call, without a hint the second, compiles the graph for all lengths."""
    module = layer("cpu", **arguments)
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)
    compiled = [0]
    for length in (5, 3, 11, 2, 200):
        indices = torch.arange(length * 2).view(2, length) % 7
        output = graph(indices)
        output.sum().backward()
        assert torch.equal(output, module.weight[indices])
        compiled.append(counter.frame_count)
    assert compiled[settled - 1] < compiled[settled]
    assert compiled[settled:] == [compiled[settled]] * (6 - settled)


def test_new_tables_do_not_recompile():
    """Drop-in: rows, columns and padding_idx are symbols too."""
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(embedding, fullgraph=True, backend=counter, dynamic=True)
    compiled = []
    for num_embeddings in (5, 7, 12):
        weight = table(num_embeddings, num_embeddings + 3, torch.float32, "cpu").requires_grad_()
        indices = torch.arange(2 * num_embeddings) % num_embeddings
        output = graph(indices, weight, -2)
        output.sum().backward()
        assert torch.equal(output, weight[indices])
        assert weight.grad[:, 0].tolist() == [2.0] * (num_embeddings - 2) + [0, 2]
        compiled.append(counter.frame_count)
    assert compiled == compiled[:1] * 3


@pytest.mark.parametrize("length", [0, 1])
def test_lengths_zero_and_one(length):
    """Sizes that the compiler treats as constants."""
    module = layer("cpu", padding_idx=1)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    indices = torch.full((length, 3), 4)
    output = graph(indices)
    output.sum().backward()
    assert torch.equal(output, module.weight[indices])
    assert module.weight.grad[4].tolist() == [3.0 * length] * 3


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_compiled_ids_of_every_dtype(dtype):
    """As torch: beyond torch's two dtypes under the compiler too."""
    module = layer("cpu")
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    indices = torch.tensor([5, 1, 5])
    output = graph(indices.to(dtype))
    output.sum().backward()
    assert torch.equal(output, module.weight[indices])
    assert module.weight.grad[:, 0].tolist() == [0, 1, 0, 0, 0, 2, 0]


def test_compiled_ids_out_of_range(target):
    """Bounds: the error is raised from a compiled call too, and the next one works."""
    module = layer(target.device)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    indices = torch.tensor([5, 7, 0], device=target.device)
    with (
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match=r"id 7 at flat position 1 .* has 7 rows"),
    ):
        graph(indices)
    assert torch.equal(graph(indices % 7), module.weight[indices % 7])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_compiled_without_gradients(mode):
    module = layer("cpu", max_norm=2.5)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    with mode():
        output = graph(torch.tensor([5, 1]))
    assert not output.requires_grad
    assert torch.equal(output, module.weight[[5, 1]])
    assert not torch.equal(module.weight, layer("cpu").weight)


def test_compiled_per_sample_gradients():
    """Drop-in: functorch inside the compiler."""
    weight = table(5, 3, torch.float32, "cpu").round()
    indices = torch.tensor([[3, 1, 1], [0, 2, 3]])
    per_sample = func.vmap(
        func.grad(lambda w, i: (embedding(i, w, padding_idx=1) ** 2).sum()), (None, 0)
    )
    graph = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(weight, indices), per_sample(weight, indices))


@pytest.mark.full
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_compiled_autograd(arguments):
    """Drop-in: an eager forward whose backward alone is compiled."""
    indices = torch.tensor([[5, 1, 1], [0, 5, 5]])
    grads = []
    for compiled in (False, True):
        module = layer("cpu", **arguments)
        output = module(indices)
        grad_output = integer_gradient((2, 3, 3), torch.float32, "cpu")
        if compiled:
            compiler = torch.compile(backend="aot_eager")
            with torch._dynamo.compiled_autograd._enable(compiler):
                output.backward(grad_output)
        else:
            output.backward(grad_output)
        grads.append(module.weight.grad.to_dense())
    assert torch.equal(*grads)


# Sparse gradients in a graph: Inductor's own code for them is wrong.


def look_up_in(weight, ids, more_ids):
    return {
        "once": lambda: embedding(ids, weight, sparse=True).sum(),
        "twice": lambda: (
            (3 * embedding(ids, weight, sparse=True)).sum()
            - embedding(more_ids, weight, padding_idx=1, sparse=True).sum()
        ),
        "chunks": lambda: sum(
            (n * embedding(chunk, weight, sparse=True)).sum()
            for n, chunk in enumerate(ids.repeat(4).split(3))
        ),
        "bags": lambda: (
            embedding_bag(ids, weight, more_ids, mode="mean", sparse=True).square().sum()
            + embedding_bag(
                ids,
                weight,
                more_ids,
                mode="sum",
                sparse=True,
                per_sample_weights=ids.to(weight.dtype),
            ).sum()
            + embedding(more_ids, weight, sparse=True).sum()
        ),
        "max_norm": lambda: (
            (2 * embedding(ids, weight, max_norm=1e4, sparse=True)).sum()
            + embedding(more_ids, weight, max_norm=1e4, sparse=True).sum()
        ),
        "tied head": lambda: (
            linear(embedding(ids, weight, sparse=True), weight).sum()
            + embedding(more_ids, weight, sparse=True).sum()
        ),
        "dense too": lambda: (
            embedding(ids, weight, sparse=True) + 2 * embedding(more_ids[0], weight)
        ).sum(),
        "one unused": lambda: (
            embedding(ids, weight, sparse=True),
            embedding(more_ids, weight, sparse=True).sum(),
        )[1],
        "checkpoint": lambda: (
            checkpoint(lambda: embedding(ids, weight, sparse=True) * 2, use_reentrant=False).sum()
            + embedding(more_ids, weight, sparse=True).sum()
        ),
        "no ids": lambda: (
            embedding(ids[:0], weight, sparse=True).sum()
            + embedding(ids[:0].reshape(3, 0), weight, sparse=True).sum()
            + embedding(more_ids, weight, sparse=True).sum()
        ),
    }


CASES = list(look_up_in(None, None, None))


def loss_and_gradient(case, backend=None, dtype=torch.float32, **options):
    weight = torch.nn.Parameter(table(7, 3, dtype, "cpu").round())
    look_up = look_up_in(weight, torch.tensor([5, 1, 1, 6]), torch.tensor([0, 2]))[case]
    if backend is not None:
        look_up = torch.compile(look_up, backend=backend, **options)
    loss = look_up()
    loss.backward()
    return loss.detach(), weight.grad


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_one_table_looked_up_several_times(case, dtype):
    """As torch: the sum of the gradients."""
    loss, gradient = loss_and_gradient(case, dtype=dtype)
    compiled_loss, compiled = loss_and_gradient(case, "aot_eager", dtype, fullgraph=True)
    assert torch.equal(compiled_loss, loss)
    assert torch.equal(compiled.to_dense(), gradient.to_dense())
    # Of a table that it writes to torch.compile makes every gradient dense.
    assert compiled.layout == (torch.strided if case == "max_norm" else gradient.layout)


@pytest.mark.parametrize(("case", "lookups"), [("once", 1), ("chunks", 6)])
def test_graphs_make_one_sparse_gradient_of_a_table(case, lookups):
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    loss_and_gradient(case, aot_autograd(fw_compiler=record), fullgraph=True)
    forward, backward = graphs
    assert forward.count("gpu_embed.embedding.default") == lookups
    assert "aten.detach.default" not in forward
    assert [name for name in backward if "sparse" in name or "add" in name] == [
        "gpu_embed.sparse_gradient.default"
    ]


@pytest.mark.full
def test_ids_of_several_dtypes_and_a_transposed_table():
    transposed = table(3, 7, torch.float32, "cpu").round().t()
    ids, more_ids = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([[4, 0]]).to(torch.uint8)

    def loss(weight):
        found = [embedding(x, weight, sparse=True) for x in (ids, more_ids)]
        return (2 * found[0]).sum() + found[1].sum()

    weights = [torch.nn.Parameter(transposed.clone()) for _ in range(2)]
    assert not weights[0].is_contiguous()
    loss(weights[0]).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(weights[1]).backward()
    assert torch.equal(weights[1].grad.to_dense(), weights[0].grad.to_dense())


@pytest.mark.full
def test_opcheck_sparse_gradient():
    ids, values = torch.tensor([1, 2]), torch.ones(2, 3)
    torch.library.opcheck(
        torch.ops.gpu_embed.sparse_gradient,
        ([ids, ids[:1]], [values, values[:1]], 5),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@inductor
def test_inductor_and_tables_looked_up_several_times(cheap_inductor):
    """As torch in eager mode: each table's sum of gradients, whatever the graph computes beside it."""
    cases = "twice", "bags", "tied head", "checkpoint", "no ids"
    ids, more_ids = torch.tensor([5, 1, 1, 6]), torch.tensor([0, 2])
    weights = [torch.nn.Parameter(table(7, 3, torch.float32, "cpu").round()) for _ in cases]

    def loss():
        return sum(
            look_up_in(weight, ids, more_ids)[case]()
            for case, weight in zip(cases, weights, strict=True)
        )

    gradients = []
    for look_up in (loss, torch.compile(loss, fullgraph=True)):
        for weight in weights:
            weight.grad = None
        look_up().backward()
        gradients.append([weight.grad.to_dense() for weight in weights])
    for case, eager, compiled in zip(cases, *gradients, strict=True):
        assert torch.equal(compiled, eager), case


@inductor
@pytest.mark.parametrize(("mode", "backend"), [("sum", "inductor"), ("max", "aot_eager")])
def test_batched_tables_looked_up_twice(mode, backend, cheap_inductor):
    tables = gpu_embed.TableBatchedEmbeddingBag({"a": (5, 4), "b": (7, 4)}, mode, sparse=True)
    with torch.no_grad():
        for weight in tables.parameters():
            weight.copy_(torch.arange(weight.numel()).view_as(weight) % 7 - 3)
    ids, offsets = torch.tensor([0, 1, 1, 3, 2, 0, 1, 2]), torch.tensor([0, 2, 3, 5, 8])

    def loss():
        return (3 * tables(ids, offsets)).sum() - tables(ids[:4], offsets.clamp(max=4)).sum()

    gradients = []
    for look_up in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        tables.zero_grad()
        look_up().backward()
        gradients.append(next(tables.parameters()).grad.to_dense())
    assert torch.equal(*gradients)


@inductor
def test_inductor_and_new_lengths_of_two_lookups(cheap_inductor):
    module = layer("cpu", sparse=True)

    def loss(ids, more_ids):
        return (2 * module(ids)).sum() + module(more_ids).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for length in (4, 2, 9):
        gradients = []
        for look_up in (loss, compiled):
            module.zero_grad()
            look_up(
                torch.arange(length) % 7, torch.arange(2 * length).view(2, length) % 5
            ).backward()
            gradients.append(module.weight.grad.to_dense())
        assert torch.equal(*gradients)


@inductor
def test_inductor_overwrites_no_gradient(cheap_inductor):
    """The ids and values of one table's gradient stay, whatever the backward computes after them."""
    tables = [layer("cpu", sparse=True) for _ in range(3)]
    swapped = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])

    def loss(*ids):
        first, second, third = (module(x) for module, x in zip(tables, ids, strict=True))
        return (
            ((((first * 3) @ swapped).square() @ swapped + second * 5) @ swapped + third)
            .square()
            .sum()
        )

    ids = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])
    gradients = []
    for look_up in (loss, torch.compile(loss, fullgraph=True)):
        for module in tables:
            module.zero_grad()
        look_up(*ids).backward()
        gradients.append([module.weight.grad.to_dense() for module in tables])
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.full
def test_updates_in_backward_of_a_table_looked_up_twice():
    weights = []
    for compiled in (False, True):
        module = layer("cpu", sparse=True)
        gpu_embed.optim.apply_in_backward(module, gpu_embed.optim.SGD, lr=0.5)
        ids = torch.tensor([5, 1, 1, 6])

        def loss(ids, module=module):
            return (2 * module(ids)).sum() + module(ids[:2] + 1).sum()

        look_up = torch.compile(loss, backend="aot_eager") if compiled else loss
        look_up(ids).backward()
        weights.append(module.weight.detach())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], layer("cpu").weight)


# torch.export.


class Head(torch.nn.Module):
    """The layer inside a model, as an exporter meets it."""

    def __init__(self, **arguments):
        super().__init__()
        self.table = layer("cpu", **arguments)

    def forward(self, indices):
        return self.table(indices) * 2


EXPORTED = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "frozen, max_norm": {"frozen": True, "max_norm": 2.5},
}


@pytest.mark.full
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("arguments", EXPORTED.values(), ids=EXPORTED)
def test_export(arguments, strict):
    """Drop-in: torch's op in the graph, dynamic batch and length; decomposed, saved and loaded."""
    example = torch.tensor([[5, 1, 0], [1, 6, 1]])
    dims = ({0: Dim("batch"), 1: Dim("length")},)
    program = torch.export.export(Head(**arguments), (example,), dynamic_shapes=dims, strict=strict)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.aten.embedding.default) == 1
    assert not any("gpu_embed" in str(target) for target in targets)

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for exported in (program, program.run_decompositions(), loaded):
        module = exported.module()
        for shape in ((2, 3), (5, 9), (3, 2)):
            indices = torch.arange(shape[0] * shape[1]).view(shape) * 3 % 7
            eager = Head(**arguments)
            module.load_state_dict(eager.state_dict())
            # torch's renormalization, unlike ours, rounds its factor before it multiplies.
            rtol = 2**-21 if "max_norm" in arguments else 0
            torch.testing.assert_close(module(indices), eager(indices), rtol=rtol, atol=0)
            weight = module.state_dict()["table.weight"]
            torch.testing.assert_close(weight, eager.table.weight, rtol=rtol, atol=0)


# Tracing.


@pytest.mark.full
@pytest.mark.parametrize(
    "layer",
    [gpu_embed.Embedding(7, 4, padding_idx=0), gpu_embed.EmbeddingBag(7, 4, mode="sum")],
    ids=["lookup", "bags"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_export_to_onnx(layer, tmp_path):
    """ONNX has no op of ours: the exporter records torch's."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ids = torch.tensor([[5, 1, 0], [6, 3, 2]])
    with torch.no_grad():
        layer.weight.copy_(table(7, 4, torch.float32, "cpu").round())
        expected = layer(ids)
    file = tmp_path / "table.onnx"
    torch.onnx.export(layer.eval(), (ids,), file, input_names=["ids"], dynamo=True, verbose=False)
    (output,) = runtime.InferenceSession(file).run(None, {"ids": ids.numpy()})
    assert torch.equal(torch.from_numpy(output), expected)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_make_fx(arguments, tracing_mode):
    """Drop-in: forward and gradient as one graph of ops."""

    def gradient(weight, indices):
        weight = weight.clone().requires_grad_()
        output = embedding(indices, weight, **arguments)
        (grad,) = torch.autograd.grad((output * output).sum(), weight)
        return output, grad.to_dense()

    weight = table(7, 3, torch.float32, "cpu").round()
    indices = torch.tensor([[5, 1, 0, 1], [1, 6, 1, 6]])
    graph = make_fx(gradient, tracing_mode=tracing_mode)(weight, indices)
    others = indices.flip(1) if tracing_mode != "symbolic" else indices.repeat(2, 1)
    targets = {node.target for node in graph.graph.nodes}
    assert torch.ops.gpu_embed.embedding.default in targets
    assert all(map(torch.equal, graph(weight, others), gradient(weight, others)))


def test_fx_symbolic_trace():
    """Drop-in: tools that rewrite models with torch.fx meet the layer as they meet torch's."""
    model = Head(padding_idx=1)
    graph = torch.fx.symbolic_trace(model)
    indices = torch.tensor([5, 1])
    assert torch.equal(graph(indices), model(indices))


def test_jit_trace():
    """Drop-in: the older tracer records the op too."""
    model = Head(padding_idx=1)
    traced = torch.jit.trace(model, (torch.tensor([5, 1]),))
    indices = torch.tensor([[0, 6], [1, 1]])
    assert torch.equal(traced(indices), model(indices))
    assert "gpu_embed::embedding" in str(traced.inlined_graph)


def test_dispatch_modes_see_the_ops(target):
    """Drop-in: modes that count, log or replace ops see ours, forward and backward."""
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    module = layer(target.device, max_norm=2.5)
    with Log():
        module(torch.tensor([5, 1], device=target.device)).sum().backward()
    ours = [name for name in seen if name.startswith("gpu_embed")]
    assert ours == [
        "gpu_embed.embedding_renorm_.default",
        "gpu_embed.embedding.default",
        "gpu_embed.embedding_dense_backward.default",
    ]
    assert module.weight.grad[:, 0].tolist() == [0, 1, 0, 0, 0, 1, 0]


def test_the_profiler_sees_the_ops(target):
    """Drop-in: a profile names the lookup and its gradient."""
    module = layer(target.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(torch.tensor([5, 1], device=target.device)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"gpu_embed::embedding", "gpu_embed::embedding_dense_backward"} <= names


# Shapes without data.


@pytest.mark.parametrize("dtype", FORWARD_DTYPES, ids=str)
def test_meta_forward(dtype):
    """Drop-in: a model on the meta device infers shapes and dtypes."""
    weight = torch.empty(7, 3, dtype=dtype, device="meta")
    for ids_dtype in ID_DTYPES:
        indices = torch.empty(2, 0, 5, dtype=ids_dtype, device="meta")
        output = embedding(indices, weight)
        assert output.is_meta
        assert output.shape == (2, 0, 5, 3)
        assert output.dtype == dtype
        assert output.is_contiguous()


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_meta_gradient(arguments):
    """Drop-in: the gradient has its layout and shape there too."""
    module = gpu_embed.Embedding(7, 3, device="meta", **arguments)
    module(torch.empty(2, 5, dtype=torch.int64, device="meta")).sum().backward()
    assert module.weight.grad.is_meta
    assert module.weight.grad.shape == (7, 3)
    assert module.weight.grad.is_sparse == module.sparse


@pytest.mark.parametrize("shape_env", [None, ShapeEnv()], ids=["static", "symbolic"])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_fake_tensors(arguments, shape_env):
    """Drop-in: shapes alone decide; no id is read, or those out of range would raise."""
    mode = FakeTensorMode(shape_env=shape_env)
    weight = mode.from_tensor(torch.zeros(7, 3), static_shapes=shape_env is None)
    weight.requires_grad_()
    indices = mode.from_tensor(torch.full((2, 5), 99), static_shapes=shape_env is None)
    with mode:
        output = embedding(indices, weight, **arguments)
        output.sum().backward()
    assert output.shape == (2, 5, 3)
    assert output.stride() == (15, 3, 1)
    assert output.dtype == torch.float32
    assert weight.grad.shape == (7, 3)
    assert weight.grad.is_sparse == bool(arguments.get("sparse"))


def test_fake_mode_over_real_tensors():
    """Nothing is computed for plain tensors either while the mode is on."""
    module = layer("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = module(mode.from_tensor(torch.tensor([5, 1])))
    assert isinstance(output, torch._subclasses.FakeTensor)
    assert output.shape == (2, 3)
