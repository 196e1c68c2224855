"""A Keras 3 layer on our kernels: `Embedding`, for Keras's torch backend (extra `keras`).

Keras reads its backend when it is first imported, so choose torch before that::

    import os
    os.environ["KERAS_BACKEND"] = "torch"

    import gpu_embed.keras

On another Keras backend (TensorFlow, JAX, NumPy, OpenVINO) the layer behaves as `keras.layers.Embedding` in all
respects, so that a model that was saved here loads there; a line on the log `gpu_embed` says so.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dtypes import KERAS_IDS, traced_accumulation
from .ops import take as take_ops
from .take import WIDE_UNSIGNED, signed_ids

INSTALL = 'install the extra "keras" (from a clone: pip install ".[keras]")'
try:
    import keras
except ImportError as error:
    if error.name == "keras":
        raise ImportError(f"gpu_embed.keras needs Keras 3: {INSTALL}") from error
    raise ImportError(
        f"Keras cannot import what its backend needs ({error}). gpu_embed.keras is for Keras's torch backend: "
        "set KERAS_BACKEND=torch in the environment before keras is first imported"
    ) from error
if not keras.__version__.startswith("3."):
    raise ImportError(f"gpu_embed.keras needs Keras 3, found {keras.__version__}: {INSTALL}")

ON_TORCH = keras.backend.backend() == "torch"
if not ON_TORCH:
    logging.getLogger("gpu_embed").warning(
        "gpu_embed: Keras runs on %s, so gpu_embed.keras.Embedding is Keras's own layer; for our kernels set "
        "KERAS_BACKEND=torch in the environment before keras is first imported",
        keras.backend.backend(),
    )


@keras.saving.register_keras_serializable(package="gpu_embed")
class Embedding(keras.layers.Embedding):
    """`keras.layers.Embedding` whose lookups and gradients run on our kernels.

    Signature, attributes, initialisation, masks, regularizers, constraints, LoRA, quantization, saving and loading
    are Keras's own::

        Embedding(
            input_dim, output_dim, embeddings_initializer="uniform", embeddings_regularizer=None,
            embeddings_constraint=None, mask_zero=False, weights=None, lora_rank=None, lora_alpha=None,
            quantization_config=None, **kwargs,
        )

    `input_length=50`, which Keras 2 had, is accepted with Keras 3's warning that it is deprecated, and ignored: the
    length is the input's. So the example that older introductions begin with works as it is written there::

        table = gpu_embed.keras.Embedding(200, 32, input_length=50)  # warns
        rows = table(ids)  # ids [32, 50] -> [32, 50, 32]

    Input: ids of any shape. Output: `[*ids.shape, output_dim]` in the policy's compute dtype. A lookup is one
    operator, in which Keras's torch backend dispatches six: it casts the ids, counts negative ones from the end,
    gathers, and rounds the rows to the compute dtype.

    * Ids of any integer or float dtype are taken as they are; fractions are cut, as Keras does. int64 ids stay
      int64, where Keras's layer casts them to int32.
    * -1 is the last row, as on Keras's torch backend. Any other id outside of the table is an IndexError that names
      it, late on CUDA and at once on the CPU: see `gpu_embed.set_bounds_check`. It is never clamped.
    * Gradients are dense and summed in fp32 (fp64 for fp64), whatever the compute dtype.
    * LoRA gathers rows of A and multiplies these by B; the sum is taken in fp32 (fp64 for fp64). The table that the
      two amount to is never formed, but by the attribute `embeddings` and where a model is saved.
    * A subclass whose call reads `self.embeddings` finds the table in its own dtype, which Keras under a mixed policy
      has cast there: cast what is read to `self.compute_dtype`.
    * `quantize("int8")` and `quantize("int4")`, of one scale a row or of blocks: only the rows that ids name are
      dequantized, in the lookup. The output has the compute dtype, which `compute_output_spec` promises; in a
      model of a mixed policy that of Keras's own layer has the scales' dtype.

    Where a call is traced (`jit_compile=True`, `export`, `torch.compile`, `torch.export`, `torch.func`,
    `torch.autograd.forward_ad`), and for tables that our operators do not take (complex, a tensor subclass, another
    device than CPU and CUDA), the call is Keras's own; only LoRA still gathers A's rows.
    """

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        # Rows are converted where they are looked up: under a mixed policy Keras casts the whole table.
        kwargs.setdefault("autocast", not ON_TORCH)
        return super().add_weight(*args, **kwargs)

    def call(self, inputs: Any) -> Any:
        if not (ON_TORCH and self.built):
            return super().call(inputs)
        ids = _ids(inputs)
        table = self._embeddings.value
        if self.lora_enabled and table.is_floating_point():
            return self._add_lora(_take(table, ids, traced_accumulation(table.dtype)), ids)
        dtype = getattr(torch, self.compute_dtype)
        if _serves(table, ids, dtype):
            return take_ops.take_rows(table, ids, dtype)
        return super().call(ids)

    def _int8_call(self, inputs: Any, training: bool | None = None) -> Any:
        inputs = _ids(inputs)
        rows = self._dequantize(inputs, bits=8, block_size=None)
        return super()._int8_call(inputs, training) if rows is None else rows

    def _int4_call(self, inputs: Any, training: bool | None = None) -> Any:
        inputs = _ids(inputs)
        rows = self._dequantize(inputs, bits=4, block_size=self._int4_block_size)
        return super()._int4_call(inputs, training) if rows is None else rows

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        # Keras refuses subclasses of its layer, whose call it does not know; this one's it does.
        if type_check and type(self) is not Embedding:
            raise self._not_implemented_error(self.quantize)
        super().quantize(mode, type_check=False, config=config)

    def _dequantize(self, ids: Any, bits: int, block_size: int | None) -> Tensor | None:
        """The rows of a quantized table; None where the call is Keras's own."""
        if not ON_TORCH:
            return None
        scale = self.embeddings_scale.value
        dtype = getattr(torch, self.compute_dtype)
        if self.lora_enabled:
            dtype = traced_accumulation(scale.dtype)
        # Scales have no gradient here, and none in Keras unless somebody made them trainable.
        if scale.requires_grad or not _serves(scale, ids, dtype):
            return None
        one_a_row = block_size in (None, -1)
        rows: Tensor = take_ops.dequantize_rows(
            self._embeddings.value,
            scale,
            None if one_a_row else self.embeddings_zero.value,
            ids,
            self.output_dim,
            self.output_dim if one_a_row else block_size,
            bits,
            dtype,
        )
        return self._add_lora(rows, ids) if self.lora_enabled else rows

    def _add_lora(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The adapters' share added to rows [..., D] in fp32 or fp64, and the sum rounded."""
        a = _take(self.lora_embeddings_a.value, ids, torch.float32)  # [..., rank]
        total = torch.addmm(
            rows.reshape(-1, self.output_dim),
            a.reshape(-1, self.lora_rank).to(rows.dtype),
            self.lora_embeddings_b.value.to(rows.dtype),
            alpha=self.lora_alpha / self.lora_rank,
        )
        return total.view(rows.shape).to(getattr(torch, self.compute_dtype))


def _ids(inputs: Any) -> Any:
    """The ids as a tensor of torch; Keras's own call would cut wide unsigned ones to int32, and find a row."""
    if not ON_TORCH:
        return inputs
    ids = keras.ops.convert_to_tensor(inputs)
    return signed_ids(ids) if ids.dtype in WIDE_UNSIGNED else ids


def _serves(table: Tensor, ids: Tensor, dtype: torch.dtype) -> bool:
    """Whether our operators take a lookup: plain tensors of one device, and nothing that traces or transforms it."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and type(ids) is Tensor
        and type(table) in (Tensor, torch.nn.Parameter)
        and table.device.type in ("cpu", "cuda")
        and table.device == ids.device
        and ids.dtype in KERAS_IDS
        and take_ops.converts(table.dtype, dtype)
    )


def _take(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table in another dtype, by our operator or, where that does not serve, by Keras's."""
    if _serves(table, ids, dtype):
        rows: Tensor = take_ops.take_rows(table, ids, dtype)
    else:
        rows = keras.ops.take(table, ids, axis=0).to(dtype)
    return rows
