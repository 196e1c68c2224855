"""The layers: torch.nn.Embedding and torch.nn.EmbeddingBag with another forward."""

import torch
from torch import Tensor

from .. import functional
from . import opacus_rules


class Embedding(torch.nn.Embedding):
    """A trainable table of `num_embeddings` rows of `embedding_dim` numbers, looked up by integer ids.

    Everything but `forward` is `torch.nn.Embedding`'s own: arguments, attributes, initialisation,
    `state_dict` keys, `from_pretrained`, `extra_repr`. Input: ids of any shape, int64 or int32 as in torch, or
    int16 or uint8. Output: `[*input.shape, embedding_dim]` in the table's dtype, bit-equal to `weight[input]`.

    Errors are those of `gpu_embed.functional.embedding`.

    Example::

        table = gpu_embed.Embedding(200, 32, device="cuda")
        rows = table(torch.tensor([[4, 7, 199]], device="cuda"))  # [1, 3, 32]
    """

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


class EmbeddingBag(torch.nn.EmbeddingBag):
    """Sums, means or maxima of bags of rows of a trainable table.

    Everything but `forward` is `torch.nn.EmbeddingBag`'s own. Input: ids `[B, L]`, or `[N]` with offsets, and
    per-sample weights of the ids' shape. Output: `[B, embedding_dim]` in the table's dtype.

    Errors are those of `gpu_embed.functional.embedding_bag`.

    Example::

        table = gpu_embed.EmbeddingBag(200, 32, mode="sum", device="cuda")
        ids = torch.tensor([4, 7, 199], device="cuda")
        sums = table(ids, torch.tensor([0, 2], device="cuda"))  # of rows 4 and 7, and of row 199: [2, 32]
    """

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


opacus_rules.register_once_imported(Embedding, EmbeddingBag)
