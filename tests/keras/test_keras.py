"""The Keras layer: Keras's own tests with it, and what those do not see."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_embed

pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")

IDS = [[3, -1, 0], [-7, 6, 3]]  # of a table of 7 rows
ROWS = np.array([[3, 6, 0], [0, 6, 3]])
LAYERS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "mixed_float16": {"dtype": "mixed_float16"},
    "mixed_bfloat16": {"dtype": "mixed_bfloat16"},
}


@pytest.fixture(scope="module")
def keras() -> ModuleType:
    """Keras on torch. Imported late: it takes seconds, and other tests need none of it."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    assert keras.backend.backend() == "torch"
    return keras


@pytest.fixture(scope="module")
def ours(keras: ModuleType) -> type:
    import gpu_embed.keras

    return gpu_embed.keras.Embedding


@pytest.fixture
def device(target, keras) -> Iterator[str]:
    """Where the target's tensors go, as Keras's choice too."""
    with keras.device(target.device):
        yield target.device


class Seen(TorchDispatchMode):
    """The operators that torch dispatches, and the elements of the largest tensor that one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        output = op(*args, **(kwargs or {}))
        self.names.append(str(op))
        # A view of the table is no table.
        if isinstance(output, torch.Tensor) and not op.is_view:
            self.largest = max(self.largest, output.numel())
        return output


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


# Keras's own tests.

RUN_KERAS_TESTS = """
import json, pytest
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from keras.src import layers
import gpu_embed.keras
from gpu_embed.ops import take as take_ops

class Outcomes:
    def __init__(self):
        self.passed, self.skipped, self.failed = [], [], []
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            getattr(self, report.outcome).append(report.nodeid.split("::")[-1])

calls = {"take_rows": 0, "dequantize_rows": 0}
def counted(name):
    op = getattr(take_ops, name)
    def call(*arguments):
        calls[name] += 1
        return op(*arguments)
    return call
for name in calls:
    setattr(take_ops, name, counted(name))

layers.Embedding = gpu_embed.keras.Embedding
outcomes = Outcomes()
file = find_spec("keras.src.layers.core.embedding_test").origin
# Where Keras lies below this repo, in .venv, pytest would take this repo's settings for its tests.
settings = ROOT + "/pytest.ini"
open(settings, "w").write("[pytest]")
arguments = [file, "-q", "-c", settings, "--rootdir", ROOT, "-p", "no:cacheprovider", "-p", "no:xdist"]
pytest.main(arguments, plugins=[outcomes])
print(json.dumps({**vars(outcomes), **calls}))
"""


@pytest.mark.full
def test_keras_own_tests_pass_with_our_layer(tmp_path):
    """All 51 of Keras 3.15, but for three that need a backend with sparse or ragged tensors."""
    done = run_python(
        f"ROOT = {str(tmp_path)!r}\n{RUN_KERAS_TESTS}", KERAS_BACKEND="torch", OMP_NUM_THREADS="1"
    )
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes["failed"] == [], done.stdout[-5000:]
    assert sorted(outcomes["skipped"]) == ["test_correctness_sparse", "test_ragged", "test_sparse"]
    assert len(outcomes["passed"]) == 48
    assert outcomes["take_rows"] > 20
    assert outcomes["dequantize_rows"] > 20


@cache
def quantized(
    layer_class: type,
    mode: str | None,
    device: str,
    rows: int = 7,
    dim: int = 4,
    block_size: int | None = -1,
    policy: str = "float32",
):
    """A layer of random numbers; made once, as Keras takes half a second to quantize it, so not to be changed."""
    import keras

    with keras.device(device):
        layer = layer_class(rows, dim, dtype=policy)
        layer.build()
        layer.embeddings.assign(np.random.default_rng(0).normal(size=(rows, dim)))
        if mode == "int4" and block_size != -1:
            config = keras.quantizers.Int4QuantizationConfig(block_size=block_size)
            layer.quantize(mode, config=config)
        elif mode:
            layer.quantize(mode)
    return layer


# Values and gradients.


def meant(layer) -> np.ndarray:
    """The rows at IDS that NumPy makes of the layer's table, in float64."""
    return layer.embeddings.value.detach().cpu().double().numpy()[ROWS]


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("ids_dtype", ["int64", "float32"])
def test_a_lookup_copies_rows(ours, device, kwargs, ids_dtype):
    """In the compute dtype, rounded once; the ids in any dtype, negative ones from the end."""
    layer = ours(7, 4, embeddings_initializer="normal", **kwargs)
    layer.build()
    ids = np.array(IDS).astype(ids_dtype)
    output = layer(ids)
    expected = torch.tensor(meant(layer)).to(getattr(torch, layer.compute_dtype))
    assert output.device.type == device
    assert torch.equal(output.detach().cpu(), expected)


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_gradients_are_those_of_numpy(ours, device, kwargs):
    """Accumulation: integers sum exactly; in the table's dtype, not in the policy's."""
    layer = ours(7, 4, **kwargs)
    layer.build()
    grad_output = np.arange(24).reshape(2, 3, 4) - 12
    output = layer(torch.tensor(IDS, device=device))
    output.backward(torch.tensor(grad_output, device=device).to(output.dtype))
    expected = np.zeros((7, 4))
    np.add.at(expected, ROWS, grad_output)
    grad = layer.embeddings.value.grad
    assert grad.dtype == layer.embeddings.value.dtype
    assert np.array_equal(grad.cpu().double().numpy(), expected)


