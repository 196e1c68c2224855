#!/usr/bin/env bash
# Opacus 1.6.0 (torch 2.13.0, CPU): its rule for torch.nn.Embedding sets a flag of the whole process.
#
# Expected: a backward leaves torch.backends.cudnn.deterministic as it was, also for an empty batch, which Poisson
# sampling draws now and then; and per-sample gradients work beside torch's own test helpers.
# Seen:
# * after the backward of an empty batch the flag stays True for the rest of the process (after a full one it does not);
# * once torch.testing._internal.common_utils is imported, which freezes such flags, the backward raises RuntimeError.
#
# Exits 0 while that is so, 1 once it has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 opacus==1.6.0 expecttest==0.3.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import warnings

import torch
from opacus import GradSampleModule

warnings.simplefilter("ignore")


def flag_after(num_samples):
    """cudnn.deterministic after the backward of that many samples of two ids."""
    layer = GradSampleModule(torch.nn.Embedding(5, 2), loss_reduction="sum")
    layer(torch.zeros(num_samples, 2, dtype=torch.int64)).sum().backward()
    return torch.backends.cudnn.deterministic


seen = {"before": torch.backends.cudnn.deterministic, "full": flag_after(3), "empty": flag_after(0)}
import torch.testing._internal.common_utils

try:
    flag_after(3)
    seen["beside torch's helpers"] = "no error"
except RuntimeError as error:
    seen["beside torch's helpers"] = str(error).partition(";")[0]
print(seen)
expected = {
    "before": False,
    "full": False,
    "empty": True,
    "beside torch's helpers": "not allowed to set torch.backends.cudnn flags after disable_global_flags",
}
raise SystemExit(0 if seen == expected else f"changed: expected {expected}")
PYTHON
