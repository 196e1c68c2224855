#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.distributed.checkpoint cannot load the full state of an optimizer without tensors of state.
#
# Expected: get_optimizer_state_dict and set_optimizer_state_dict with StateDictOptions(full_state_dict=True) undo each
# other for every optimizer of torch.optim, plain SGD among them.
# Seen: for SGD with momentum they do; for plain SGD, whose state has no tensor, the second raises
# AssertionError: Expected device to be set. Without full_state_dict both load.
#
# Exits 0 while that is so, 1 once it has changed. Needs python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import warnings

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

warnings.simplefilter("ignore")


def loads(momentum, full):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    options = StateDictOptions(full_state_dict=full)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    try:
        set_optimizer_state_dict(model, optimizer, state, options=options)
    except AssertionError as error:
        return str(error)
    return "loads"


seen = {(momentum, full): loads(momentum, full) for momentum in (0.9, 0.0) for full in (False, True)}
print(seen)
expected = {
    (0.9, False): "loads",
    (0.9, True): "loads",
    (0.0, False): "loads",
    (0.0, True): "Expected device to be set",
}
raise SystemExit(0 if seen == expected else f"changed: expected {expected}")
PYTHON