def test_many_narrow_gradients_are_not_lost(ours, device):
    """Accumulation: 4096 gradients of 1.0 in bf16, where Keras's torch backend on a CPU stops at 256."""
    layer = ours(3, 2, dtype="bfloat16")
    layer.build()
    layer(torch.ones(4096, dtype=torch.int64, device=device)).sum().backward()
    assert layer.embeddings.value.grad[1].tolist() == [4096, 4096]


def test_a_training_step_moves_the_rows_that_were_used(keras, ours, device):
    layer = ours(7, 4)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    before = layer.embeddings.numpy().astype(np.float64)
    target = np.arange(24).reshape(2, 3, 4) / 8
    model.train_on_batch(np.array(IDS), target)
    expected = before.copy()
    # d/dw of the mean of (w - t)^2 over 24 numbers.
    np.add.at(expected, ROWS, -0.5 * 2 * (before[ROWS] - target) / 24)
    # One rounding of each of a handful of fp32 operations, on numbers below 4.
    assert np.abs(layer.embeddings.numpy() - expected).max() < 8 * 4 * 2.0**-24
    assert np.array_equal(layer.embeddings.numpy()[[1, 2, 4, 5]], before[[1, 2, 4, 5]])


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("index", [7, -8, 2**32 + 3])
def test_ids_out_of_range_are_errors_that_name_them(ours, device, mode, index):
    """Bounds: not clamped; an id that would be in the table after a cut to 32 bits neither."""
    layer = quantized(ours, mode, device)
    ids = torch.tensor([[1, index]], device=device)
    message = rf"id {index} at position \(0, 1\).*7 rows"
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match=message):
        layer(ids)
    with gpu_embed.set_bounds_check("off"):
        assert layer(ids)[0, 1].tolist() == [0] * 4


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_wide_unsigned_ids_are_not_cut_to_32_bits(ours, mode, dtype):
    """Nor do they become negative, which would name a row from the end."""
    layer = quantized(ours, mode, "cpu")
    dtype = getattr(torch, dtype)
    ids = torch.tensor([3, 6], dtype=dtype)
    assert torch.equal(layer(ids), layer(ids.long()))
    greatest = torch.iinfo(dtype).max
    named = min(greatest, torch.iinfo(torch.int64).max)
    for bad, name in ((greatest, named), (min(2**32 + 3, greatest), min(2**32 + 3, greatest))):
        with pytest.raises(IndexError, match=f"id {name} at flat position 1 .*7 rows"):
            layer(torch.tensor([3, bad], dtype=dtype))


