"""What was exported runs in a process that cannot import this package, and gives the same bits."""

import shutil

import numpy as np
import pytest
import torch
from alone import alone
from served import CASES, Together, V, exported, made

# torch's own, about its exporters.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Sparse invariant checks are implicitly disabled",
        "`torch.jit.\\w+` is deprecated",
    )
]

# Examples a batch; a program was exported with 4 of them.
SIZES = (4, 3, 7)
COMPILED = [
    "lookup, int16",
    "rows, mean, padding",
    "bags, sum",
    "bags, max, padding, last",
    "tables, features",
    "rows of tables, padded",
    "swapped",
    "quantized lookup, int4",
    "quantized tables, padded",
]

LOAD_TORCH = """
import torch
for path in sys.argv[1:]:
    batches = torch.load(f"{path}.batches")
    model = MODEL
    torch.save([model(*batch) for batch in batches], f"{path}.outputs")
"""
PT2 = 'torch.export.load(f"{path}.pt2").module()'
COMPILED_PT2 = 'torch._inductor.aoti_load_package(f"{path}.pt2")'
LOAD_ONNX = """
import numpy, onnxruntime
for path in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(f"{path}.onnx", options)
    names = [one.name for one in session.get_inputs()]
    batches = numpy.load(f"{path}.npz")
    outputs = {}
    for number in range(len(batches) // len(names)):
        inputs = {name: batches[f"{number}.{place}"] for place, name in enumerate(names)}
        for place, output in enumerate(session.run(None, inputs)):
            outputs[f"{number}.{place}"] = output
    numpy.savez(f"{path}.outputs.npz", **outputs)
"""


def test_the_process_cannot_import_the_package():
    """Else the other tests would say nothing."""
    alone("import torch, numpy\nassert 'gpu_embed' not in sys.modules", ["gpu_embed"])
    with pytest.raises(AssertionError, match="gpu_embed is blocked"):
        alone("import gpu_embed.functional", ["gpu_embed"])
    with pytest.raises(AssertionError, match="json can be imported"):
        alone("", ["json"], block=False)


def served_alike(model, outputs):
    """Bit for bit what the model gives in this process."""
    for size, got in zip(SIZES, outputs, strict=True):
        expected = model(*model.batch(size))
        expected = expected if isinstance(expected, tuple) else (expected,)
        got = got if isinstance(got, (tuple, list)) else (got,)
        assert len(got) == len(expected)
        for name, ours, theirs in zip(getattr(model, "names", CASES), expected, got, strict=False):
            assert torch.equal(torch.as_tensor(theirs), ours), (name, size)


def test_programs(tmp_path):
    """torch.export.save and load."""
    model = Together(CASES).requires_grad_(False)
    path = tmp_path / "model"
    torch.export.save(exported(model), f"{path}.pt2")
    torch.save([model.batch(size) for size in SIZES], f"{path}.batches")
    alone(LOAD_TORCH.replace("MODEL", PT2), ["gpu_embed"], path)
    served_alike(model, torch.load(f"{path}.outputs"))


def test_aotinductor(tmp_path):
    """Its package, by torch's runner in Python."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there")
    model = Together(COMPILED).requires_grad_(False)
    path = tmp_path / "model"
    torch._inductor.aoti_compile_and_package(exported(model), package_path=f"{path}.pt2")
    torch.save([model.batch(size) for size in SIZES], f"{path}.batches")
    alone(LOAD_TORCH.replace("MODEL", COMPILED_PT2), ["gpu_embed"], path)
    served_alike(model, torch.load(f"{path}.outputs"))


# ONNX.


def onnx_exported(model, path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shapes = model.dynamic
    shapes = (shapes,) if isinstance(model, Together) else shapes
    torch.onnx.export(
        model.eval(), model.batch(4), path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx(tmp_path):
    """Loaded without torch, too."""
    model = Together(CASES).requires_grad_(False)
    path = tmp_path / "model"
    onnx_exported(model, f"{path}.onnx")
    arrays = {
        f"{number}.{place}": one.numpy()
        for number, size in enumerate(SIZES)
        for place, one in enumerate(model.batch(size))
    }
    np.savez(f"{path}.npz", **arrays)
    alone(LOAD_ONNX, ["gpu_embed", "torch"], path)
    outputs = np.load(f"{path}.outputs.npz")
    count = len(outputs) // len(SIZES)
    got = [[outputs[f"{number}.{place}"] for place in range(count)] for number in range(len(SIZES))]
    served_alike(model, got)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["lookup", "rows, sum"])
def test_an_id_out_of_range_in_onnx(case, tmp_path):
    """What the page says: from the table's end, or an error."""
    runtime = pytest.importorskip("onnxruntime")
    model = made(case).requires_grad_(False)
    onnx_exported(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (name,) = (one.name for one in session.get_inputs())
    ids = torch.tensor([[1, -1, 2], [0, 3, -V]])
    (output,) = session.run(None, {name: ids.numpy()})
    assert torch.equal(torch.from_numpy(output), model(ids % V))
    for wrong in (V, -V - 1):
        with pytest.raises(Exception, match="out of data bounds"):
            session.run(None, {name: np.array([[1, wrong, 2]])})
