"""torch.nn.Embedding with another forward."""

from typing import TYPE_CHECKING, Any

import torch
from numpy import ndarray
from torch import Tensor

from .. import functional
from .padding import zero_padding_row
from .pretrained import as_tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Embedding(torch.nn.Embedding):
    """A trainable table of `num_embeddings` rows of `embedding_dim` numbers, looked up by integer ids.

    Everything but `forward` and the padding row of a sharded table is `torch.nn.Embedding`'s own: arguments,
    attributes, initialisation, `state_dict` keys, `extra_repr`; `from_pretrained` takes a NumPy array too. Input: ids
    of any shape, int64 or int32 as in torch, or int16 or uint8. Output: `[*input.shape, embedding_dim]` in the table's
    dtype, bit-equal to `weight[input]`.

    Errors are those of `gpu_embed.functional.embedding`.

    Example::

        table = gpu_embed.Embedding(200, 32, device="cuda")
        rows = table(torch.tensor([[4, 7, 199]], device="cuda"))  # [1, 3, 32]
    """

    # Called by reset_parameters.
    _fill_padding_idx_with_zero = zero_padding_row

    @classmethod
    def from_pretrained(cls, embeddings: Tensor | ndarray, *args: Any, **kwargs: Any) -> "Self":
        """As torch's, and of a NumPy array [V, D] too, which is copied."""
        return super().from_pretrained(as_tensor(embeddings), *args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
