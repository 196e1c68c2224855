#!/usr/bin/env bash
# Opacus 1.6.0 (torch 2.13.0, CPU): the per-sample gradients of torch.nn.EmbeddingBag are not those of its bags.
#
# Expected: for each bag the gradient that torch's autograd gives for that bag alone.
# Seen, for bags given by ids and offsets:
# * mode "sum": an id that a bag holds twice counts once (2 by autograd, 1 by Opacus);
# * mode "mean": the same (1 by autograd, 0.5 by Opacus);
# * mode "max": zeros (1 by autograd, 0 by Opacus);
# * padding_idx: the padding gets a gradient (0 by autograd, 1 by Opacus).
# Clipping norms and noise of a private optimizer follow these numbers. No error, no warning.
#
# Exits 0 while that is so, 1 once it has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 opacus==1.6.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import warnings

import torch
from opacus import GradSampleModule

warnings.simplefilter("ignore")
ids, offsets = torch.tensor([1, 1, 2]), torch.tensor([0, 2])


def gradients(mode, padding_idx=None):
    """The first bag's gradient of row 1, by autograd and by Opacus."""
    layer = torch.nn.EmbeddingBag(3, 1, mode=mode, padding_idx=padding_idx)
    layer(ids[:2], offsets[:1]).sum().backward()
    alone = layer.weight.grad[1].item()
    layer.weight.grad = None
    wrapped = GradSampleModule(layer, loss_reduction="sum")
    wrapped(ids, offsets).sum().backward()
    return alone, layer.weight.grad_sample[0, 1].item()


seen = {
    "sum": gradients("sum"),
    "mean": gradients("mean"),
    "max": gradients("max"),
    "padding": gradients("sum", padding_idx=1),
}
print(seen)
expected = {"sum": (2.0, 1.0), "mean": (1.0, 0.5), "max": (1.0, 0.0), "padding": (0.0, 1.0)}
raise SystemExit(0 if seen == expected else f"changed: expected {expected}")
PYTHON
