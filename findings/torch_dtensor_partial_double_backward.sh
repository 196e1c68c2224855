#!/usr/bin/env bash
# torch 2.13.0: the second derivative through DTensor.from_local(..., [Partial()]) differs from rank to rank.
#
# Expected: a term of a sum has the sum's gradient, so what flows back to that gradient in a second backward is a sum over
# the ranks, too: 9 and 24 on both ranks for terms of 3 and 8 on the first and twice that on the second.
# Seen: it is called replicated, and each rank keeps its own term: 3 and 8 on the first, 6 and 16 on the second. The
# first derivative is right. No error, no warning.
#
# Exits 0 while that is so, 1 once it has changed. Needs an x86-64 machine, python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > ranks.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


def second_derivative(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def total(term):
        return DTensor.from_local(term, mesh, [Partial()]).redistribute(placements=[Replicate()])

    factor = torch.tensor([1.0, 2.0])
    own = torch.tensor([3.0, 4.0]) * (rank + 1)
    weight = own.clone().requires_grad_()
    grad = distribute_tensor(torch.ones(2), mesh, [Replicate()]).requires_grad_()
    (grad_weight,) = torch.autograd.grad(total(weight * factor), weight, grad, create_graph=True)
    total((grad_weight * own).sum().view(1)).sum().backward()
    seen = [None, None]
    dist.all_gather_object(seen, (grad_weight.tolist(), grad.grad.to_local().tolist()))
    if rank == 0:
        for each, (first, second) in enumerate(seen):
            print(f"rank {each}: first derivative {first}, second {second}, placed as {grad.grad.placements}")
    dist.destroy_process_group()
    raise SystemExit(seen != [([1.0, 2.0], [3.0, 8.0]), ([1.0, 2.0], [6.0, 16.0])])


if __name__ == "__main__":
    torch.multiprocessing.spawn(second_derivative, (sys.argv[1],), nprocs=2)
PYTHON
"$folder/env/bin/python" ranks.py "$folder/store"
