"""Tables of 8 or 4 bits a number, for serving: looked up, and not trained."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dtypes import FLOATS
from ..functional.checks import PLAIN_TYPES
from ..functional.quantized import quantized_embedding, quantized_embedding_bag
from ..fused_rows import FusedRows, dequantize, fused_rows, quantize_rows
from .bag import EmbeddingBag
from .embedding import Embedding
from .tables import TableBatchedEmbedding, TableBatchedEmbeddingBag

if TYPE_CHECKING:
    from typing_extensions import Self

NOT_TRAINED = (
    "its numbers are codes, which have no gradient. Train a float table, to_float(), and quantize that; or train LoRA "
    "on top of this one"
)


class QuantizedModule(torch.nn.Module):
    """What layers of quantized tables have in common: codes in buffers, which are converted and trained by nobody."""

    dtype: torch.dtype  # of the output
    weight_format: Tensor  # saved, so that bytes of another format are never taken for this one's

    def _checked_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in FLOATS:
            raise TypeError(
                f"{type(self).__name__}: the output's dtype must be torch.float32, float16, bfloat16 or float64, got "
                f"{dtype}"
            )
        return dtype

    def requires_grad_(self, requires_grad: bool = True) -> "Self":
        """RuntimeError where a gradient is asked for: codes have none."""
        if requires_grad:
            raise RuntimeError(f"{type(self).__name__} cannot be trained: {NOT_TRAINED}")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        # Which dtype a conversion asks for, a float tensor without numbers shows.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight_format.device))
        dtype = self._checked_dtype(probe.dtype)

        def keep_integers(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_integers, recurse)
        self.dtype = dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        reason = self._reason_to_refuse(state_dict, prefix)
        if reason is not None:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {reason}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _reason_to_refuse(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why saved tensors are not this layer's; None: they are, or one is missing, which torch says."""
        raise NotImplementedError


class QuantizedTableModule(QuantizedModule):
    """Both layers of one table: fused rows in a buffer, and how these lie in it."""

    weight: Tensor
    # What torch's layers have beside these; LoRA asks for them.
    max_norm: None = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    _float_type: type[torch.nn.Module]  # torch's layer of such a table

    def _set_up(
        self,
        num_embeddings: int,
        layout: FusedRows,
        padding_idx: int | None,
        dtype: torch.dtype | None,
        weight: Tensor,
    ) -> None:
        """Fill a module that has been initialised with what it consists of."""
        self.num_embeddings = num_embeddings
        self.embedding_dim = layout.embedding_dim
        self.padding_idx = padding_idx
        self.format = layout
        self.dtype = self._checked_dtype(dtype or torch.get_default_dtype())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_format", torch.tensor(layout, device=weight.device))

    @property
    def bits(self) -> int:
        """Of a number: 8 or 4."""
        return self.format.bits

    @property
    def group_size(self) -> int:
        """Columns that have a scale and an offset of their own."""
        return self.format.group_size

    @property
    def in_features(self) -> int:
        """num_embeddings, by the name that adapters ask for."""
        return self.num_embeddings

    @property
    def out_features(self) -> int:
        """embedding_dim, likewise."""
        return self.embedding_dim

    def _floats(self) -> Tensor:
        """The numbers that the codes stand for, `[num_embeddings, embedding_dim]` of `dtype`."""
        return floats(self.weight, self.format, self.dtype)

    def _reason_to_refuse(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        weight, weight_format = (
            state_dict.get(f"{prefix}{name}") for name in ("weight", "weight_format")
        )
        if not isinstance(weight, Tensor):
            return None
        own = f"this {type(self).__name__} has {_described(self.num_embeddings, self.format)}"
        if weight.dtype != torch.uint8:
            return (
                f"{own}, and what is loaded is a table of {weight.dtype}: load it into a float layer, and quantize "
                "that with from_float"
            )
        if isinstance(weight_format, Tensor) and not weight_format.is_meta:
            saved = FusedRows(*weight_format.tolist())
            if saved != self.format or len(weight) != self.num_embeddings:
                return f"{own}, and what is loaded has {_described(len(weight), saved)}"
        if weight.shape != self.weight.shape:
            return f"{own}, in bytes {list(self.weight.shape)}, and what is loaded has {list(weight.shape)}"
        return None

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}"]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        parts.append(f"bits={self.bits}, group_size={self.group_size}, dtype={self.dtype}")
        return ", ".join(parts)