@pytest.mark.parametrize(("mode", "call"), [(None, "call"), ("int8", "_int8_call")])
def test_ids_on_another_device_are_left_to_keras(keras, ours, monkeypatch, mode, call):
    """Where `keras.device` is not the table's: kernels would read the ids at an address of their own device."""
    ids = torch.zeros(2, dtype=torch.int64, device="meta")
    monkeypatch.setattr(keras.ops, "convert_to_tensor", lambda inputs: inputs)
    left = []
    monkeypatch.setattr(keras.layers.Embedding, call, lambda layer, *inputs: left.append(inputs[0]))
    getattr(quantized(ours, mode, "cpu"), call)(ids)
    assert len(left) == 1
    assert left[0] is ids


def test_regularizer_constraint_mask_and_weights(keras, ours):
    weights = np.arange(-6, 6).reshape(4, 3) / 4
    layer = ours(
        4,
        3,
        weights=weights,
        embeddings_regularizer=keras.regularizers.L2(0.5),
        embeddings_constraint="non_neg",
        mask_zero=True,
    )
    ids = torch.tensor([[0, 2, 3]])
    output = layer(ids)
    assert np.array_equal(output.detach().numpy(), weights[ids].astype(np.float32))
    assert output._keras_mask.tolist() == [[False, True, True]]
    assert layer.losses[0].item() == pytest.approx(0.5 * (weights**2).sum(), rel=1e-6)
    model = keras.Sequential([layer])
    model.compile("sgd", "mse")
    model.train_on_batch(ids, weights[ids] - 5)
    assert layer.embeddings.numpy().min() == 0


def test_input_length_is_deprecated_as_in_keras_3(keras, ours):
    """The example of older introductions works, and the length is the input's."""
    with pytest.warns(UserWarning, match="`input_length` is deprecated"):
        layer = ours(200, 32, input_length=50)
    assert layer(np.zeros((32, 50), dtype="int32")).shape == (32, 50, 32)
    assert layer(np.zeros((32, 7), dtype="int32")).shape == (32, 7, 32)


# What is dispatched, and what is never made.


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_lookup_is_one_operator(keras, ours, mode, policy):
    """Keras's own dispatches six and more; under a mixed policy it also casts the whole table."""
    op = "dequantize_rows" if mode else "take_rows"
    layer = quantized(ours, mode, "cpu", policy=policy)
    for dtype in (torch.int64, torch.int32, torch.float32):
        ids = torch.tensor([[1, 2]], dtype=dtype)
        with Seen() as seen:
            layer(ids)
        assert seen.names == [f"gpu_embed.{op}.default"]
        assert seen.largest == 8
    keras_layer = quantized(keras.layers.Embedding, mode, "cpu")
    with Seen() as seen:
        keras_layer(ids.long())
    assert len(seen.names) >= 6


def lora(ours, num_rows: int, dim: int, **kwargs):
    """A layer with adapters of rank 2 that are not zero."""
    layer = ours(num_rows, dim, **kwargs)
    layer.build()
    layer.enable_lora(2, lora_alpha=3)
    rng = np.random.default_rng(0)
    for variable in (layer.lora_embeddings_a, layer.lora_embeddings_b):
        variable.assign(rng.integers(-4, 5, variable.shape))
    return layer


@pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)
def test_lora_is_added_before_the_rounding_to_the_compute_dtype(ours, device, kwargs):
    layer = lora(ours, 7, 4, **kwargs)
    table, a, b = (
        variable.value.detach().cpu().double().numpy()
        for variable in (layer._embeddings, layer.lora_embeddings_a, layer.lora_embeddings_b)
    )
    output = layer(torch.tensor(IDS, device=device))
    dtype = getattr(torch, layer.compute_dtype)
    assert output.dtype == dtype
    # The products of integers are exact; three sums are rounded in fp32 or fp64, and the last to the output's dtype.
    wide = torch.promote_types(dtype, torch.float32)
    magnitude = np.abs(table[ROWS]) + 1.5 * np.abs(a[ROWS]) @ np.abs(b)
    expected = table[ROWS] + 1.5 * a[ROWS] @ b
    roundings = 3 * torch.finfo(wide).eps / 2 + (dtype != wide) * torch.finfo(dtype).eps
    error = np.abs(output.detach().cpu().double().numpy() - expected)
    assert (error <= roundings * magnitude).all()
    assert np.abs(expected - table[ROWS]).max() > 1


