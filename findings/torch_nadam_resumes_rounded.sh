#!/usr/bin/env bash
# torch 2.13.0 (CPU): an NAdam of a bf16 parameter goes on otherwise once its state was saved and loaded.
#
# Expected: load_state_dict restores what state_dict saved, as it does for Adam, whose step stays fp32: a training that resumes
# is the one that was never interrupted.
# Seen: NAdam's mu_product, a number of the whole parameter in fp32, is cast to the parameter's dtype: 0.4501 becomes 0.4492 in
# bf16, and all later steps follow it. No error, no warning.
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


def after_one_step(optimizer_class):
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = optimizer_class([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def state_of_numbers(optimizer):
    (state,) = optimizer.state.values()
    return {name: (value.item(), value.dtype) for name, value in state.items() if value.dim() == 0}


changed = {}
for optimizer_class in (torch.optim.Adam, torch.optim.NAdam):
    saved, resumed = after_one_step(optimizer_class), after_one_step(optimizer_class)
    resumed.load_state_dict(saved.state_dict())
    before, after = state_of_numbers(saved), state_of_numbers(resumed)
    print(f"{optimizer_class.__name__}: saved {before}, resumed {after}")
    changed[optimizer_class.__name__] = [name for name in before if before[name] != after[name]]
raise SystemExit(0 if changed == {"Adam": [], "NAdam": ["mu_product"]} else "changed")
PYTHON
