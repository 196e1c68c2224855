#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.compile raises AssertionError in the backward of a torch.nn.Embedding(sparse=True) called twice.
#
# One such table, looked up twice in one compiled function, as a model with two kinds of items does.
# Expected: the gradient of eager mode, and of backend="aot_eager".
# Seen: the forward runs, and backward() raises "expected size 4==4, stride 0==2 at dim=0", of torch.ops.aten.add.Tensor.
# Inductor takes the sum of the two sparse gradients for a dense tensor. Its message blames "a custom op"; there is none.
#
# Exits 0 while that is so, 1 once it has changed. Needs python3 with venv, g++, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/inductor" "$folder/env/bin/python" - <<'PYTHON'
import torch

layer = torch.nn.Embedding(4, 2, sparse=True)


def loss(ids, more_ids):
    return layer(ids).sum() + layer(more_ids).sum()


def gradient(backend):
    layer.zero_grad()
    output = torch.compile(loss, backend=backend)(torch.tensor([0, 1]), torch.tensor([1, 2]))
    try:
        output.backward()
    except AssertionError as error:
        return f"AssertionError: {error}".splitlines()[0]
    return layer.weight.grad.to_dense()[:, 0].tolist()


seen = {backend: gradient(backend) for backend in ("eager", "aot_eager", "inductor")}
for backend, result in seen.items():
    print(f"{backend}: {result}")
right = [1.0, 2.0, 1.0, 0.0]
raise SystemExit(not (seen["eager"] == seen["aot_eager"] == right and "stride 0==2" in seen["inductor"]))
PYTHON