def test_gradients_of_lora_are_those_of_numpy(ours, device):
    layer = lora(ours, 7, 4)
    output = layer(torch.tensor(IDS, device=device))
    grad_output = (np.arange(24).reshape(2, 3, 4) - 12).astype(float)
    output.backward(torch.tensor(grad_output, dtype=output.dtype, device=device))
    a, b = layer.lora_embeddings_a.numpy(), layer.lora_embeddings_b.numpy()
    grad_a = np.zeros(a.shape)
    np.add.at(grad_a, ROWS, 1.5 * grad_output @ b.T)
    grad_b = 1.5 * np.einsum("ijr,ijd->rd", a[ROWS], grad_output)
    assert np.array_equal(layer.lora_embeddings_a.value.grad.cpu().numpy(), grad_a)
    assert np.array_equal(layer.lora_embeddings_b.value.grad.cpu().numpy(), grad_b)
    assert layer._embeddings.value.grad is None


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_lora_never_forms_the_table(keras, ours, mode):
    """Forward and backward: nothing as large as the table is made, which Keras's own layer makes."""
    ids = torch.tensor([1, 999, 1])
    layers = {"ours": lora(ours, 1000, 8), "keras": lora(keras.layers.Embedding, 1000, 8)}
    largest = {}
    for name, layer in layers.items():
        if mode:
            layer.quantize(mode)
        with Seen() as seen:
            output = layer(ids)
            output.sum().backward()
        largest[name] = seen.largest
        assert output.shape == (3, 8)
    # The gradient of A, [1000, 2], is dense.
    assert largest["ours"] == 2000
    if mode != "int8":
        assert largest["keras"] >= 8000


@pytest.mark.full
@pytest.mark.parametrize(("mode", "block_size"), [("int8", -1), ("int4", None), ("int4", 8)])
def test_quantized_tables_are_never_dequantized_whole(keras, ours, device, mode, block_size):
    shape = (device, 1000, 24, block_size)
    ids = torch.tensor([[1, 999], [5, 1]], device=device)
    layer = quantized(ours, mode, *shape)
    with Seen() as seen:
        output = layer(ids)
    assert seen.largest == 4 * 24
    # The same fp32 operations in the same order.
    assert torch.equal(output, quantized(keras.layers.Embedding, mode, *shape)(ids))


def test_other_modes_are_refused_as_by_keras(keras, ours):
    """float8 tables are nothing that Keras's layer has."""
    for layer_class in (ours, keras.layers.Embedding):
        layer = layer_class(4, 2)
        layer.build()
        with pytest.raises(NotImplementedError, match="Expected one of \\('int8', 'int4'\\)"):
            layer.quantize("float8")


# Traced, exported, saved.


@pytest.fixture(scope="module")
def model(keras, ours):
    """A classifier, called once."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            ours(7, 4, mask_zero=True, name="table"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    model(np.abs(IDS) % 7)
    return model


@pytest.mark.full
def test_fit_with_jit_compile(keras, ours, monkeypatch):
    """Traced by torch.compile, whose code for the CPU another test compiles."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    layer = ours(7, 1)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer, keras.layers.Flatten()])
    model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=True)
    ids = np.array([[1, 2, 3], [3, 4, 5]])
    before = layer.embeddings.numpy()
    losses = model.fit(ids, np.ones((2, 3)), epochs=2, verbose=0).history["loss"]
    assert losses[0] > losses[1]
    changed = (layer.embeddings.numpy() != before)[:, 0]
    assert changed.tolist() == [False, True, True, True, True, True, False]


@pytest.mark.full
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["", "lora"])
def test_a_traced_call_is_made_of_torchs_operators(ours, mode, with_lora):
    layer = lora(ours, 40, 8) if with_lora else ours(40, 8)
    layer.build()
    if mode:
        layer.quantize(mode)
    ids = torch.tensor([[1, 2]])
    exported = torch.export.export(layer, (ids,), strict=False)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert names
    assert not [name for name in names if "gpu_embed" in name]
    assert torch.allclose(exported.module()(ids), layer(ids), rtol=1e-6)
    if with_lora and mode is None:
        made = [
            node
            for node in exported.graph.nodes
            if node.op == "call_function" and node.meta.get("val") is not None
        ]
        # A cast to the dtype that it has is the table itself.
        made = [node.meta["val"] for node in made if "aten.to." not in str(node.target)]
        assert max(value.numel() for value in made) < 40 * 8


