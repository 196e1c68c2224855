#!/usr/bin/env bash
# torch 2.13.0 (CPU): GradScaler divides the gradients of tables whose rows are added twice by its scale.
#
# Two torch.nn.Embedding with sparse=True, whose outputs are added, as those of words and of their positions are.
# Expected: unscale_ leaves each table the gradient that the unscaled loss gives.
# Seen: the values of both sparse gradients are one memory, that of the gradient of the sum. unscale_ multiplies it in
# place once a table: with a scale of 4 and two tables the gradients are a quarter of what they should be, with three a
# sixteenth. No error, no warning; dense gradients are right.
#
# Exits 0 while that is so, 1 once it has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import torch

ids = torch.tensor([0, 1])


def unscaled(tables, sparse, scale):
    """The gradient of each table's row 0, after unscale_."""
    layers = [torch.nn.Embedding(4, 2, sparse=sparse) for _ in range(tables)]
    for layer in layers:
        torch.nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD([layer.weight for layer in layers], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(sum(layer(ids) for layer in layers).pow(2).sum() / 2).backward()
    scaler.unscale_(optimizer)
    return [layer.weight.grad.to_dense()[0, 0].item() for layer in layers]


seen = {
    "dense, two tables": unscaled(2, False, 4.0),
    "sparse, two tables, scale 1": unscaled(2, True, 1.0),
    "sparse, two tables": unscaled(2, True, 4.0),
    "sparse, three tables": unscaled(3, True, 4.0),
}
for name, gradients in seen.items():
    print(f"{name}: {gradients}")
expected = [[2.0] * 2, [2.0] * 2, [0.5] * 2, [3 / 16] * 3]
raise SystemExit(list(seen.values()) != expected)
PYTHON
