"""TorchRec's sharded collections on our kernels: sharders whose lookups are batched tables of this package.

    import gpu_embed.torchrec

    sharder = gpu_embed.torchrec.EmbeddingBagCollectionSharder(optimizer=gpu_embed.optim.RowWiseAdagrad, lr=0.05)
    model = DistributedModelParallel(model, sharders=[sharder])

The planner, the exchange of ids and rows, the optimizers' keyed view and the state_dict are TorchRec's. Tables of the
compute kernels "dense" and "fused" are looked up here; data-parallel ones stay with TorchRec.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from .dtypes import FLOATS
from .nn.tables import BatchedTables, TableBatchedEmbedding, TableBatchedEmbeddingBag
from .optim import RowOptimizer, apply_in_backward
from .row_update import STATE
from .tables.layout import TABLE_ALIGNMENT
from .tables.parameter import TableSlice

# The releases whose lookups, shardings and optimizer view this file fits.
KNOWN = ("1.9.2",)
VERSION = KNOWN[-1]
INSTALL = (
    f"make torchrec in a clone, or pip install --no-deps torchrec=={VERSION} fbgemm-gpu==1.8.0 (fbgemm-gpu-cpu "
    "without a GPU) torchmetrics tensordict pyvers cloudpickle iopath pyre-extensions typing-inspect "
    "mypy_extensions tqdm"
)
try:
    found = metadata.version("torchrec").partition("+")[0]
except metadata.PackageNotFoundError:
    raise ImportError(f"gpu_embed.torchrec needs TorchRec: {INSTALL}", name="torchrec") from None
if found not in KNOWN:
    raise ImportError(
        f"gpu_embed.torchrec knows TorchRec {', '.join(KNOWN)}, found {found}: {INSTALL}",
        name="torchrec",
    )

from fbgemm_gpu.split_embedding_configs import SparseType  # noqa: E402
from torchrec.distributed import embedding, embeddingbag  # noqa: E402
from torchrec.distributed.batched_embedding_kernel import (  # noqa: E402
    BaseBatchedEmbedding,
    BaseBatchedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.embedding_lookup import (  # noqa: E402
    GroupedEmbeddingsLookup,
    GroupedPooledEmbeddingsLookup,
)
from torchrec.distributed.embedding_sharding import (  # noqa: E402
    EmbeddingSharding,
    EmbeddingShardingInfo,
)
from torchrec.distributed.embedding_types import (  # noqa: E402
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
)
from torchrec.distributed.types import (  # noqa: E402
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingEnv2D,
    ShardingType,
)
from torchrec.distributed.utils import append_prefix  # noqa: E402
from torchrec.modules.embedding_configs import (  # noqa: E402
    PoolingMode,
    PoolingType,
    data_type_to_dtype,
)
from torchrec.optim.fused import (  # noqa: E402
    EmptyFusedOptimizer,
    FusedOptimizer,
    FusedOptimizerModule,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402

__all__ = ["EmbeddingBagCollectionSharder", "EmbeddingCollectionSharder"]

SERVED = (EmbeddingComputeKernel.DENSE, EmbeddingComputeKernel.FUSED)
# TorchRec's settings for a table that mean something here, or nothing with tables in the device's memory.
SETTINGS = frozenset({"output_dtype", "enforce_hbm", "use_one_tbe_per_table", "_batch_key"})
# By these a table has rows on several ranks.
BY_ROWS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
MODES = {PoolingMode.SUM: "sum", PoolingMode.MEAN: "mean"}


# What `apply_in_backward` takes, and why a sharder does not.
NOT_ON_RANKS = {
    "rows": "names rows of one table, and a rank has only some",
    "scaler": "looks for infinities in the rows of one rank, and the ranks' scales would part; train in bfloat16",
    "micro_steps": "counts the backward passes of each group of tables for itself; accumulate with tables of the "
    "compute kernel 'dense'",
}


class _SharderOptimizer:
    """The optimizer that a sharder was given, to be applied in backward."""

    def __init__(
        self, sharder: str, optimizer: type[RowOptimizer] | None, arguments: dict[str, Any]
    ) -> None:
        self.sharder, self.optimizer, self.arguments = sharder, optimizer, arguments
        if optimizer is None:
            if arguments:
                raise TypeError(
                    f"{sharder}: {', '.join(arguments)} is for an optimizer, but none was given; add "
                    "optimizer=gpu_embed.optim.RowWiseAdagrad, for one"
                )
            return
        if not (isinstance(optimizer, type) and issubclass(optimizer, RowOptimizer)):
            raise TypeError(
                f"{sharder}: expected an optimizer of gpu_embed.optim, such as gpu_embed.optim.RowWiseAdagrad, got "
                f"{optimizer!r}; its arguments, such as lr=0.05, follow by name, and fused_params too"
            )
        for name, why in NOT_ON_RANKS.items():
            if arguments.get(name) is not None:
                raise ValueError(f"{sharder}: {name}= {why}")
        # Every error of an argument, before anything is sharded.
        apply_in_backward([nn.Parameter(torch.zeros(1, 1, device="cpu"))], optimizer, **arguments)

    def check(self, infos: list[EmbeddingShardingInfo], env: ShardingEnv) -> None:
        """Raise, on every rank alike, for tables that the kernels here do not serve."""
        if isinstance(env, ShardingEnv2D):
            # Its sync() takes the mean of FBGEMM's tables, and of no others.
            raise NotImplementedError(
                f"{self.sharder}: 2D parallelism (DMPCollection) is not supported; use TorchRec's own sharder"
            )
        for info in infos:
            config, kernel = info.embedding_config, info.param_sharding.compute_kernel
            where = f"{self.sharder}: table {config.name!r}"
            if kernel not in {one.value for one in SERVED}:
                raise NotImplementedError(
                    f"{where} has the compute kernel {kernel!r}, but only 'dense' and 'fused' are served; constrain "
                    "the planner to these, or use TorchRec's own sharder"
                )
            dtype = data_type_to_dtype(config.data_type)
            if dtype not in FLOATS:
                raise NotImplementedError(
                    f"{where} is {dtype}; served are float32, float16 and bfloat16"
                )
            if config.use_virtual_table or config.enable_embedding_update:
                raise NotImplementedError(
                    f"{where} is virtual, or updated by writes, which only TorchRec's own sharder serves"
                )
            unknown = sorted(set(info.fused_params or ()) - SETTINGS)
            if unknown:
                raise ValueError(
                    f"{where} has TorchRec's settings {', '.join(unknown)}; an optimizer and its arguments go to the "
                    f"sharder, {self.sharder}(optimizer=gpu_embed.optim.RowWiseAdagrad, lr=0.05), and others of "
                    "FBGEMM are not supported"
                )
            output_dtype = _output_dtype(info.fused_params)
            if output_dtype not in FLOATS or output_dtype != _output_dtype(infos[0].fused_params):
                raise NotImplementedError(
                    f"{where} has the output_dtype {output_dtype}; served are float32, float16 and bfloat16, and "
                    "one of them for all tables of a kind of sharding"
                )
            if not info.param.requires_grad:
                raise NotImplementedError(
                    f"{where} is frozen, which a sharded table cannot be; keep it in a collection that is not sharded, "
                    "or update it by SGD with lr=0"
                )
            is_grid = info.param_sharding.sharding_type == ShardingType.GRID_SHARD.value
            if is_grid and config.pooling == PoolingType.MEAN:
                raise NotImplementedError(
                    f"{where}: TorchRec {found} leaves a grid-sharded mean undivided; take row-wise or column-wise "
                    "sharding, or sums"
                )
            if config.is_weighted and config.pooling == PoolingType.MEAN:
                raise NotImplementedError(
                    f"{where} has weighted means, which TorchRec divides by the sum of the weights where rows lie on "
                    "several ranks, and by their number elsewhere; take weighted sums"
                )
            _check_columns(where, info.param_sharding)
            if kernel == EmbeddingComputeKernel.FUSED.value and self.optimizer is None:
                raise ValueError(
                    f"{where} has the compute kernel 'fused', whose optimizer is the sharder's: give it one, "
                    f"{self.sharder}(optimizer=gpu_embed.optim.RowWiseAdagrad, lr=0.05)"
                )


def _check_columns(where: str, sharding: ParameterSharding) -> None:
    """Raise for several column shards on one rank that cannot be one parameter, as TorchRec wants them."""
    sizes: dict[Any, list[tuple[int, ...]]] = {}
    for one in getattr(sharding.sharding_spec, "shards", ()):
        sizes.setdefault(str(one.placement), []).append(tuple(one.shard_sizes))
    for rank, shards in sizes.items():
        rows, dim = shards[0]
        if len(shards) > 1 and (len(set(shards)) > 1 or rows * dim % TABLE_ALIGNMENT):
            raise NotImplementedError(
                f"{where} has column shards of the sizes {shards} on {rank}; several on one rank must have one width, "
                f"a multiple of {TABLE_ALIGNMENT}"
            )


# One group of tables on one rank.


class _Group(nn.Module):
    """A group's tables, with what TorchRec asks of FBGEMM's module of tables."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        mode: str | None,
        device: torch.device | None,
        chosen: _SharderOptimizer | None,
    ) -> None:
        super().__init__()
        tables = config.embedding_tables
        # Several column shards of a table may lie here, and a feature may look up in several tables.
        names = _distinct(table.name for table in tables)
        pairs = [
            (feature, name)
            for name, table in zip(names, tables, strict=True)
            for feature in table.feature_names
        ]
        # A table may list a feature twice.
        keys = _distinct(f"{feature}@{name}" for feature, name in pairs)
        features = {key: name for key, (_, name) in zip(keys, pairs, strict=True)}
        sizes = {
            name: (table.local_rows, table.local_cols)
            for name, table in zip(names, tables, strict=True)
        }
        kind: dict[str, Any] = {
            "sparse": chosen is not None,
            "dtype": data_type_to_dtype(config.data_type),
            "features": features,
            "output_dtype": _output_dtype(config.fused_params),
            # TorchRec draws the rows.
            "device": "meta",
        }
        self.layer: BatchedTables
        if mode is None:
            self.layer = TableBatchedEmbedding(sizes, **kind)
        else:
            self.layer = TableBatchedEmbeddingBag(sizes, mode, **kind)
        self.layer._set_buffer(
            torch.zeros(self.layer.layout.buffer_shape, dtype=kind["dtype"], device=device or "cpu")
        )
        self.updates = None
        if chosen is not None:
            assert chosen.optimizer is not None
            # A learning rate that is a tensor is this group's own, as TorchRec sets each group's.
            own: dict[str, Any] = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in chosen.arguments.items()
            }
            self.updates = apply_in_backward(self.layer, chosen.optimizer, **own)

    def forward(self, features: KeyedJaggedTensor, weights: Tensor | None) -> Tensor:
        sizes = features.stride_per_key() if features.variable_stride_per_key() else None
        output: Tensor = self.layer(
            features.values(), features.offsets(), weights, batch_sizes=sizes
        )
        return output

    def split_embedding_weights(self) -> list[Tensor]:
        whole = self.layer.weight.detach()
        return [self.layer.layout.view(whole, number) for number in range(len(self.layer))]

    def slices(self, tables: list[ShardedEmbeddingTable]) -> dict[str, _TableParameter]:
        """A parameter for each table, of its shards one under another, as TorchRec loads them."""
        layout, whole = self.layer.layout, self.layer.weight
        numbers: dict[str, list[int]] = {}
        for number, table in enumerate(tables):
            numbers.setdefault(table.name, []).append(number)
        slices = {}
        for name, (first, *others) in numbers.items():
            # They lie side by side: `_check_columns`.
            rows, dim = layout.num_embeddings[first], layout.embedding_dims[first]
            count = len(others) + 1
            part = layout.row_range(first, first + count)._replace(shape=(count * rows, dim))
            slices[name] = _TableParameter(whole, part)
        return slices

    # Of a fused optimizer.

    @property
    def _settings(self) -> dict[str, Any]:
        assert self.updates is not None
        return self.updates.optimizer.param_groups[0]

    @property
    def _state(self) -> dict[str, Any]:
        """The optimizer's state of all tables, made if there is none."""
        assert self.updates is not None
        optimizer, group = self.updates.optimizer, self._settings
        return optimizer._state_of(group, self.layer.weight, STATE[optimizer._formula(group)])

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Of each table its part of each kind of state, such as "sum"."""
        assert self.updates is not None
        layout, state = self.layer.layout, self._state
        whole = layout.row_range(0, len(self.layer))
        parts: list[dict[str, Tensor]] = [{} for _ in layout.names]
        for kind in STATE[self.updates.optimizer._formula(self._settings)]:
            views = whole.views(state[kind.name], kind.per_row)
            for part, view in zip(parts, views.values(), strict=True):
                part[kind.name] = view
        return parts

    @property
    def counts_steps(self) -> bool:
        """Whether an update depends on how many came before."""
        assert self.updates is not None
        return self.updates.optimizer._depends_on_step(self._settings)

    @property
    def step(self) -> int:
        return int(self._state["step"])

    def set_optimizer_step(self, step: int) -> None:
        self._state["step"] = step

    def get_learning_rate(self) -> float:
        return float(self._settings["lr"])

    def set_learning_rate(self, lr: float) -> None:
        if isinstance(self._settings["lr"], Tensor):
            self._settings["lr"].fill_(lr)
        else:
            self._settings["lr"] = lr


class _TableParameter(TableSlice):
    """A table's rows as a parameter of TorchRec's, whose dense gradient can be set as well."""

    def requires_grad_(self, requires_grad: bool = True) -> _TableParameter:
        """RuntimeError for False: the rows are part of their group's one parameter."""
        if not requires_grad:
            raise RuntimeError(
                "a sharded table cannot be frozen; keep it in a collection that is not sharded, or update it by SGD "
                "with lr=0"
            )
        return self

    @property
    def grad(self) -> Tensor | None:
        # What was set counts until there is a gradient.
        own, self.zeros = self.zeros, None
        try:
            whole = TableSlice.grad.fget(self)  # type: ignore[attr-defined]
        finally:
            self.zeros = own
        return own if whole is None else whole

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.zeros = None
        if value is None:
            self.parent.grad = None
        elif self.parent.grad is not None:
            part = self.grad
            assert part is not None
            part.copy_(value)
        else:
            self.zeros = value


