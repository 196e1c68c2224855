"""Who is measured: one entry each. Nothing is imported before it is asked for.

To add a rival: a function that builds its lookup, and an entry in PROVIDERS.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_embed
from gpu_embed.backends.gradient_method import RULES

from .shapes import DTYPES, MODES, Cell

# A power of two, so that scaling a gradient by it rounds nothing.
LEARNING_RATE = 2.0**-10


@dataclass(frozen=True)
class Layer:
    """What a provider builds on a table."""

    lookup: Callable[[Tensor], Tensor]  # ids [N] -> [N, D], differentiable
    weight: Tensor  # the leaf that receives the gradient; as many elements as the table [V, D]
    # Forward, backward and SGD at LEARNING_RATE by the provider itself: (ids, grad_output).
    fused_step: Callable[[Tensor, Tensor], None] | None = None


Build = Callable[[Tensor, int | None, str], Layer]  # weight [V, D] (a leaf), padding_idx, mode


@dataclass(frozen=True)
class Provider:
    """One competitor: how to get it, what it can do, how to build it."""

    name: str
    description: str
    build: Build
    module: str = "torch"  # what it imports
    package: str = "torch"  # what pip calls it
    modes: tuple[str, ...] = MODES
    cpu: bool = False  # whether it runs on the CPU
    # Whether its gradient must be a sum in fp32, rounded once; else sums in the table's dtype are accepted.
    sums_in_fp32: bool = False
    requirement: Callable[[torch.device], str | None] = lambda device: None
    refusal: Callable[[Cell], str | None] = lambda cell: None
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext  # active while it runs
    # Whether it is a kernel of ours that the package does not choose, or not always: measured by `run` alone.
    candidate: bool = False

    def missing_reason(self, device: torch.device) -> str | None:
        """None where it can run on the device, else the reason in one sentence."""
        if device.type == "cpu" and not self.cpu:
            return "needs a CUDA device"
        return self.not_installed() or self.requirement(device)

    def not_installed(self) -> str | None:
        """None where its package can be imported, else the reason."""
        return _import_problem(self.module, self.package)

    def version(self) -> str:
        """The installed version, or an empty text."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def is_planned(self, cell: Cell, mode: str) -> bool:
        """Whether a run in which nobody asks for it by name has a row of it."""
        return mode in self.modes and not (self.candidate and self.refusal(cell))

    def refuses(self, cell: Cell, mode: str) -> str | None:
        """Why it cannot be asked for this cell; None: it can."""
        if mode not in self.modes:
            return f"measured in the mode {' and '.join(self.modes)} alone"
        return self.refusal(cell)


