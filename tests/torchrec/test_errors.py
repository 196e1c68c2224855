"""What the sharders refuse, on every rank alike, before anything is sharded."""

import re

import pytest
import torch
from collections_of_tables import CPU, FEATURES, bag_collection, shard
from commands import ROOT
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import DataType
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import BoundsCheckMode, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpu_embed.optim import SGD, RowWiseAdagrad
from gpu_embed.torchrec import (
    INSTALL,
    EmbeddingBagCollectionSharder,
    EmbeddingCollectionSharder,
)

PAGE = (ROOT / "docs/torchrec.md").read_text()
SHARDERS = [EmbeddingBagCollectionSharder, EmbeddingCollectionSharder]


@pytest.mark.parametrize("sharder", SHARDERS)
def test_an_optimizer_and_its_arguments_are_checked_at_once(sharder):
    with pytest.raises(TypeError, match="expected an optimizer of gpu_embed"):
        sharder(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        sharder(SGD, lr=-1)
    with pytest.raises(TypeError, match="betas"):
        sharder(RowWiseAdagrad, betas=(0.9, 0.9))
    with pytest.raises(TypeError, match=f"{sharder.__name__}: lr is for an optimizer, but none"):
        sharder(lr=0.1)
    made = SGD([torch.nn.Parameter(torch.zeros(1, 1))])
    for other in ({"learning_rate": 0.1}, "SGD", int, made):
        with pytest.raises(TypeError, match="expected an optimizer of gpu_embed"):
            sharder(other, lr=0.1)
    with pytest.raises(ValueError, match="scaler= looks for infinities in the rows of one rank"):
        sharder(SGD, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="micro_steps= counts"):
        sharder(SGD, micro_steps=2)
    with pytest.raises(ValueError, match="a rank has only some"):
        sharder(SGD, rows=[1])


def test_the_message_of_the_import_installs_what_the_page_and_make_do():
    made = re.search(r"torchrec_packages := (.*?)\n\n", (ROOT / "Makefile").read_text(), re.S)[1]
    made = set(made.replace("\\", "").split()) - {"fbgemm-gpu-cpu"} | {"fbgemm-gpu"}
    page = re.search(r"```\n(pip install --no-deps.*?)```", PAGE, re.DOTALL)
    for text in (
        page[1],
        INSTALL.partition("--no-deps ")[2].replace("(fbgemm-gpu-cpu without a GPU) ", ""),
    ):
        words = text.replace("pip install --no-deps", "").split()
        assert {word.partition("==")[0] for word in words} == made


def test_the_planner_is_offered_what_is_served():
    sharder = EmbeddingBagCollectionSharder(SGD)
    assert sharder.compute_kernels("table_wise", "cuda") == ["fused"]
    assert sharder.compute_kernels("data_parallel", "cuda") == ["dense"]
    assert EmbeddingBagCollectionSharder().compute_kernels("row_wise", "cuda") == ["dense"]


def refuses(make, error, words):
    with pytest.raises(error, match=words):
        make()


def no_optimizer():
    shard(bag_collection(), "row-wise", "fused", EmbeddingBagCollectionSharder())


def other_kernel():
    shard(bag_collection(), "row-wise", "fused_uvm", EmbeddingBagCollectionSharder(SGD))


def settings_of_fbgemm():
    sharder = EmbeddingBagCollectionSharder(SGD, fused_params={"learning_rate": 0.1})
    shard(bag_collection(), "row-wise", "fused", sharder)


def optimizer_of_a_parameter():
    whole, plan, sharder = planned()
    apply_optimizer_in_backward(torch.optim.SGD, whole.parameters(), {"lr": 0.1})
    DistributedModelParallel(whole, device=CPU, plan=plan, sharders=[sharder])


def bounds_check_of_fbgemm():
    whole, plan, sharder = planned()
    plan.plan[""]["few"].bounds_check_mode = BoundsCheckMode.WARNING
    DistributedModelParallel(whole, device=CPU, plan=plan, sharders=[sharder])


def planned():
    whole, sharder = bag_collection(), EmbeddingBagCollectionSharder(SGD)
    generators = {name: table_wise(rank=0) for name in whole.embedding_bags}
    plan = construct_module_sharding_plan(whole, generators, sharder, 2, 2, "cpu")
    return whole, ShardingPlan({"": plan}), sharder


def integer_outputs():
    sharder = EmbeddingBagCollectionSharder(SGD, fused_params={"output_dtype": DataType.INT8})
    shard(bag_collection(), "row-wise", "fused", sharder)


def integer_table():
    config = EmbeddingBagConfig(
        name="many",
        num_embeddings=4,
        embedding_dim=4,
        feature_names=["a"],
        data_type=DataType.INT8,
    )
    whole = EmbeddingBagCollection([config], device=torch.device("meta"))
    shard(whole, "table-wise", "fused", EmbeddingBagCollectionSharder(SGD))


def narrow_columns():
    tables = {"many": (11, 8, ["a", "c"])}
    sharder = EmbeddingBagCollectionSharder(SGD)
    shard(bag_collection(tables=tables), "columns on one rank", "fused", sharder)


def mean_by_grid():
    shard(bag_collection("mean"), "grid", "fused", EmbeddingBagCollectionSharder(SGD))


def weighted_means():
    whole = bag_collection("mean", weighted=True)
    shard(whole, "table-wise", "fused", EmbeddingBagCollectionSharder(SGD))


def a_feature_divided_for_one_table():
    # "b" looks up in "few" and "more".
    kinds = {"many": "row-wise", "few": "row-wise", "more": "table-wise"}
    shard(bag_collection("mean"), kinds, "fused", EmbeddingBagCollectionSharder(SGD))


def frozen_before():
    whole = bag_collection().requires_grad_(False)
    shard(whole, "row-wise", "fused", EmbeddingBagCollectionSharder(SGD))


def frozen_after():
    model = shard(bag_collection(), "row-wise", "fused", EmbeddingBagCollectionSharder(SGD))
    model.requires_grad_(False)


REFUSED = [
    (weighted_means, NotImplementedError, "table 'many' has weighted means"),
    (
        a_feature_divided_for_one_table,
        NotImplementedError,
        "feature 'b' looks up in the tables few",
    ),
    (frozen_before, NotImplementedError, "table 'many' is frozen"),
    (frozen_after, RuntimeError, "a sharded table cannot be frozen"),
    (no_optimizer, ValueError, "table 'many' has the compute kernel 'fused', whose optimizer is"),
    (other_kernel, NotImplementedError, "table 'many' has the compute kernel 'fused_uvm'"),
    (settings_of_fbgemm, ValueError, "table 'many' has TorchRec's settings learning_rate; an opt"),
    (optimizer_of_a_parameter, ValueError, "settings learning_rate, optimizer"),
    (bounds_check_of_fbgemm, ValueError, "settings bounds_check_mode"),
    (narrow_columns, NotImplementedError, r"column shards of the sizes \[\(11, 4\), \(11, 4\)\]"),
    (mean_by_grid, NotImplementedError, "leaves a grid-sharded mean undivided"),
    (integer_outputs, NotImplementedError, "table 'many' has the output_dtype torch"),
    (integer_table, NotImplementedError, "table 'many' is torch"),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED)
def test_refused_when_it_is_sharded(two, make, error, words):
    two.run(refuses, make, error, words)


def names_the_table_of_a_wrong_id():
    model = shard(bag_collection(), "column-wise", "fused", EmbeddingBagCollectionSharder(SGD))
    ids = torch.tensor([1, 3, 0, 0])  # "few" has 3 rows
    features = KeyedJaggedTensor(FEATURES, ids, lengths=torch.ones(4, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"feature 'b@few' \(table 'few'\)"):
        model(features).to_dict()


def test_a_wrong_id_is_named_with_its_table(two):
    two.run(names_the_table_of_a_wrong_id)