class _KeyedState(EmbeddingFusedOptimizer):
    """TorchRec's view of an optimizer that is applied in backward; the state is the optimizer's memory."""

    def __init__(self, config: GroupedEmbeddingConfig, group: _Group, pg: Any) -> None:
        self._group = group
        super().__init__(config, group, pg)

    @property
    def state(self) -> Any:
        if self._group.counts_steps:
            # New tensors, as a checkpoint may have been read into those that were given out before.
            for weight, key in self._step_keys():
                self._keyed[weight][key] = torch.tensor(self._group.step, device="cpu")
        return self._keyed

    @state.setter
    def state(self, value: Any) -> None:
        self._keyed = value

    def _step_keys(self) -> list[tuple[Any, str]]:
        names = (key.removesuffix(".weight").rpartition(".")[2] for key in self.params)
        return [
            (weight, f"{name}.step")
            for weight, name in zip(self.params.values(), names, strict=True)
        ]

    def post_load_state_dict(self) -> None:
        if not self._group.counts_steps:
            return
        steps = {int(self._keyed[weight][key]) for weight, key in self._step_keys()}
        if len(steps) > 1:
            raise ValueError(
                f"tables of one group were saved with different steps, {sorted(steps)}, and are updated as one"
            )
        self._group.set_optimizer_step(*steps)