@cache
def _import_problem(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"not installed (pip install {package})"
    try:
        importlib.import_module(module)
    # A binary built for another torch fails in any way it likes.
    except Exception as error:
        return f"installed, but cannot be imported: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    """The error's name and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _torch(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    return Layer(lambda ids: F.embedding(ids, weight, padding_idx), weight)


def _torch_sparse(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    return Layer(lambda ids: F.embedding(ids, weight, padding_idx, sparse=True), weight)


def _torch_compile(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    # Each shape is compiled on its own; the former ones would count against the limit of recompilations.
    torch._dynamo.reset()

    @partial(torch.compile, fullgraph=True, dynamic=False)
    def lookup(ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table, padding_idx)

    return Layer(lambda ids: lookup(ids, weight), weight)


def _keep_buffers() -> AbstractContextManager[Any]:
    """A backward that is timed many times after one forward may not give its buffers away."""
    from torch._functorch import config

    patched: AbstractContextManager[Any] = config.patch(donated_buffer=False)
    return patched


def _compiler_missing(device: torch.device) -> str | None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs triton on CUDA"
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "torch.compile needs a C++ compiler on the CPU"
    return None


class IndexAddEmbedding(torch.autograd.Function):
    """torch's lookup, with zeros(V, D).index_add_(0, ids, grad) for a gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        ctx.padding_idx = padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        grad_weight = grad_outputs[0].new_zeros(ctx.shape).index_add_(0, ids, grad_outputs[0])
        if ctx.padding_idx is not None:
            grad_weight[ctx.padding_idx].zero_()
        return grad_weight, None, None


def _index_add(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    return Layer(lambda ids: IndexAddEmbedding.apply(weight, ids, padding_idx), weight)


def _liger(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    if padding_idx is None:
        apply = importlib.import_module(LIGER).LigerEmbeddingFunction.apply
        return Layer(lambda ids: apply(weight, ids), weight)
    # Its layer draws a table of its own: on the meta device that costs nothing.
    with torch.device("meta"):
        layer = importlib.import_module(
            "liger_kernel.transformers.experimental.embedding"
        ).LigerEmbedding(*weight.shape, padding_idx)
    layer.weight = weight
    return Layer(layer, weight)


def _flag_gems(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    gems = importlib.import_module(FLAG_GEMS)
    padding = -1 if padding_idx is None else padding_idx

    class GemsEmbedding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
            ctx.save_for_backward(ids)
            output: Tensor = gems.embedding(table, ids, padding)
            return output

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
            (ids,) = ctx.saved_tensors
            return gems.embedding_backward(grad_outputs[0], ids, len(weight), padding), None

    return Layer(lambda ids: GemsEmbedding.apply(weight, ids), weight)


def _fbgemm(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    """Its dense tables; for a step those whose backward is the SGD update."""
    training = importlib.import_module(FBGEMM)
    no_pooling = training.PoolingMode.NONE
    configs = importlib.import_module("fbgemm_gpu.split_embedding_configs")
    precision = {
        torch.float32: configs.SparseType.FP32,
        torch.float16: configs.SparseType.FP16,
    }[weight.dtype]
    num_embeddings, embedding_dim = weight.shape
    with torch.cuda.device(weight.device):
        if mode != "step":
            tables = training.DenseTableBatchedEmbeddingBagsCodegen(
                [(num_embeddings, embedding_dim)],
                pooling_mode=no_pooling,
                weights_precision=precision,
                output_dtype=precision,
            )
            tables.weights = torch.nn.Parameter(weight.detach().view(-1))
            return Layer(lambda ids: tables(ids, _one_id_a_bag(ids)), tables.weights)
        common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        tables = training.SplitTableBatchedEmbeddingBagsCodegen(
            [
                (
                    num_embeddings,
                    embedding_dim,
                    common.EmbeddingLocation.DEVICE,
                    training.ComputeDevice.CUDA,
                )
            ],
            pooling_mode=no_pooling,
            weights_precision=precision,
            output_dtype=precision,
            optimizer=configs.EmbOptimType.EXACT_SGD,
            learning_rate=LEARNING_RATE,
            stochastic_rounding=False,
        )
    own = tables.split_embedding_weights()[0]
    own.copy_(weight.detach())

    def lookup(ids: Tensor) -> Tensor:
        rows: Tensor = tables(ids, _one_id_a_bag(ids))
        return rows

    def step(ids: Tensor, grad_output: Tensor) -> None:
        lookup(ids).backward(grad_output)

    return Layer(lookup, own, step)


@cache
def _offsets(num_ids: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(num_ids + 1, dtype=dtype, device=device)


def _one_id_a_bag(ids: Tensor) -> Tensor:
    return _offsets(ids.numel(), ids.dtype, ids.device)


def _gpu_embed(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    return Layer(lambda ids: gpu_embed.functional.embedding(ids, weight, padding_idx), weight)


def _gpu_embed_sparse(weight: Tensor, padding_idx: int | None, mode: str) -> Layer:
    return Layer(
        lambda ids: gpu_embed.functional.embedding(ids, weight, padding_idx, sparse=True), weight
    )


def _small_ids(cell: Cell) -> str | None:
    """torch and most others look up int64 and int32 alone."""
    return None if cell.id_dtype in ("int64", "int32") else f"takes no {cell.id_dtype} ids"


def _short_addresses(cell: Cell) -> str | None:
    """Kernels that compute addresses in 32 bits read and write anywhere past 2^31 elements."""
    if max(cell.vocab, cell.num_ids) * cell.dim >= 2**31:
        return "its addresses are 32 bit"
    return _small_ids(cell)


def _fbgemm_tables(cell: Cell) -> str | None:
    if cell.dtype not in ("float32", "float16"):
        return f"its tables are not {cell.dtype}"
    if cell.dim % 4:
        return "its rows are a multiple of 4 numbers"
    if cell.padding:
        return "it has no padding_idx"
    return _small_ids(cell)


def _atomic_tables(cell: Cell) -> str | None:
    return None if cell.dtype in ("float32", "float64") else f"no atomics on {cell.dtype} tables"


def _descriptor_gradients(cell: Cell) -> str | None:
    if cell.dtype != "float32":
        return f"no bulk additions to {cell.dtype} tables"
    return _descriptor_rows(cell)


def _descriptor_rows(cell: Cell) -> str | None:
    if cell.dim * DTYPES[cell.dtype].itemsize % 16:
        return "its rows are a multiple of 16 bytes"
    return None


def _one_hot_tables(cell: Cell) -> str | None:
    rule = RULES["one_hot"]
    if DTYPES[cell.dtype] not in rule.dtypes:
        return f"its tables are not {cell.dtype}"
    if cell.vocab > rule.max_num_embeddings:
        return f"its tables have {rule.max_num_embeddings} rows at most"
    return None


def _needs_triton(device: torch.device) -> str | None:
    name = gpu_embed.backends.select(device).name
    return None if name == "triton" else f"needs the triton backend, {name} serves {device}"


def _needs_descriptors(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "tensor descriptors need compute capability 9.0"
    return _needs_triton(device)


def _gradient_candidate(
    method: str,
    description: str,
    refusal: Callable[[Cell], str | None],
    requirement: Callable[[torch.device], str | None] = lambda device: None,
) -> Provider:
    """This package, with a gradient kernel forced."""
    return Provider(
        f"gpu_embed-{method.replace('_', '-')}",
        f"this package, gradient by {description}",
        _gpu_embed,
        "gpu_embed",
        "gpu_embed",
        ("backward", "full", "step"),
        sums_in_fp32=True,
        requirement=requirement,
        refusal=refusal,
        setting=lambda: gpu_embed.use_gradient_method(method),
        candidate=True,
    )


def _gather_candidate(
    method: str,
    description: str,
    refusal: Callable[[Cell], str | None] = lambda cell: None,
    requirement: Callable[[torch.device], str | None] = lambda device: None,
) -> Provider:
    """This package, with a lookup kernel forced."""
    return Provider(
        f"gpu_embed-gather-{method}",
        f"this package, lookup by {description}",
        _gpu_embed,
        "gpu_embed",
        "gpu_embed",
        ("forward",),
        requirement=requirement,
        refusal=refusal,
        setting=lambda: gpu_embed.use_gather_method(method),
        candidate=True,
    )


LIGER = "liger_kernel.ops.experimental.embedding"
FLAG_GEMS = "flag_gems.ops.embedding"
FBGEMM = "fbgemm_gpu.split_table_batched_embeddings_ops_training"

# gpu_embed first: where a run is cut short, the others have something to be compared with.
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "gpu_embed",
            "this package, gradient kernel by its table",
            _gpu_embed,
            "gpu_embed",
            "gpu_embed",
            cpu=True,
            sums_in_fp32=True,
        ),
        Provider(
            "gpu_embed-atomic",
            "this package, gradient by atomics",
            _gpu_embed,
            "gpu_embed",
            "gpu_embed",
            ("backward", "full", "step"),
            sums_in_fp32=True,
            refusal=_atomic_tables,
            setting=lambda: gpu_embed.use_gradient_method("atomic"),
        ),
        Provider(
            "gpu_embed-sorted",
            "this package, gradient by sorted segments",
            _gpu_embed,
            "gpu_embed",
            "gpu_embed",
            ("backward", "full", "step"),
            sums_in_fp32=True,
            setting=lambda: gpu_embed.use_gradient_method("sorted"),
        ),
        _gradient_candidate(
            "sorted_atomic", "sorted segments, atomics at their edges", _atomic_tables
        ),
        _gradient_candidate(
            "descriptor", "tensor descriptors", _descriptor_gradients, _needs_descriptors
        ),
        _gradient_candidate("one_hot", "one-hot products", _one_hot_tables, _needs_triton),
        _gather_candidate("rows", "whole rows"),
        _gather_candidate("flat", "equal pieces of the output"),
        _gather_candidate("descriptor", "tensor descriptors", _descriptor_rows, _needs_descriptors),
        Provider(
            "gpu_embed-sparse",
            "this package, sparse=True",
            _gpu_embed_sparse,
            "gpu_embed",
            "gpu_embed",
            ("step",),
            cpu=True,
        ),
        Provider("torch", "torch.nn.functional.embedding", _torch, cpu=True, refusal=_small_ids),
        Provider(
            "torch-sparse",
            "the same, sparse=True",
            _torch_sparse,
            modes=("step",),
            cpu=True,
            refusal=_small_ids,
        ),
        Provider(
            "torch.compile",
            "torch.compile of the same, for fixed shapes",
            _torch_compile,
            cpu=True,
            requirement=_compiler_missing,
            refusal=_small_ids,
            setting=_keep_buffers,
        ),
        Provider(
            "index_add_",
            "gradient by zeros(V, D).index_add_",
            _index_add,
            modes=("backward", "full", "step"),
            cpu=True,
            refusal=_small_ids,
        ),
        Provider(
            "liger-kernel",
            "LigerEmbedding (experimental)",
            _liger,
            LIGER,
            "liger-kernel",
            refusal=_short_addresses,
        ),
        Provider(
            "flag-gems",
            "flag_gems.ops.embedding",
            _flag_gems,
            FLAG_GEMS,
            "flag-gems",
            refusal=_short_addresses,
        ),
        Provider(
            "fbgemm-gpu",
            "table batched embeddings, no pooling; a step is fused with SGD",
            _fbgemm,
            FBGEMM,
            "fbgemm-gpu",
            refusal=_fbgemm_tables,
        ),
    )
}
