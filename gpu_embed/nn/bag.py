"""torch.nn.EmbeddingBag with another forward."""

from typing import TYPE_CHECKING, Any, cast

import torch
from numpy import ndarray
from torch import Tensor

from .. import functional
from .padding import zero_padding_row
from .pretrained import as_tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class EmbeddingBag(torch.nn.EmbeddingBag):
    """Sums, means or maxima of bags of rows of a trainable table.

    Everything but `forward` is `torch.nn.EmbeddingBag`'s own; `from_pretrained` takes a NumPy array too. Input: ids
    `[B, L]`, or `[N]` with offsets, and per-sample weights of the ids' shape. Output: `[B, embedding_dim]` in the
    table's dtype.

    Errors are those of `gpu_embed.functional.embedding_bag`.

    Example::

        table = gpu_embed.EmbeddingBag(200, 32, mode="sum", device="cuda")
        ids = torch.tensor([4, 7, 199], device="cuda")
        sums = table(ids, torch.tensor([0, 2], device="cuda"))  # of rows 4 and 7, and of row 199: [2, 32]
    """

    # Called by reset_parameters.
    _fill_padding_idx_with_zero = zero_padding_row

    @classmethod
    def from_pretrained(cls, embeddings: Tensor | ndarray, *args: Any, **kwargs: Any) -> "Self":
        """As torch's, and of a NumPy array [V, D] too, which is copied."""
        made = super().from_pretrained(as_tensor(embeddings), *args, **kwargs)
        return cast("Self", made)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        return functional.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
