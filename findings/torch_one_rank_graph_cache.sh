#!/usr/bin/env bash
# torch 2.13.0: a graph that compile_on_one_rank made cannot run where Inductor's cache has it from an earlier process.
#
# Expected: the second run of a program is the first one with a warm cache, and gives the same.
# Seen: a sharded lookup under torch.compile is right in the first run. In the second it raises AttributeError: 'NoneType'
# object has no attribute 'get_group'. With TORCHINDUCTOR_FX_GRAPH_CACHE=0 both are right.
#
# Exits 0 while that is so, 1 once it has changed. Needs an x86-64 machine, g++, python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > ranks.py <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def lookup(rank, store):
    # One each: in a shared one the slower rank of the first run would already find the other's graph.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"cache{rank}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.config.compile_on_one_rank = True
    mesh = init_device_mesh("cpu", (2,))
    table = torch.arange(60.0).view(10, 6)
    weight = distribute_tensor(table, mesh, [Shard(0)])
    ids = distribute_tensor(torch.arange(10), mesh, [Replicate()])
    compiled = torch.compile(
        lambda i, w: torch.nn.functional.embedding(i, w).redistribute(placements=[Replicate()])
    )
    try:
        seen = "right" if torch.equal(compiled(ids, weight).to_local(), table) else "wrong"
    except AttributeError as error:
        seen = str(error).splitlines()[0]
    if rank == 0:
        print(seen)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(lookup, (sys.argv[1],), nprocs=2)
PYTHON
run() { "$folder/env/bin/python" -W ignore ranks.py "$folder/store$RANDOM" 2>/dev/null; }
cold=$(run)
warm=$(run)
without=$(TORCHINDUCTOR_FX_GRAPH_CACHE=0 run)
printf 'cold cache: %s\nwarm cache: %s\nno cache: %s\n' "$cold" "$warm" "$without"
[ "$cold" = right ] && [ "$warm" = "'NoneType' object has no attribute 'get_group'" ] && [ "$without" = right ]
