"""Who is measured: one entry each. Nothing is imported before it is asked for.

To add a rival: a function that builds its lookup, and an entry in PROVIDERS.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_embed
from gpu_embed import bounds

from . import many_tables, optimizers
from .candidates import launch as candidates
from .layer import Layer
from .optimizers import Update
from .shapes import DTYPES, MODES, STEPS, Cell

Build = Callable[[Tensor, Cell, str], Layer]  # weight [T * V, D] (a leaf), cell, mode
# Whoever brings no optimizer takes a step of SGD.
WITHOUT_OPTIMIZER = ("forward", "backward", "full", "step")


@dataclass(frozen=True)
class Provider:
    """One competitor: how to get it, what it can do, how to build it."""

    name: str
    description: str
    build: Build
    module: str = "torch"  # what it imports
    package: str = "torch"  # what pip calls it
    modes: tuple[str, ...] = WITHOUT_OPTIMIZER
    cpu: bool = False  # whether it runs on the CPU
    cuda: bool = True  # whether it runs on CUDA devices
    # What it holds in a step beside the table, in tables: the gradient, or a copy.
    tables_beside: int = 1
    # Whether it makes a table of its own in the other modes too.
    copies: bool = False
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
        if device.type == "cuda" and not self.cuda:
            return "runs on the CPU alone"
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
            return f"measured in {', '.join(self.modes)} alone"
        if mode in STEPS and mode != "step" and cell.dtype not in ("float32", "float64"):
            return f"optimizers are checked on float32 and float64 tables, not on {cell.dtype}"
        return self.refusal(cell)


@cache
def _import_problem(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"not installed (pip install {package})"
    try:
        with _quiet():
            importlib.import_module(module)
    # A binary built for another torch fails in any way it likes.
    except Exception as error:
        reason = first_line(_first_cause(error))
        if "undefined symbol" in reason:
            library = reason.partition(": undefined symbol")[0].rpartition("/")[2]
            return f"installed, but built for another torch than {torch.__version__} ({library})"
        return f"installed, but cannot be imported: {reason}"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """What a package says while it is imported; whether it can be used is said by us."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _first_cause(error: BaseException) -> BaseException:
    """torch says which library it could not load, and what it raises from says why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """The error's name and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _one_table(
    functional: ModuleType,
    weight: Tensor,
    cell: Cell,
    sparse: bool,
    update: Callable[[tuple[Tensor, ...]], Update],
) -> Layer:
    """By torch.nn.functional or by ours, whose signatures are the same."""

    def lookup(ids: Tensor) -> Tensor:
        output: Tensor = functional.embedding(ids, weight, cell.padding_idx, sparse=sparse)
        return output

    def bags(ids: Tensor) -> Tensor:
        output: Tensor = functional.embedding_bag(ids, weight, mode="sum", sparse=sparse)
        return output

    return Layer(bags if cell.pooled else lookup, weight, update((weight,)))


def _torch(weight: Tensor, cell: Cell, mode: str) -> Layer:
    build = many_tables.in_turns if cell.tables > 1 else _one_table
    return build(F, weight, cell, False, partial(optimizers.dense, mode=mode))


def _torch_sparse(weight: Tensor, cell: Cell, mode: str) -> Layer:
    build = many_tables.in_turns if cell.tables > 1 else _one_table
    return build(F, weight, cell, True, partial(optimizers.sparse, mode=mode))


def _torch_compile(weight: Tensor, cell: Cell, mode: str) -> Layer:
    # Each shape is compiled on its own; the former ones would count against the limit of recompilations.
    torch._dynamo.reset()

    @partial(torch.compile, fullgraph=True, dynamic=False)
    def lookup(ids: Tensor, table: Tensor) -> Tensor:
        if cell.pooled:
            return F.embedding_bag(ids, table, mode="sum")
        return F.embedding(ids, table, cell.padding_idx)

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


def _index_add(weight: Tensor, cell: Cell, mode: str) -> Layer:
    return Layer(lambda ids: IndexAddEmbedding.apply(weight, ids, cell.padding_idx), weight)