def test_compiled_and_mapped_calls_are_made_of_torchs_operators(keras, ours):
    layer = ours(7, 4)
    layer.build()
    ids = torch.tensor(IDS)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    assert torch.equal(compiled(ids), layer(ids))
    assert len(graphs) == 1
    assert "gpu_embed" not in graphs[0].code
    with Seen() as seen:
        mapped = keras.ops.vectorized_map(layer, ids)
    assert torch.equal(mapped, layer(ids))
    assert seen.names
    assert not [name for name in seen.names if "gpu_embed" in name]


@pytest.mark.full
def test_export_to_onnx_and_torch(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ids = np.array([[3, 1, 0], [2, 6, 3]], dtype=np.int32)
    expected = model.predict(ids, verbose=0)
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: ids})
    # Another order of the additions of a mean and a product of four.
    assert np.allclose(output, expected, rtol=1e-6, atol=1e-6)
    model.export(tmp_path / "model.pt2", format="torch", verbose=False)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for row, number in zip(torch.tensor(ids), expected, strict=True):
        assert np.allclose(program(row[None]).detach().numpy(), number, rtol=1e-6, atol=1e-6)


LOAD_ON_NUMPY = '''
import importlib.abc, importlib.machinery, importlib.util, sys
from unittest.mock import MagicMock

class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Keras's NumPy backend imports these for what no embedding needs."""
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "scipy"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)
    def exec_module(self, module):
        pass

# Asked last: what is installed is found before.
sys.meta_path.append(StandIns())
import numpy as np, keras, gpu_embed.keras
model = keras.saving.load_model(FOLDER + "/model.keras")
layer = model.get_layer("table")
assert type(layer) is gpu_embed.keras.Embedding
base = keras.layers.Embedding(7, 4, weights=layer.get_weights())
ids = np.array([[3, 1, 0], [2, 6, 3]])
assert np.array_equal(layer(ids), base(ids))
print(keras.backend.backend(), model.predict(ids, verbose=0).ravel().tolist())
for each in (layer, base):
    each.quantize("int4")
assert np.array_equal(layer(ids), base(ids))
'''


@pytest.mark.full
def test_save_and_load_here_and_on_another_backend(keras, ours, model, tmp_path):
    """Under the name gpu_embed>Embedding; on another backend the layer is Keras's own, and a log line says so."""
    assert keras.saving.get_registered_name(ours) == "gpu_embed>Embedding"
    ids = np.array([[3, 1, 0], [2, 6, 3]])
    expected = model.predict(ids, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("table")) is ours
    assert loaded.get_layer("table").get_config() == model.get_layer("table").get_config()
    assert np.array_equal(loaded.predict(ids, verbose=0), expected)
    done = run_python(f"FOLDER = {str(tmp_path)!r}\n{LOAD_ON_NUMPY}", KERAS_BACKEND="numpy")
    assert done.returncode == 0, done.stderr
    backend, numbers = done.stdout.split(maxsplit=1)
    assert backend == "numpy"
    assert np.allclose(json.loads(numbers), expected.ravel(), rtol=1e-6, atol=1e-6)
    assert "Keras runs on numpy" in done.stderr
    assert "set KERAS_BACKEND=torch" in done.stderr


@pytest.mark.full
def test_weights_travel_between_our_layer_and_keras_own(keras, ours, tmp_path):
    """save_own_variables and load_own_variables are Keras's: adapters are merged, quantized tables kept."""
    ids = np.array(IDS)
    for mode in (None, "int8", "int4"):
        first = keras.Sequential([keras.Input((3,), dtype="int32"), lora(ours, 7, 4)])
        second = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(7, 4)])
        for model in (first, second):
            if mode:
                model.layers[0].quantize(mode)
        first.save_weights(tmp_path / "a.weights.h5")
        second.load_weights(tmp_path / "a.weights.h5")
        merged, own = second.predict(ids, verbose=0), first.predict(ids, verbose=0)
        # Merging quantizes anew: by half of a step, of which the largest number of a row is 127, or 7.
        step = {None: 2.0**-20, "int8": 1 / 127, "int4": 1 / 7}[mode] * np.abs(own).max()
        assert np.abs(merged - own).max() <= step