class _Kernel:
    """What the four kernels are: a group's tables in TorchRec's place for FBGEMM's."""

    _config: GroupedEmbeddingConfig
    _emb_module: _Group

    def _fill(
        self, mode: str | None, device: torch.device | None, chosen: _SharderOptimizer | None
    ) -> None:
        self._emb_module = _Group(self._config, mode, device, chosen)
        self._param_per_table = self._emb_module.slices(self._config.embedding_tables)
        self.init_parameters()  # type: ignore[attr-defined]  # the base's

    @property
    def emb_module(self) -> Any:
        return self._emb_module

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        yield from ()


class _Dense(_Kernel):
    """Dense gradients, for an optimizer of the user's."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        names = "/".join(table.name for table in self._config.embedding_tables)
        yield append_prefix(prefix, f"{names}.weight"), self._emb_module.layer.weight


class _Fused(_Kernel, FusedOptimizerModule):
    """Updates in backward."""

    _pg: Any

    def _fill(
        self, mode: str | None, device: torch.device | None, chosen: _SharderOptimizer | None
    ) -> None:
        super()._fill(mode, device, chosen)
        self._optim = _KeyedState(self._config, self._emb_module, self._pg)
        for part in self._param_per_table.values():
            # By this TorchRec leaves them out of other optimizers.
            part._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        return self._optim

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        named = self.named_split_embedding_weights(prefix)
        for name, rows in named:
            part = nn.Parameter(rows)
            part._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
            yield name, part


class _SequenceKernel(BaseBatchedEmbedding):
    """A row an id."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: Any,
        device: torch.device | None,
        chosen: _SharderOptimizer | None,
    ) -> None:
        super().__init__(config, pg, device)
        self._fill(None, device, chosen)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self._emb_module(features, None)