def _liger(weight: Tensor, cell: Cell, mode: str) -> Layer:
    if cell.padding_idx is None:
        apply = importlib.import_module(LIGER).LigerEmbeddingFunction.apply
        return Layer(lambda ids: apply(weight, ids), weight)
    # Its layer draws a table of its own: on the meta device that costs nothing.
    with torch.device("meta"):
        layer = importlib.import_module(
            "liger_kernel.transformers.experimental.embedding"
        ).LigerEmbedding(*weight.shape, cell.padding_idx)
    layer.weight = weight
    return Layer(layer, weight)


def _flag_gems(weight: Tensor, cell: Cell, mode: str) -> Layer:
    gems = importlib.import_module(FLAG_GEMS)
    padding = -1 if cell.padding_idx is None else cell.padding_idx

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


def _fbgemm(weight: Tensor, cell: Cell, mode: str) -> Layer:
    """Its dense tables; for a step those whose backward is the update."""
    training = importlib.import_module(FBGEMM)
    configs = importlib.import_module("fbgemm_gpu.split_embedding_configs")
    precision = {
        torch.float32: configs.SparseType.FP32,
        torch.float16: configs.SparseType.FP16,
    }[weight.dtype]
    cuda = weight.is_cuda
    common = {
        "pooling_mode": training.PoolingMode.SUM if cell.pooled else training.PoolingMode.NONE,
        "weights_precision": precision,
        "output_dtype": precision,
    }
    with torch.cuda.device(weight.device) if cuda else nullcontext():
        if mode not in STEPS:
            tables = training.DenseTableBatchedEmbeddingBagsCodegen(
                [(cell.vocab, cell.dim)] * cell.tables, use_cpu=not cuda, **common
            )
            tables.weights = torch.nn.Parameter(weight.detach().view(-1))
            lookup = many_tables.offsets_lookup(tables, cell)
            # On the CPU they know no lookup without sums, and put bags of one id side by side.
            as_bags = replace(cell, operation="embedding_bag") if not cuda else cell
            return Layer(lookup, tables.weights, order=many_tables.order_of(as_bags))
        places = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        location = places.EmbeddingLocation.DEVICE if cuda else places.EmbeddingLocation.HOST
        device = training.ComputeDevice.CUDA if cuda else training.ComputeDevice.CPU
        kind, definition = {
            "step": (configs.EmbOptimType.EXACT_SGD, None),
            "step_adam": (configs.EmbOptimType.ADAM, optimizers.LAZY_ADAM),
            "step_rowwise_adagrad": (
                configs.EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                optimizers.ROWWISE_ADAGRAD,
            ),
        }[mode]
        tables = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(cell.vocab, cell.dim, location, device)] * cell.tables,
            optimizer=kind,
            learning_rate=optimizers.LEARNING_RATE,
            beta1=optimizers.BETAS[0],
            beta2=optimizers.BETAS[1],
            eps=optimizers.EPS,
            stochastic_rounding=False,
            **common,
        )
    own = (tables.weights_dev if cuda else tables.weights_host).detach()
    own.copy_(weight.detach().view(-1))
    return Layer(
        many_tables.offsets_lookup(tables, cell),
        own,
        optimizers.Update(None, definition),
        order=many_tables.order_of(cell),
    )


def _ours(
    weight: Tensor, cell: Cell, sparse: bool, update: Callable[[tuple[Tensor, ...]], Update]
) -> Layer:
    if cell.tables > 1:
        return many_tables.batched(weight, cell, sparse, update)
    return _one_table(gpu_embed.functional, weight, cell, sparse, update)


def _gpu_embed(weight: Tensor, cell: Cell, mode: str) -> Layer:
    return _ours(weight, cell, False, partial(optimizers.dense, mode=mode))


def _gpu_embed_sparse(weight: Tensor, cell: Cell, mode: str) -> Layer:
    return _ours(weight, cell, True, partial(optimizers.ours, mode=mode, in_backward=False))


