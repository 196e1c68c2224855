"""Who is measured: one entry each. Nothing is imported before it is asked for.

To add a rival: a function that builds its lookup, and an entry in DESCRIPTIONS and in _BUILT.
"""

from __future__ import annotations

import importlib
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_embed
from gpu_embed import bounds

from . import machine, many_tables, optimizers
from .candidates import launch as candidates
from .layer import Layer
from .shapes import ACCUMULATE, DTYPES, MODES, STEPS, Cell

Build = Callable[[Tensor, Cell, str], Layer]  # weight [T * V, D] (a leaf), cell, mode
Refusal = Callable[[Cell], str | None]  # why a cell cannot be measured; None: it can
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
    # Whether it adds to a gradient that exists, with no gradient of its own between.
    in_place: bool = False
    # Whether its gradient must be a sum in fp32, rounded once; else sums in the table's dtype are accepted.
    sums_in_fp32: bool = False
    requirement: Callable[[torch.device], str | None] = lambda device: None
    refusals: tuple[Refusal, ...] = ()
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext  # active while it runs
    # Whether it is measured by `run` alone, where it takes the cell: a kernel of ours that the package does not
    # choose, or not always, and a rival for one kind of cells.
    candidate: bool = False

    def missing_reason(self, device: torch.device) -> str | None:
        """None where it can run on the device, else the reason in one sentence."""
        if device.type == "cpu" and not self.cpu:
            return "needs a CUDA device"
        if device.type == "cuda" and not self.cuda:
            return "runs on the CPU alone"
        return _import_problem(self.module, self.package) or self.requirement(device)

    @property
    def needs_no_setting(self) -> bool:
        """Whether it can take turns with others in one process."""
        return self.setting is nullcontext

    def version(self) -> str:
        """The installed version, or an empty text."""
        return machine.version(self.package)

    def is_planned(self, cell: Cell, mode: str) -> bool:
        """Whether a run in which nobody asks for it by name has a row of it."""
        return mode in self.modes and not (self.candidate and self.refusal(cell))

    def refuses(self, cell: Cell, mode: str) -> str | None:
        """Why it cannot be asked for this cell; None: it can."""
        if mode not in self.modes:
            return f"measured in {', '.join(self.modes)} alone"
        if mode in STEPS and mode != "step" and cell.dtype not in ("float32", "float64"):
            return f"optimizers are checked on float32 and float64 tables, not on {cell.dtype}"
        if mode == "accumulate_fp32" and not hasattr(torch.Tensor, "grad_dtype"):
            return "an fp32 gradient beside a table of 16 bits needs a torch with Tensor.grad_dtype"
        return self.refusal(cell)

    def refusal(self, cell: Cell) -> str | None:
        return next((reason for refusal in self.refusals if (reason := refusal(cell))), None)


