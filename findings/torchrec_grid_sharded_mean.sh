#!/usr/bin/env bash
# TorchRec 1.9.2: the means of a table that is sharded as a grid come out as sums.
#
# Expected: how a table is sharded changes where its rows lie and never what a bag is; for tables by rows TorchRec divides
# behind the exchange.
# Seen: with grid_shard a bag of four equal rows is four times the row. By rows, by columns and by table it is the row. No
# error, no warning. Seen on gloo.
#
# Exits 0 while that is so, 1 once it has changed. Needs an x86-64 machine, python3 with venv, and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/env/bin/python" -m pip install --quiet --no-deps torchrec==1.9.2 fbgemm-gpu-cpu==1.8.0 torchmetrics==1.9.0 \
  tensordict==0.15.3 iopath==0.1.10 pyre-extensions==0.0.32 typing-inspect==0.9.0 mypy_extensions==1.2.0 pyvers==0.2.3 \
  cloudpickle==3.1.3 tqdm==4.70.1
cd "$folder"
cat > ranks.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan

WAYS = {
    "row_wise": row_wise(),
    "table_row_wise": table_row_wise(host_index=0),
    "column_wise": column_wise(ranks=[0, 1]),
    "table_wise": table_wise(rank=0),
    "grid_shard": grid_shard(host_indexes=[0]),
}


def mean_of_equal_rows(way, rank):
    """Of a bag of four rows of ones."""
    config = EmbeddingBagConfig(
        name="t", num_embeddings=8, embedding_dim=8, feature_names=["f"], pooling=PoolingType.MEAN
    )
    whole = EmbeddingBagCollection([config], device=torch.device("cpu"))
    torch.nn.init.ones_(whole.embedding_bags["t"].weight)
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        whole, {"t": WAYS[way]}, sharder=sharder, local_size=2, world_size=2, device_type="cpu"
    )
    model = DistributedModelParallel(
        whole,
        env=ShardingEnv(2, rank, dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"": plan}),
        sharders=[sharder],
    )
    state = model.state_dict()
    for shard in state["embedding_bags.t.weight"].local_shards():
        shard.tensor.fill_(1)
    bags = KeyedJaggedTensor(["f"], torch.tensor([1, 3, 5, 7]), lengths=torch.tensor([4]))
    return model(bags).wait()["f"].unique().tolist()


def compare(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    seen = {way: mean_of_equal_rows(way, rank) for way in WAYS}
    if rank == 0:
        for way, means in seen.items():
            print(f"{way}: the mean of four rows of ones is {means}")
    dist.destroy_process_group()
    # By rows it divides by the number of ids and a millionth.
    right = all(abs(mean - 1) < 1e-3 for way in WAYS for mean in seen[way] if way != "grid_shard")
    raise SystemExit(not (right and seen["grid_shard"] == [4.0]))


if __name__ == "__main__":
    torch.multiprocessing.spawn(compare, (sys.argv[1],), nprocs=2)
PYTHON
"$folder/env/bin/python" -W ignore ranks.py "$folder/store" 2>/dev/null