class QuantizedEmbedding(QuantizedTableModule):
    """A table of 8 or 4 bits a number, with a scale and an offset a row or a group of columns; not trained.

    Input: ids of any shape; int64, int32, int16 or uint8. Output: `[*input.shape, embedding_dim]` in `dtype`: code *
    scale + offset in fp32, the same bits on every backend, then rounded. Each number is at most half a scale from the
    one that was quantized. A row of zeros, such as padding has, stays one.

    Args:
        padding_idx: kept for `to_float`; a lookup returns that row as it is, as torch's does.
        bits: 8 or 4.
        group: columns that share a scale and an offset: 32, 64, 128, or "row" for all of a row. None: "row" for 8 bits,
            64 for 4.
        dtype: of the output; `.to(dtype)` changes it, and never the codes.

    A new layer has a table of zeros, to load a `state_dict` into; `from_float` makes one of a trained layer.

    Attributes:
        weight: uint8 `[num_embeddings, bytes]`, a buffer: `parameters()` has nothing of it. A row is FBGEMM's, see
            `gpu_embed.fused_rows`.

    Raises:
        IndexError: an id is out of range; when, is set by `gpu_embed.set_bounds_check`.
        RuntimeError: ids that are no integers, or on another device; `requires_grad_()`; a `state_dict` of another
            format.

    Example::

        table = gpu_embed.Embedding(2000, 256)
        small = gpu_embed.QuantizedEmbedding.from_float(table, bits=4, group=64)  # 288,000 bytes of 2,048,000
        rows = small(torch.tensor([[4, 7, 199]]))  # [1, 3, 256]
    """

    _float_type = torch.nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        bits: int = 8,
        group: int | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layout = fused_rows(type(self).__name__, embedding_dim, bits, group)
        weight = torch.zeros(num_embeddings, layout.row_bytes, dtype=torch.uint8, device=device)
        self._set_up(num_embeddings, layout, padding_idx, dtype, weight)

    @classmethod
    def from_float(
        cls,
        layer: Any,
        bits: int = 8,
        group: int | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """A table as a quantized one; the layer is left as it is.

        Args:
            layer: a `torch.nn.Embedding`, or this package's; or a `TableBatchedEmbedding`, which becomes a
                `QuantizedTableBatchedEmbedding`.
            bits, group: as for the class.
            dtype: of the output; None: the layer's.

        Raises:
            TypeError: a layer of another type; a table that is no plain tensor of fp32, fp16, bf16 or fp64.
            ValueError: bits or a group that there is not; max_norm; a row, by its number, with NaN, infinity, or
                numbers too far out for its scale or offset.
        """
        if isinstance(layer, TableBatchedEmbedding):
            from .quantized_tables import QuantizedTableBatchedEmbedding

            return QuantizedTableBatchedEmbedding.from_float(layer, bits, group, dtype)
        layout, weight = _quantized_weight(f"{cls.__name__}.from_float", layer, cls, bits, group)
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        self._set_up(
            layer.num_embeddings, layout, layer.padding_idx, dtype or layer.weight.dtype, weight
        )
        return self.train(layer.training)

    def to_float(self) -> Embedding:
        """A layer with the numbers that the codes stand for, in `dtype`, which can be trained."""
        layer = Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=self._floats()
        )
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return quantized_embedding(input, self.weight, self.format, self.dtype)