def _gpu_embed_in_backward(weight: Tensor, cell: Cell, mode: str) -> Layer:
    # A parameter of its own, for the hooks to go away with.
    table = torch.nn.Parameter(weight.detach())
    return _ours(table, cell, True, partial(optimizers.ours, mode=mode, in_backward=True))


class CandidateGradient(torch.autograd.Function):
    """This package's lookup, with a gradient of bench/candidates."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        padding_idx: int | None,
        gradient: CandidateOfGradient,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_embeddings = len(weight)
        ctx.padding_idx = -1 if padding_idx is None else padding_idx
        ctx.gradient = gradient
        return gpu_embed.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (ids,) = ctx.saved_tensors
        triton = gpu_embed.backends.load("triton")
        grad_weight = ctx.gradient(
            triton, grad_outputs[0], ids, ctx.num_embeddings, ctx.padding_idx
        )
        return grad_weight, None, None, None


# TritonDevice, grad_output, ids, num_embeddings, padding_idx (-1: none) -> grad_weight [V, D]
CandidateOfGradient = Callable[[Any, Tensor, Tensor, int, int], Tensor]


def _candidate_gradient(
    gradient: CandidateOfGradient, weight: Tensor, cell: Cell, mode: str
) -> Layer:
    apply = CandidateGradient.apply
    return Layer(lambda ids: apply(weight, ids, cell.padding_idx, gradient), weight)


def _candidate_gather(weight: Tensor, cell: Cell, mode: str) -> Layer:
    """Ids out of range are recorded and raised as by this package's own lookup."""
    triton: Any = gpu_embed.backends.load("triton")

    def lookup(ids: Tensor) -> Tensor:
        record = bounds.record_for(weight.device)
        if record is not None:
            record.ready()
        output = candidates.gather(triton, weight, ids, -1, record)
        if record is not None:
            record.finish_lookup(ids)
        return output

    return Layer(lookup, weight)


def _small_ids(cell: Cell) -> str | None:
    """torch and most others look up int64 and int32 alone."""
    return None if cell.id_dtype in ("int64", "int32") else f"takes no {cell.id_dtype} ids"


def _no_bags(cell: Cell) -> str | None:
    return "it has no bags" if cell.pooled else _single_table(cell)


def _single_table(cell: Cell) -> str | None:
    """Of the layers that know one table, torch's alone stands for a loop over many."""
    return "one table at a time" if cell.tables > 1 else _small_ids(cell)


def _short_addresses(cell: Cell) -> str | None:
    """Kernels that compute addresses in 32 bits read and write anywhere past 2^31 elements."""
    if max(cell.rows, cell.num_ids) * cell.dim >= 2**31:
        return "its addresses are 32 bit"
    return _no_bags(cell)


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
    return _descriptor_rows(cell) or _no_bags(cell)


def _descriptor_rows(cell: Cell) -> str | None:
    if cell.dim * DTYPES[cell.dtype].itemsize % 16:
        return "its rows are a multiple of 16 bytes"
    return None


def _one_hot_tables(cell: Cell) -> str | None:
    return candidates.one_hot_refusal(DTYPES[cell.dtype], cell.vocab) or _no_bags(cell)


def _needs_triton(device: torch.device) -> str | None:
    name = gpu_embed.backends.select(device).name
    return None if name == "triton" else f"needs the triton backend, {name} serves {device}"


def _needs_descriptors(device: torch.device) -> str | None:
    needed = candidates.DESCRIPTOR_CAPABILITY
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < needed:
        return "tensor descriptors need compute capability {}.{}".format(*needed)
    return _needs_triton(device)


def _sorted_atomic_tables(cell: Cell) -> str | None:
    return _atomic_tables(cell) or _single_table(cell)


def _one_lookup(cell: Cell) -> str | None:
    if cell.pooled or cell.tables > 1:
        return "neither bags nor several tables are looked up by it"
    return None


def _descriptor_lookups(cell: Cell) -> str | None:
    return _one_lookup(cell) or _descriptor_rows(cell)