class _BagKernel(BaseBatchedEmbeddingBag):
    """A sum or mean a bag."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: Any,
        device: torch.device | None,
        sharding_type: ShardingType | None,
        chosen: _SharderOptimizer | None,
    ) -> None:
        super().__init__(config, pg, device, sharding_type)
        self._fill(MODES[self._pooling], device, chosen)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        weights = features.weights_or_none() if self._config.is_weighted else None
        if weights is not None:
            weights = weights.to(self._emb_module.layer.weight.dtype)
        output = self._emb_module(features, weights)
        if not features.variable_stride_per_key():
            return output
        # By ranks, then by features, a row a bag: what the exchange sends to each rank.
        sizes = features.stride_per_key_per_rank()
        parts = self._emb_module.layer.split(output, features.stride_per_key())
        blocks = [part.split(of_ranks) for part, of_ranks in zip(parts, sizes, strict=True)]
        return torch.cat(
            [block.reshape(-1) for of_rank in zip(*blocks, strict=True) for block in of_rank]
        )


class _DenseSequences(_Dense, _SequenceKernel):
    pass


class _FusedSequences(_Fused, _SequenceKernel):
    pass


class _DenseBags(_Dense, _BagKernel):
    pass


class _FusedBags(_Fused, _BagKernel):
    pass


# All groups of one sharding on one rank.


class _SequenceLookup(GroupedEmbeddingsLookup):
    def __init__(self, chosen: _SharderOptimizer, **arguments: Any) -> None:
        self._chosen = chosen  # read by the base's constructor
        super().__init__(**arguments)

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: Any,
        device: torch.device | None,
        env: ShardingEnv | None = None,
    ) -> _SequenceKernel:
        if config.compute_kernel == EmbeddingComputeKernel.DENSE:
            return _DenseSequences(config, pg, device, None)
        return _FusedSequences(config, pg, device, self._chosen)


class _BagLookup(GroupedPooledEmbeddingsLookup):
    def __init__(self, chosen: _SharderOptimizer, **arguments: Any) -> None:
        self._chosen = chosen
        super().__init__(**arguments)

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: Any,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> _BagKernel:
        if config.compute_kernel == EmbeddingComputeKernel.DENSE:
            return _DenseBags(config, pg, device, sharding_type, None)
        return _FusedBags(config, pg, device, sharding_type, self._chosen)

    def _forward_with_vbe_merging(
        self, features_by_group: list[KeyedJaggedTensor], device: torch.device
    ) -> Tensor:
        """Groups of tables with a batch size for each feature; FBGEMM's write into one output."""
        splits = self._vbe_splits(features_by_group)
        merged: Tensor = self._merge_variable_batch_embeddings(
            self._forward(features_by_group), splits
        )
        return merged