class QuantizedEmbeddingBag(QuantizedTableModule):
    """Sums, means or maxima of bags of rows of a table of 8 or 4 bits a number; not trained.

    Input, offsets, per-sample weights (of `dtype`), mode and padding are `EmbeddingBag`'s, and so are the errors.
    Output: `[B, embedding_dim]` in `dtype`; sums are taken in fp32 (fp64 for fp64) and rounded once. On the way each
    id's row is written in fp32: 4 * embedding_dim bytes an id.

    Args, attributes, `from_float` and `to_float` are as for `QuantizedEmbedding`. Per-sample weights have a gradient.

    Example::

        bags = gpu_embed.EmbeddingBag(2000, 256, mode="sum")
        small = gpu_embed.QuantizedEmbeddingBag.from_float(bags, bits=8)
        sums = small(torch.tensor([4, 7, 199]), torch.tensor([0, 2]))  # [2, 256]
    """

    _float_type = torch.nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        bits: int = 8,
        group: int | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layout = fused_rows(type(self).__name__, embedding_dim, bits, group)
        weight = torch.zeros(num_embeddings, layout.row_bytes, dtype=torch.uint8, device=device)
        self._set_up(num_embeddings, layout, padding_idx, dtype, weight)
        self.mode = mode
        self.include_last_offset = include_last_offset

    @classmethod
    def from_float(
        cls,
        layer: Any,
        bits: int = 8,
        group: int | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """A table of bags as a quantized one; see `QuantizedEmbedding.from_float`.

        A `TableBatchedEmbeddingBag` becomes a `QuantizedTableBatchedEmbeddingBag`.
        """
        if isinstance(layer, TableBatchedEmbeddingBag):
            from .quantized_tables import QuantizedTableBatchedEmbeddingBag

            return QuantizedTableBatchedEmbeddingBag.from_float(layer, bits, group, dtype)
        layout, weight = _quantized_weight(f"{cls.__name__}.from_float", layer, cls, bits, group)
        self = cls.__new__(cls)
        torch.nn.Module.__init__(self)
        self._set_up(
            layer.num_embeddings, layout, layer.padding_idx, dtype or layer.weight.dtype, weight
        )
        self.mode = layer.mode
        self.include_last_offset = layer.include_last_offset
        return self.train(layer.training)

    def to_float(self) -> EmbeddingBag:
        """A layer with the numbers that the codes stand for, in `dtype`, which can be trained."""
        layer = EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            _weight=self._floats(),
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )
        return layer.train(self.training)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        return quantized_embedding_bag(
            input,
            self.weight,
            self.format,
            self.dtype,
            offsets,
            self.mode,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


def _quantized_weight(
    function: str,
    layer: Any,
    cls: type[QuantizedTableModule],
    bits: int,
    group: int | str | None,
) -> tuple[FusedRows, Tensor]:
    """A float layer's rows, quantized; all errors of that."""
    if not isinstance(layer, cls._float_type):
        raise TypeError(
            f"{function}: expected torch.nn.{cls._float_type.__name__} or this package's, got {type(layer).__name__}"
        )
    reason = reason_not_to_quantize(layer)
    if reason is not None:
        error = ValueError if layer.max_norm is not None else TypeError
        raise error(f"{function}: {reason}")
    weight = layer.get_parameter("weight")
    layout = fused_rows(function, weight.shape[1], bits, group)
    return layout, quantize_rows(weight, layout)


def reason_not_to_quantize(layer: Any) -> str | None:
    """Why the table of one of torch's layers cannot be quantized, whatever numbers it holds; None: it can."""
    weight = layer.weight
    if layer.max_norm is not None:
        return "max_norm rescales rows in each lookup, and codes stay as they are: set the layer's max_norm to None"
    if type(weight) not in PLAIN_TYPES or weight.dtype not in FLOATS:
        kind = weight.dtype if type(weight) in PLAIN_TYPES else type(weight).__name__
        return f"a table must be a plain tensor of float32, float16, bfloat16 or float64 to be quantized, and is {kind}"
    if weight.is_meta:
        return "the table is on the meta device and has no numbers: load it before"
    return None


def floats(weight: Tensor, layout: FusedRows, dtype: torch.dtype) -> Tensor:
    """The numbers that fused rows stand for, `[V, embedding_dim]`."""
    rows = torch.empty(len(weight), layout.embedding_dim, dtype=dtype, device=weight.device)
    step = max(1, (1 << 20) // layout.embedding_dim)
    for part, fused in zip(rows.split(step), weight.split(step), strict=True):
        part.copy_(dequantize(fused, layout))
    return rows


def _described(num_embeddings: int, layout: FusedRows) -> str:
    return (
        f"{num_embeddings} rows of {layout.embedding_dim} columns of {layout.bits} bits, {layout.group_size} columns a "
        "scale"
    )