@pytest.mark.parametrize("with_lora", [False, True], ids=["", "lora"])
def test_tangents_reach_the_output(ours, with_lora):
    """Forward-mode gradients, which torch drops without a word where an operator of ours meets them."""
    layer = lora(ours, 7, 4) if with_lora else ours(7, 4)
    layer.build()
    variables = [variable.value.detach() for variable in layer.variables]
    with forward_ad.dual_level():
        variables[0] = forward_ad.make_dual(variables[0], torch.arange(28.0).view(7, 4))
        trainable, rest = (variables[1:], variables[:1]) if with_lora else (variables, [])
        output, _ = layer.stateless_call(trainable, rest, torch.tensor(IDS))
        tangent = forward_ad.unpack_dual(output).tangent
    assert tangent.tolist() == np.arange(28.0).reshape(7, 4)[ROWS].tolist()


def test_clone_stateless_call_and_symbolic_shapes(keras, ours, model):
    ids = torch.tensor([[3, 1, 0], [2, 6, 3]])
    clone = keras.models.clone_model(model)
    assert type(clone.get_layer("table")) is ours
    trainable = [v.value.detach().clone().requires_grad_() for v in model.trainable_variables]
    output, _ = model.stateless_call(trainable, [], ids)
    assert torch.equal(output, model(ids))
    output.sum().backward()
    used = trainable[0].grad.abs().sum(1) > 0
    # Row 0 is masked out of the mean.
    assert used.tolist() == [False, True, True, True, False, False, True]
    inputs = keras.Input((None,), dtype="int32")
    for policy, dtype in (("float32", "float32"), ("mixed_float16", "float16")):
        output = ours(7, 4, dtype=policy)(inputs)
        assert (output.shape, output.dtype) == ((None, None, 4), dtype)
        spec = ours(7, 4, dtype=policy).compute_output_spec(keras.KerasTensor((2, 5), "int64"))
        assert (spec.shape, spec.dtype) == ((2, 5, 4), dtype)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_layer_has_the_dtype_that_it_promises(keras, ours, mode):
    """In a model of a mixed policy, where Keras's own returns the scales' dtype."""
    layer = ours(7, 4, dtype=f"{mode}_from_mixed_bfloat16")
    inputs = keras.Input((3,), dtype="int32")
    model = keras.Model(inputs, layer(inputs))
    assert model.output.dtype == "bfloat16"
    assert model(np.abs(IDS) % 7).dtype == torch.bfloat16


# Import.


def import_anew() -> None:
    """Run gpu_embed/keras.py with what `import keras` finds at the moment."""
    file = Path(gpu_embed.__file__).parent / "keras.py"
    spec = spec_from_file_location("gpu_embed.keras", file)
    spec.loader.exec_module(module_from_spec(spec))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, 'gpu_embed.keras needs Keras 3: install the extra "keras"'),
        (SimpleNamespace(__version__="2.15.0"), "gpu_embed.keras needs Keras 3, found 2.15.0"),
    ],
    ids=["none", "2.15"],
)
def test_without_keras_3_the_error_says_what_to_install(monkeypatch, found, message):
    monkeypatch.setitem(sys.modules, "keras", found)
    with pytest.raises(ImportError, match=message):
        import_anew()


@pytest.mark.full
@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_without_a_choice_of_backend_the_error_says_what_to_set(tmp_path):
    """Keras takes TensorFlow where nothing is chosen."""
    done = run_python("import gpu_embed.keras", KERAS_HOME=str(tmp_path))
    assert (
        "set KERAS_BACKEND=torch in the environment before keras is first imported" in done.stderr
    )
    assert "tensorflow" in done.stderr