def _serve(
    sharding: Any,
    infos: list[EmbeddingShardingInfo],
    env: ShardingEnv,
    lookup: type[_SequenceLookup | _BagLookup],
    chosen: _SharderOptimizer,
    **arguments: Any,
) -> Any:
    """Let a sharding of TorchRec's make our lookup; a data-parallel one makes TorchRec's."""
    if infos[0].param_sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
        return sharding
    chosen.check(infos, env)

    def create_lookup(
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: Any = None,
    ) -> nn.Module:
        more = {} if feature_processor is None else {"feature_processor": feature_processor}
        made = lookup(
            chosen,
            grouped_configs=sharding._grouped_embedding_configs_per_rank[sharding._rank],
            pg=sharding._pg,
            device=sharding._device if device is None else device,
            env=sharding._env,
            **arguments,
            **more,
        )
        # A rank without tables sends no rows, in the dtype of the others'.
        nothing = made._dummy_embs_tensor.detach().to(_output_dtype(infos[0].fused_params))
        made._dummy_embs_tensor = nothing.requires_grad_()
        return made

    sharding.create_lookup = create_lookup
    return sharding


class ShardedEmbeddingBagCollection(embeddingbag.ShardedEmbeddingBagCollection):
    """TorchRec's, whose lookups are ours. A sharder makes it."""

    def __init__(self, *arguments: Any, chosen: _SharderOptimizer, **named: Any) -> None:
        self._chosen = chosen  # read by the base's constructor
        super().__init__(*arguments, **named)
        kinds = {name: one.sharding_type for name, one in self.module_sharding_plan.items()}
        tables_of: dict[str, list[Any]] = {}
        for config in self._embedding_bag_configs:
            for feature in config.feature_names:
                tables_of.setdefault(feature, []).append(config)
        for feature, configs in tables_of.items():
            divided = [
                config.pooling == PoolingType.MEAN and kinds[config.name] in BY_ROWS
                for config in configs
            ]
            if any(divided) and not all(divided):
                names = ", ".join(config.name for config in configs)
                raise NotImplementedError(
                    f"feature {feature!r} looks up in the tables {names}, of which some are means by rows: TorchRec "
                    f"{VERSION} divides all of a feature's bags, or none; shard these tables in one way"
                )
        # Behind the exchange TorchRec divides every feature but these. Means of whole tables are divided before.
        self._pooling_type_to_rs_features[PoolingType.SUM.value] += [
            feature
            for config in self._embedding_bag_configs
            if kinds[config.name] not in BY_ROWS
            for feature in config.feature_names
        ]

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        """Without weights where the collection has none: TorchRec would divide means by them."""
        if not self._is_weighted and features.weights_or_none() is not None:
            features = copy.copy(features)
            features._weights = None
        return super().input_dist(ctx, features)

    def create_embedding_bag_sharding(  # a classmethod there
        self,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> EmbeddingSharding[Any, Any, Any, Any]:
        sharding = super().create_embedding_bag_sharding(
            sharding_infos, env, device, permute_embeddings, qcomm_codecs_registry
        )
        # By this a mean of rows on several ranks is a sum here, which is divided behind the exchange.
        kind = ShardingType(sharding_infos[0].param_sharding.sharding_type)
        return _serve(sharding, sharding_infos, env, _BagLookup, self._chosen, sharding_type=kind)


class ShardedEmbeddingCollection(embedding.ShardedEmbeddingCollection):
    """TorchRec's, whose lookups are ours. A sharder makes it."""

    def __init__(self, *arguments: Any, chosen: _SharderOptimizer, **named: Any) -> None:
        self._chosen = chosen
        super().__init__(*arguments, **named)

    def create_embedding_sharding(
        self,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> EmbeddingSharding[Any, Any, Any, Any]:
        sharding = super().create_embedding_sharding(
            sharding_type, sharding_infos, env, device, qcomm_codecs_registry
        )
        return _serve(sharding, sharding_infos, env, _SequenceLookup, self._chosen)


class _Sharder:
    """What both sharders are."""

    _chosen: _SharderOptimizer
    # What the one takes that the other does not.
    _options: dict[str, Any]

    def shard(
        self,
        module: nn.Module,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:
        return self.sharded_module_type(  # type: ignore[attr-defined]
            module,
            params,
            env,
            self.fused_params,  # type: ignore[attr-defined]
            device,
            chosen=self._chosen,
            qcomm_codecs_registry=self.qcomm_codecs_registry,  # type: ignore[attr-defined]
            module_fqn=module_fqn,
            **self._options,
        )

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """TorchRec's choice for its planner, of what is served here; "dense" where there is no optimizer."""
        if self._chosen.optimizer is None:
            return [EmbeddingComputeKernel.DENSE.value]
        all_of_them = super().compute_kernels(sharding_type, compute_device_type)  # type: ignore[misc]
        return [one for one in all_of_them if one in {kernel.value for kernel in SERVED}]


class EmbeddingBagCollectionSharder(_Sharder, embeddingbag.EmbeddingBagCollectionSharder):
    """TorchRec's `EmbeddingBagCollectionSharder`, whose tables are looked up and updated by this package.

    For `torchrec.distributed.DistributedModelParallel(model, sharders=[sharder])`. Plan, exchange, outputs and
    state_dict are TorchRec's. A table of the compute kernel "fused" is updated in backward by `optimizer`, one of
    "dense" gets a dense `.grad`; data-parallel tables are TorchRec's.

    Args:
        optimizer: a class of `gpu_embed.optim`; needed for tables of the compute kernel "fused".
        arguments: what it takes beside the parameters, such as lr=0.05.
        fused_params: of TorchRec's only "output_dtype", fp32 unless it says otherwise, and what says how tables are
            grouped.
        qcomm_codecs_registry, sharded_module_order_overwrite: as for TorchRec's.

    `model.fused_optimizer` is TorchRec's keyed view of all of them. Its `param_groups` have the lr, which its `step()`
    and `zero_grad()` put into effect. Its `state_dict()` has "embedding_bags.name.weight" with "name.momentum1", the
    first kind of state, and others by their own names, as ShardedTensors or DTensors in the optimizer's memory; and
    "name.step" where updates depend on it (Adam), which FBGEMM's has not. With column-wise shards a row of
    `RowWiseAdagrad` has a sum for each shard, as in FBGEMM, so that it is loaded with as many shards only.

    Raises:
        TypeError, ValueError: what `optimizer` or `apply_in_backward` refuses; when it is sharded, a fused table and
            no optimizer, or settings of FBGEMM.
        NotImplementedError: when it is sharded, another compute kernel or dtype; two column shards of a table on one
            rank that do not lie side by side.
    """

    def __init__(
        self,
        optimizer: type[RowOptimizer] | None = None,
        *,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, sharded_module_order_overwrite)
        self._chosen = _SharderOptimizer(type(self).__name__, optimizer, arguments)
        self._options = {"sharded_module_order_overwrite": sharded_module_order_overwrite}

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingBagCollection]:
        return ShardedEmbeddingBagCollection


class EmbeddingCollectionSharder(_Sharder, embedding.EmbeddingCollectionSharder):
    """TorchRec's `EmbeddingCollectionSharder`, whose tables are looked up and updated by this package.

    Arguments, state and errors as for `EmbeddingBagCollectionSharder`, with keys "embeddings.name.weight".

    Args:
        use_index_dedup: TorchRec's: make ids distinct before they are exchanged.
    """

    def __init__(
        self,
        optimizer: type[RowOptimizer] | None = None,
        *,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, use_index_dedup)
        self._chosen = _SharderOptimizer(type(self).__name__, optimizer, arguments)
        self._options = {"use_index_dedup": use_index_dedup}

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingCollection]:
        return ShardedEmbeddingCollection


def _distinct(names: Iterable[str]) -> list[str]:
    """The names; those that come again with a number."""
    taken: dict[str, int] = {}
    made = []
    for name in names:
        count = taken[name] = taken.get(name, -1) + 1
        made.append(f"{name}#{count}" if count else name)
    return made


def _output_dtype(settings: dict[str, Any] | None) -> torch.dtype:
    """Of a table's settings; fp32 by itself, as FBGEMM's."""
    given = (settings or {}).get("output_dtype", SparseType.FP32)
    dtype: torch.dtype = given if isinstance(given, torch.dtype) else given.as_dtype()
    return dtype
