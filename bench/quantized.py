"""Quantized tables beside each other: bytes in memory and in a file, errors, and a lookup's time over fp32's.

torchao and bitsandbytes are measured where they are installed, as their documentation has it for embeddings.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gpu_embed


@dataclass(frozen=True)
class Measured:
    """One way to keep a table."""

    name: str
    memory: float  # bytes, over the fp32 table's
    file: (
        float | None
    )  # bytes of its state_dict as torch.save writes it, likewise; None: it cannot be saved
    largest_error: float  # of a number
    mean_error: float
    ratio: float  # a lookup's time over that of torch's fp32 lookup, the median of the rounds
    quarter: float  # of the rounds were faster than this
    three_quarters: float


def ways() -> dict[str, Callable[[torch.nn.Embedding], torch.nn.Module]]:
    """By name, what makes a small table of a float one."""
    quantized = gpu_embed.QuantizedEmbedding.from_float
    found: dict[str, Callable[[torch.nn.Embedding], torch.nn.Module]] = {
        "gpu_embed int8, a scale a row": lambda layer: quantized(layer, 8),
        "gpu_embed int8, group 64": lambda layer: quantized(layer, 8, 64),
        "gpu_embed int4, group 32": lambda layer: quantized(layer, 4, 32),
        "gpu_embed int4, group 64": lambda layer: quantized(layer, 4),
        "gpu_embed int4, group 128": lambda layer: quantized(layer, 4, 128),
    }
    if importlib.util.find_spec("torchao") is not None:
        found |= {
            "torchao int8, a scale a row": lambda layer: _torchao(layer, "int8", None),
            "torchao int4, group 64": lambda layer: _torchao(layer, "int4", 64),
        }
    if importlib.util.find_spec("bitsandbytes") is not None:
        found |= {
            "bitsandbytes Embedding8bit": lambda layer: _bitsandbytes(layer, "Embedding8bit"),
            "bitsandbytes EmbeddingNF4": lambda layer: _bitsandbytes(layer, "EmbeddingNF4"),
        }
    return found


def _torchao(layer: torch.nn.Embedding, dtype: str, group: int | None) -> torch.nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    model = torch.nn.Sequential(copy.deepcopy(layer))
    granularity = PerAxis(0) if group is None else PerGroup(group)
    config = IntxWeightOnlyConfig(getattr(torch, dtype), granularity)
    quantize_(model, config, filter_fn=lambda module, _: isinstance(module, torch.nn.Embedding))
    return model[0]


def _bitsandbytes(layer: torch.nn.Embedding, name: str) -> torch.nn.Module:
    import bitsandbytes

    small: torch.nn.Module = getattr(bitsandbytes.nn, name)(*layer.weight.shape)
    small.load_state_dict(layer.state_dict())
    return small.to(layer.weight.device)


def measure_quantized(
    rows: int,
    dim: int,
    num_ids: int,
    rounds: int,
    advance: Callable[[], object],
) -> list[Measured]:
    """Each way's table of normal numbers, looked up by uniform ids in turns with torch's fp32 lookup."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    weight = torch.randn(rows, dim, generator=generator, device="cpu")
    layer = torch.nn.Embedding(rows, dim, _weight=weight).requires_grad_(False)
    ids = torch.randint(rows, (num_ids,), generator=generator, device="cpu")
    measured = []
    with torch.no_grad():
        for name, make in ways().items():
            measured.append(_measure(name, layer, make(layer), ids, rounds))
            advance()
    return measured


def _measure(
    name: str, layer: torch.nn.Embedding, small: torch.nn.Module, ids: Tensor, rounds: int
) -> Measured:
    errors = (small(ids).double() - layer(ids).double()).abs()
    ratios = []
    for number in range(rounds + 3):
        theirs, ours = _seconds(layer, ids), _seconds(small, ids)
        # The first calls set things up.
        if number >= 3:
            ratios.append(ours / theirs)
    quarter, median, three_quarters = statistics.quantiles(ratios, n=4)
    return Measured(
        name,
        _memory(small) / layer.weight.nbytes,
        _file(small, layer),
        float(errors.max()),
        float(errors.mean()),
        median,
        quarter,
        three_quarters,
    )


def _seconds(layer: torch.nn.Module, ids: Tensor) -> float:
    start = time.perf_counter()
    layer(ids)
    return time.perf_counter() - start


def _memory(layer: torch.nn.Module) -> int:
    return sum(map(_bytes, (*layer.parameters(), *layer.buffers())))


def _bytes(tensor: Any) -> int:
    """Of a tensor and of what it holds beside its own numbers."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    beside = [getattr(tensor, "SCB", None), getattr(tensor, "quant_state", None)]
    total = int(tensor.nbytes)
    for one in beside:
        scales = getattr(one, "absmax", one)
        if isinstance(scales, Tensor):
            total += scales.nbytes
    return total


def _file(small: torch.nn.Module, layer: torch.nn.Module) -> float | None:
    sizes = []
    for one in (small, layer):
        file = io.BytesIO()
        try:
            torch.save(one.state_dict(), file)
        except NotImplementedError:
            return None
        sizes.append(file.tell())
    return sizes[0] / sizes[1]