def _gradient_of(name: str, description: str, **fields: Any) -> Provider:
    """This package with another gradient kernel, forced or a candidate."""
    return Provider(
        f"gpu_embed-{name}",
        f"this package, gradient by {description}",
        module="gpu_embed",
        package="gpu_embed",
        modes=("backward", "full", "step"),
        sums_in_fp32=True,
        candidate=True,
        **fields,
    )


def _lookup_of(name: str, description: str, **fields: Any) -> Provider:
    """This package with another lookup kernel, forced or a candidate."""
    return Provider(
        f"gpu_embed-gather-{name}",
        f"this package, lookup by {description}",
        module="gpu_embed",
        package="gpu_embed",
        modes=("forward",),
        candidate=True,
        **fields,
    )


def _forced_gather(method: str, description: str) -> Provider:
    return _lookup_of(
        method,
        description,
        build=_gpu_embed,
        refusal=_one_lookup,
        setting=lambda: gpu_embed.use_gather_method(method),
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
            "this package, gradient kernel by its table; many tables batched",
            _gpu_embed,
            "gpu_embed",
            "gpu_embed",
            MODES,
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
        _gradient_of(
            "sorted-atomic",
            "sorted segments, atomics at their edges",
            build=_gpu_embed,
            refusal=_sorted_atomic_tables,
            setting=lambda: gpu_embed.use_gradient_method("sorted_atomic"),
        ),
        _gradient_of(
            "descriptor",
            "tensor descriptors",
            build=partial(_candidate_gradient, candidates.scatter_add),
            requirement=_needs_descriptors,
            refusal=_descriptor_gradients,
        ),
        _gradient_of(
            "one-hot",
            "one-hot products",
            build=partial(_candidate_gradient, candidates.one_hot),
            requirement=_needs_triton,
            refusal=_one_hot_tables,
        ),
        _forced_gather("rows", "whole rows"),
        _forced_gather("flat", "equal pieces of the output"),
        _lookup_of(
            "descriptor",
            "tensor descriptors",
            build=_candidate_gather,
            requirement=_needs_descriptors,
            refusal=_descriptor_lookups,
        ),
        Provider(
            "gpu_embed-sparse",
            "this package, sparse=True; a step by gpu_embed.optim",
            _gpu_embed_sparse,
            "gpu_embed",
            "gpu_embed",
            tuple(STEPS),
            cpu=True,
            tables_beside=0,
            sums_in_fp32=True,
        ),
        Provider(
            "gpu_embed-in-backward",
            "the same by gpu_embed.optim.apply_in_backward",
            _gpu_embed_in_backward,
            "gpu_embed",
            "gpu_embed",
            tuple(STEPS),
            cpu=True,
            tables_beside=0,
            sums_in_fp32=True,
        ),
        Provider(
            "torch",
            "torch.nn.functional, table by table; a step by torch.optim on the dense gradient",
            _torch,
            modes=MODES,
            cpu=True,
            refusal=_small_ids,
        ),
        Provider(
            "torch-sparse",
            "the same, sparse=True; Adam is SparseAdam",
            _torch_sparse,
            modes=tuple(STEPS),
            cpu=True,
            tables_beside=0,
            refusal=_small_ids,
        ),
        Provider(
            "torch.compile",
            "torch.compile of the same, for fixed shapes",
            _torch_compile,
            cpu=True,
            requirement=_compiler_missing,
            refusal=_single_table,
            setting=_keep_buffers,
        ),
        Provider(
            "index_add_",
            "gradient by zeros(V, D).index_add_",
            _index_add,
            modes=("backward", "full", "step"),
            cpu=True,
            refusal=_no_bags,
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
            "table batched embeddings; their backward pass is the step",
            _fbgemm,
            FBGEMM,
            "fbgemm-gpu",
            MODES,
            copies=True,
            refusal=_fbgemm_tables,
        ),
        Provider(
            "fbgemm-gpu-cpu",
            "the same on the CPU, where it lacks Adam",
            _fbgemm,
            FBGEMM,
            "fbgemm-gpu-cpu",
            tuple(mode for mode in MODES if mode != "step_adam"),
            cpu=True,
            cuda=False,
            copies=True,
            refusal=_fbgemm_tables,
        ),
    )
}