@cache
def _import_problem(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"not installed (pip install {package})"
    try:
        with _quiet():
            importlib.import_module(module)
    # A binary built for another torch fails in any way it likes.
    except Exception as error:
        # torch says which library it could not load, and what it raises from says why.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause)
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


def first_line(error: BaseException) -> str:
    """The error's name and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _torch(weight: Tensor, cell: Cell, mode: str, sparse: bool = False) -> Layer:
    build = many_tables.in_turns if cell.tables > 1 else many_tables.single
    layer = build(F, weight, cell, sparse)
    return replace(layer, update=optimizers.by_torch(layer.leaves, mode, sparse))


def _torch_together(weight: Tensor, cell: Cell, mode: str) -> Layer:
    return many_tables.together(weight, cell)


def _torch_compile(weight: Tensor, cell: Cell, mode: str) -> Layer:
    # Each shape is compiled on its own; the former ones would count against the limit of recompilations.
    torch._dynamo.reset()

    @partial(torch.compile, fullgraph=True, dynamic=False)
    def lookup(ids: Tensor, table: Tensor, offsets: Tensor | None = None) -> Tensor:
        if cell.pooled:
            return F.embedding_bag(ids, table, offsets, mode="sum")
        return F.embedding(ids, table, cell.padding_idx)

    if cell.by_offsets:
        return Layer(lambda ids: lookup(*many_tables.by_offsets(cell, ids, weight)), weight)
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


class LookupWithGradient(torch.autograd.Function):
    """lookup(ids, weight), whose gradient is gradient(grad_output, ids)."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        lookup: Callable[[Tensor, Tensor], Tensor],
        gradient: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.gradient = gradient
        return lookup(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient(grad_outputs[0], *ctx.saved_tensors), None, None, None


def _index_add(weight: Tensor, cell: Cell, mode: str) -> Layer:
    """torch's lookup, with zeros(V, D).index_add_(0, ids, grad) for a gradient."""

    def gradient(grad_output: Tensor, ids: Tensor) -> Tensor:
        grad_weight = grad_output.new_zeros(weight.shape).index_add_(0, ids, grad_output)
        if cell.padding_idx is not None:
            grad_weight[cell.padding_idx].zero_()
        return grad_weight

    return Layer(lambda ids: LookupWithGradient.apply(weight, ids, F.embedding, gradient), weight)


def _liger(weight: Tensor, cell: Cell, mode: str) -> Layer:
    if cell.padding_idx is None:
        apply = importlib.import_module(LIGER).LigerEmbeddingFunction.apply
        return Layer(lambda ids: apply(weight, ids), weight)
    layers = importlib.import_module("liger_kernel.transformers.experimental.embedding")
    # Its layer draws a table of its own: on the meta device that costs nothing.
    with torch.device("meta"):
        layer = layers.LigerEmbedding(*weight.shape, cell.padding_idx)
    layer.weight = weight
    return Layer(layer, weight)


def _flag_gems(weight: Tensor, cell: Cell, mode: str) -> Layer:
    gems = importlib.import_module(FLAG_GEMS)
    padding = -1 if cell.padding_idx is None else cell.padding_idx

    def lookup(ids: Tensor, table: Tensor) -> Tensor:
        output: Tensor = gems.embedding(table, ids, padding)
        return output

    def gradient(grad_output: Tensor, ids: Tensor) -> Tensor:
        grad_weight: Tensor = gems.embedding_backward(grad_output, ids, len(weight), padding)
        return grad_weight

    return Layer(lambda ids: LookupWithGradient.apply(weight, ids, lookup, gradient), weight)


def _fbgemm(weight: Tensor, cell: Cell, mode: str) -> Layer:
    """Its dense tables; for a step those whose backward is the update."""
    training = importlib.import_module(FBGEMM)
    configs = importlib.import_module("fbgemm_gpu.split_embedding_configs")
    types = configs.SparseType
    precision = {torch.float32: types.FP32, torch.float16: types.FP16}[weight.dtype]
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
        kinds = configs.EmbOptimType
        kind, definition = {
            "step": (kinds.EXACT_SGD, None),
            "step_adam": (kinds.ADAM, optimizers.LAZY_ADAM),
            "step_rowwise_adagrad": (kinds.EXACT_ROWWISE_ADAGRAD, optimizers.ROWWISE_ADAGRAD),
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
    update = optimizers.Update(None, definition)
    lookup = many_tables.offsets_lookup(tables, cell)
    return Layer(lookup, own, update, order=many_tables.order_of(cell))


def _gpu_embed(
    weight: Tensor,
    cell: Cell,
    mode: str,
    sparse: bool = False,
    in_backward: bool = False,
    in_place: bool = False,
) -> Layer:
    if in_backward:
        # A parameter of its own, for the hooks to go away with.
        weight = torch.nn.Parameter(weight.detach())
    if cell.tables > 1:
        layer = many_tables.batched(weight, cell, sparse)
    else:
        layer = many_tables.single(gpu_embed.functional, weight, cell, sparse)
    if in_place:
        gpu_embed.accumulate_in_place(layer.leaves)
    if sparse:
        return replace(layer, update=optimizers.ours(layer.leaves, mode, in_backward))
    return replace(layer, update=optimizers.by_torch(layer.leaves, mode, sparse=False))


# TritonDevice, grad_output, ids, num_embeddings, padding_idx (-1: none) -> grad_weight [V, D]
CandidateOfGradient = Callable[[Any, Tensor, Tensor, int, int], Tensor]


def _candidate_gradient(
    candidate: CandidateOfGradient, weight: Tensor, cell: Cell, mode: str
) -> Layer:
    """This package's lookup, with a gradient of bench/candidates."""
    triton = gpu_embed.backends.load("triton")
    lookup, padding = gpu_embed.functional.embedding, cell.padding_idx

    def gradient(grad_output: Tensor, ids: Tensor) -> Tensor:
        return candidate(triton, grad_output, ids, len(weight), -1 if padding is None else padding)

    return Layer(lambda ids: LookupWithGradient.apply(weight, ids, lookup, gradient), weight)


def _candidate_gather(weight: Tensor, cell: Cell, mode: str) -> Layer:
    """Ids out of range are recorded and raised as by this package's own lookup."""
    triton: Any = gpu_embed.backends.load("triton")

    def lookup(ids: Tensor) -> Tensor:
        record = bounds.record_for(weight.device)
        if record is None:
            return candidates.gather(triton, weight, ids, -1, None)
        record.ready()
        output = candidates.gather(triton, weight, ids, -1, record)
        record.finish_lookup(ids)
        return output

    return Layer(lookup, weight)


def _needs_triton(device: torch.device) -> str | None:
    name = gpu_embed.backends.select(device).name
    return None if name == "triton" else f"needs the triton backend, {name} serves {device}"


def _needs_descriptors(device: torch.device) -> str | None:
    needed = candidates.DESCRIPTOR_CAPABILITY
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < needed:
        return "tensor descriptors need compute capability {}.{}".format(*needed)
    return _needs_triton(device)


def _refusal(reason: str, refused: Callable[[Cell], object]) -> Refusal:
    """A refusal of such cells; {0} in the reason is the cell."""
    return lambda cell: reason.format(cell) if refused(cell) else None


# torch and most others look up int64 and int32 alone.
_SMALL_IDS = _refusal("takes no {0.id_dtype} ids", lambda c: c.id_dtype not in ("int64", "int32"))
_ONE_WIDTH = _refusal("its tables have one width", lambda c: not c.is_uniform)
_MANY_BAGS = _refusal("bags of several tables alone", lambda c: not c.pooled or c.tables == 1)
# Of the layers that know one table, torch's alone stands for a loop over many.
_SINGLE_TABLE = (_refusal("one table at a time", lambda c: c.tables > 1), _SMALL_IDS)
_NO_BAGS = (_refusal("it has no bags", lambda c: c.pooled), *_SINGLE_TABLE)
# Kernels that compute addresses in 32 bits read and write anywhere past 2^31 elements.
_SHORT_ADDRESSES = _refusal(
    "its addresses are 32 bit", lambda c: max(c.rows, c.num_ids) * c.dim >= 2**31
)
_FBGEMM_TABLES = (
    _refusal("its tables are not {0.dtype}", lambda c: c.dtype not in ("float32", "float16")),
    _refusal("its rows are a multiple of 4 numbers", lambda c: c.dim % 4),
    _refusal("it has no padding_idx", lambda c: c.padding),
    _ONE_WIDTH,
    _SMALL_IDS,
)
_ATOMIC_TABLES = _refusal(
    "no atomics on {0.dtype} tables", lambda c: c.dtype not in ("float32", "float64")
)
_BULK_ADDITIONS = _refusal("no bulk additions to {0.dtype} tables", lambda c: c.dtype != "float32")
_DESCRIPTOR_ROWS = _refusal(
    "its rows are a multiple of 16 bytes", lambda c: c.dim * DTYPES[c.dtype].itemsize % 16
)
_ONE_LOOKUP = _refusal(
    "neither bags nor several tables are looked up by it", lambda c: c.pooled or c.tables > 1
)


def _one_hot_tables(cell: Cell) -> str | None:
    return candidates.one_hot_refusal(DTYPES[cell.dtype], cell.vocab)


# What `list` says of each; gpu_embed first: where a run is cut short, the others have something to be compared with.
DESCRIPTIONS = {
    "gpu_embed": "this package, gradient kernel by its table; many tables batched",
    "gpu_embed-atomic": "this package, gradient by atomics",
    "gpu_embed-sorted": "this package, gradient by sorted segments",
    "gpu_embed-sorted-atomic": "this package, gradient by sorted segments, atomics at their edges",
    "gpu_embed-descriptor": "this package, gradient by tensor descriptors",
    "gpu_embed-one-hot": "this package, gradient by one-hot products",
    "gpu_embed-gather-rows": "this package, lookup by whole rows",
    "gpu_embed-gather-flat": "this package, lookup by equal pieces of the output",
    "gpu_embed-gather-descriptor": "this package, lookup by tensor descriptors",
    "gpu_embed-sparse": "this package, sparse=True; a step by gpu_embed.optim",
    "gpu_embed-in-backward": "the same by gpu_embed.optim.apply_in_backward",
    "gpu_embed-in-place": "this package, gradients added to the one that exists by accumulate_in_place",
    "torch": "torch.nn.functional, table by table; a step by torch.optim on the dense gradient",
    "torch-together": "a loop over torch.nn.EmbeddingBag with its offsets, outputs put side by side",
    "torch-sparse": "torch, sparse=True; Adam is SparseAdam",
    "torch.compile": "torch.compile of the same, for fixed shapes",
    "index_add_": "gradient by zeros(V, D).index_add_",
    "liger-kernel": "LigerEmbedding (experimental)",
    "flag-gems": "flag_gems.ops.embedding",
    "fbgemm-gpu": "table batched embeddings; their backward pass is the step",
    "fbgemm-gpu-cpu": "the same on the CPU, where it lacks Adam",
}
LIGER = "liger_kernel.ops.experimental.embedding"
FLAG_GEMS = "flag_gems.ops.embedding"
FBGEMM = "fbgemm_gpu.split_table_batched_embeddings_ops_training"
GRADIENT = ("backward", "full", "step")

_rival = partial(Provider, "", "")  # the names follow below
_own = partial(_rival, module="gpu_embed", package="gpu_embed", sums_in_fp32=True)
_candidate = partial(_own, candidate=True)
_sparse: dict[str, Any] = {"modes": tuple(STEPS), "cpu": True, "tables_beside": 0}


def _forced_gradient(method: str, **fields: Any) -> Provider:
    setting = partial(gpu_embed.use_gradient_method, method)
    return _own(_gpu_embed, modes=GRADIENT, setting=setting, **fields)


def _forced_lookup(method: str) -> Provider:
    setting = partial(gpu_embed.use_gather_method, method)
    return _candidate(_gpu_embed, modes=("forward",), setting=setting, refusals=(_ONE_LOOKUP,))


def _candidate_of_gradient(candidate: CandidateOfGradient, **fields: Any) -> Provider:
    return _candidate(partial(_candidate_gradient, candidate), modes=GRADIENT, **fields)


_BUILT: dict[str, Provider] = {
    "gpu_embed": _own(_gpu_embed, modes=MODES, cpu=True),
    "gpu_embed-atomic": _forced_gradient("atomic", refusals=(_ATOMIC_TABLES,)),
    "gpu_embed-sorted": _forced_gradient("sorted"),
    "gpu_embed-sorted-atomic": _forced_gradient(
        "sorted_atomic", candidate=True, refusals=(_ATOMIC_TABLES, *_SINGLE_TABLE)
    ),
    "gpu_embed-descriptor": _candidate_of_gradient(
        candidates.scatter_add,
        requirement=_needs_descriptors,
        refusals=(_BULK_ADDITIONS, _DESCRIPTOR_ROWS, *_NO_BAGS),
    ),
    "gpu_embed-one-hot": _candidate_of_gradient(
        candidates.one_hot, requirement=_needs_triton, refusals=(_one_hot_tables, *_NO_BAGS)
    ),
    "gpu_embed-gather-rows": _forced_lookup("rows"),
    "gpu_embed-gather-flat": _forced_lookup("flat"),
    "gpu_embed-gather-descriptor": _candidate(
        _candidate_gather,
        modes=("forward",),
        requirement=_needs_descriptors,
        refusals=(_ONE_LOOKUP, _DESCRIPTOR_ROWS),
    ),
    "gpu_embed-sparse": _own(partial(_gpu_embed, sparse=True), **_sparse),
    "gpu_embed-in-backward": _own(partial(_gpu_embed, sparse=True, in_backward=True), **_sparse),
    "gpu_embed-in-place": _own(
        partial(_gpu_embed, in_place=True), modes=ACCUMULATE, cpu=True, in_place=True
    ),
    "torch": _rival(_torch, modes=MODES, cpu=True, refusals=(_SMALL_IDS, _ONE_WIDTH)),
    "torch-together": _rival(
        _torch_together,
        modes=("forward", "backward", "full"),
        cpu=True,
        candidate=True,
        refusals=(_SMALL_IDS, _MANY_BAGS),
    ),
    "torch-sparse": _rival(partial(_torch, sparse=True), **_sparse, refusals=(_SMALL_IDS,)),
    "torch.compile": _rival(
        _torch_compile,
        cpu=True,
        requirement=_compiler_missing,
        refusals=_SINGLE_TABLE,
        setting=_keep_buffers,
    ),
    "index_add_": _rival(_index_add, modes=GRADIENT, cpu=True, refusals=_NO_BAGS),
    "liger-kernel": _rival(_liger, LIGER, "liger-kernel", refusals=(_SHORT_ADDRESSES, *_NO_BAGS)),
    "flag-gems": _rival(_flag_gems, FLAG_GEMS, "flag-gems", refusals=(_SHORT_ADDRESSES, *_NO_BAGS)),
    "fbgemm-gpu": _rival(
        _fbgemm, FBGEMM, "fbgemm-gpu", MODES, copies=True, refusals=_FBGEMM_TABLES
    ),
    "fbgemm-gpu-cpu": _rival(
        _fbgemm,
        FBGEMM,
        "fbgemm-gpu-cpu",
        tuple(mode for mode in MODES if mode != "step_adam"),
        cpu=True,
        cuda=False,
        copies=True,
        refusals=_FBGEMM_TABLES,
    ),
}
PROVIDERS = {
    name: replace(_BUILT[name], name=name, description=text) for name, text in DESCRIPTIONS.items()
}
