"""The code of docs/serving.md: run here, and what it wrote where this package is not."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from alone import alone
from commands import FENCED, ROOT, check_printed, python_blocks

PAGE = (ROOT / "docs/serving.md").read_text()

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]

SERVE = """
import torch
loaded = torch.export.load("model.pt2").module()
compiled = torch._inductor.aoti_load_package("compiled.pt2")
batch = torch.tensor([[4, 7, 0]]), torch.tensor([[199, 0]])
assert torch.allclose(loaded(*batch), compiled(*batch), atol=1e-6)
for wrong in (-1, 1000):
    for model, kind in ((loaded, IndexError), (compiled, RuntimeError)):
        try:
            model(torch.tensor([[4, wrong, 0]]), batch[1])
        except kind:
            continue
        raise SystemExit(f"{wrong} was served")
"""
SERVE_ONNX = """
import numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
session.run(None, {"user": numpy.array([[4, 7, 0]]), "item": numpy.array([[199, 0]])})
for wrong in (-1, 1000):
    try:
        session.run(None, {"user": numpy.array([[4, wrong, 0]]), "item": numpy.array([[199, 0]])})
    except Exception as error:
        assert "out of data bounds" in str(error), error
    else:
        raise SystemExit(f"{wrong} was served")
"""


def test_the_page(tmp_path, monkeypatch, capsys):
    """Its prints are true, and its three files, its C++ and its compiler's command serve one example."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(python_blocks(PAGE))
    page = {"__name__": "page"}
    exec(compile(code, "serving.md", "exec"), page)
    check_printed(code, capsys.readouterr().out)
    alone(SERVE, ["gpu_embed"])
    alone(SERVE_ONNX, ["gpu_embed", "torch"])

    blocks = dict(FENCED.findall(PAGE))
    (tmp_path / "serve.cpp").write_text(blocks["cpp"])
    done = subprocess.run(
        ["sh", "-e", "-c", blocks["sh"]],
        env={"PATH": "/usr/bin:/bin", "TORCH": torch.__path__[0]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = page["model"](torch.tensor([[4, 7, 0]]), torch.tensor([[199, 0]])).item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-5)


KERAS = """
import os
os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy
import gpu_embed.keras
ids = keras.Input((3,), dtype="int64")
layer = CLASS(20, 64)
model = keras.Model(ids, layer(ids))
layer.quantize(MODE)
model(numpy.zeros((1, 3), "int64"))
try:
    model.export("model.onnx", format="onnx", verbose=False)
except Exception as error:
    print(type(error).__name__ + ":", str(error).splitlines()[0])
"""


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("layer", ["keras.layers.Embedding", "gpu_embed.keras.Embedding"])
def test_what_a_quantized_layer_of_keras_cannot(layer, mode, tmp_path):
    """Once it can, the page is to say so."""
    if find_spec("keras") is None or find_spec("onnxscript") is None:
        pytest.skip("keras or onnxscript is not installed")
    code = KERAS.replace("CLASS", layer).replace("MODE", repr(mode))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.splitlines()
    said = re.search(r"^UnsupportedOperatorError: .*$", PAGE, re.M)
    assert said is not None
    assert said[0] in printed
