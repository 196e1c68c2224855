#!/usr/bin/env bash
# torch 2.13.0: reset_parameters leaves the padding row of a sharded nn.Embedding as it was drawn.
#
# Expected: as of a plain layer, the row at padding_idx is zero afterwards; models that are made on the meta device and
# sharded before they are initialised rely on it.
# Seen: under fully_shard and under RowwiseParallel the row has random numbers. The layer fills weight[padding_idx], and
# that is a copy where rows are sharded. Under ColwiseParallel it is zero. No error, no warning.
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
import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

PADDING = 3


def is_zero(shard, mesh):
    with torch.device("meta"):
        layer = torch.nn.Embedding(11, 6, padding_idx=PADDING)
    shard(layer, mesh)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    return not layer.weight.full_tensor()[PADDING].any()


def compare(rank, store):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    seen = {
        "fully_shard": is_zero(lambda layer, mesh: fully_shard(layer, mesh=mesh), mesh),
        "RowwiseParallel": is_zero(lambda layer, mesh: parallelize_module(layer, mesh, RowwiseParallel()), mesh),
        "ColwiseParallel": is_zero(lambda layer, mesh: parallelize_module(layer, mesh, ColwiseParallel()), mesh),
    }
    if rank == 0:
        for name, zero in seen.items():
            print(f"{name}: the padding row is {'zero' if zero else 'not zero'}")
    dist.destroy_process_group()
    raise SystemExit(list(seen.values()) != [False, False, True])


if __name__ == "__main__":
    torch.multiprocessing.spawn(compare, (sys.argv[1],), nprocs=2)
PYTHON
"$folder/env/bin/python" ranks.py "$folder/store"
