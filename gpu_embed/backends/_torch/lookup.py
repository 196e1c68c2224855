"""Lookups in torch's operators, their gradients, and what else goes by rows of one table."""

import torch
from torch import Tensor

from ...bounds import BoundsRecord, in_table
from ...dtypes import TORCH_IDS, accumulation
from ..protocol import PreparedEmbedding


class TorchLookup:
    """Lookups in one table. Casts int16 and uint8 ids, which torch does not take."""

    def embedding(
        self, weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
    ) -> Tensor:
        return self._embedding(weight, indices, zero_idx, record, weight.shape[0])

    def _embedding(
        self,
        weight: Tensor,
        indices: Tensor,
        zero_idx: int,
        record: BoundsRecord | None,
        recorded_rows: int,
    ) -> Tensor:
        ids = torch_ids(indices)
        if zero_idx < 0 and weight.shape[0] and not ids.is_cuda:
            # torch's CPU kernel checks the ids itself; only its failure needs a second look.
            try:
                return torch.embedding(weight, ids)
            except IndexError:
                pass
        if record is not None:
            record.write(ids, recorded_rows)
        if weight.shape[0] == 0:
            return weight.new_zeros((*indices.shape, weight.shape[1]))
        ids = ids.contiguous()  # torch.where would hand its strides on to the output
        read = in_table(ids, weight.shape[0]) & (ids != zero_idx)
        rows = torch.embedding(weight, torch.where(read, ids, 0))
        return torch.where(read[..., None], rows, rows.new_zeros(()))

    def prepare_embedding(self, weight: Tensor) -> PreparedEmbedding:
        if weight.is_cuda or weight.shape[0] == 0:
            return self.embedding

        def embedding(
            weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
        ) -> Tensor:
            if zero_idx < 0 and indices.dtype in TORCH_IDS:
                # As above: torch's CPU kernel checks the ids itself.
                try:
                    return torch.embedding(weight, indices)
                except IndexError:
                    pass
            return self.embedding(weight, indices, zero_idx, record)

        return embedding

    def embedding_dense_backward(
        self,
        grad_output: Tensor,
        indices: Tensor,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        ids = torch_ids(indices).reshape(-1)
        grad_output = grad_output.reshape(ids.numel(), grad_output.shape[-1])
        kept = in_table(ids, num_embeddings)
        if ids.is_cuda:
            # torch's kernels trust the ids, so those out of range go to an extra row, without a sync.
            ids = torch.where(kept, ids, num_embeddings)
            return torch.ops.aten.embedding_dense_backward(
                grad_output, ids, num_embeddings + 1, padding_idx, scale_grad_by_freq
            )[:num_embeddings]
        if not kept.all():
            ids, grad_output = ids[kept], grad_output[kept]
        if grad_output.dtype in (torch.float16, torch.bfloat16):
            return _dense_backward_in_fp32(
                grad_output, ids, num_embeddings, padding_idx, scale_grad_by_freq
            )
        return torch.ops.aten.embedding_dense_backward(
            grad_output, ids, num_embeddings, padding_idx, scale_grad_by_freq
        )

    def embedding_renorm_(
        self, weight: Tensor, indices: Tensor, max_norm: float, norm_type: float
    ) -> None:
        ids = torch_ids(indices).reshape(-1)
        kept = in_table(ids, weight.shape[0])
        ids = torch.where(kept, ids, 0)
        rows = weight[ids]
        wide = rows.to(accumulation(rows.dtype))
        norm = torch.linalg.vector_norm(wide, norm_type, dim=1)
        scaled = (norm > max_norm) & kept.all()
        renormed = (wide * (max_norm / (norm + 1e-7))[:, None]).to(rows.dtype)
        # An id that occurs twice writes the same row twice: every copy was scaled from the old table.
        weight[ids] = torch.where(scaled[:, None], renormed, rows)

    def embedding_counts(self, indices: Tensor, num_embeddings: int) -> Tensor:
        ids = torch_ids(indices).reshape(-1)
        ids = torch.where(in_table(ids, num_embeddings), ids, num_embeddings)
        counts = torch.zeros(num_embeddings + 1, dtype=torch.int32, device=ids.device)
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        return counts[:num_embeddings]


def torch_ids(indices: Tensor) -> Tensor:
    return indices if indices.dtype in TORCH_IDS else indices.to(torch.int32)


def _dense_backward_in_fp32(
    grad_output: Tensor,
    ids: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """The gradient of a 16-bit table, summed in fp32 over the used rows only.

    torch's CPU kernel sums in 16 bit, which stops growing at 256 (bf16) or 2048 (fp16).
    """
    kept = ids != padding_idx
    rows, run = torch.unique(ids[kept], return_inverse=True)
    total = torch.zeros(
        len(rows), grad_output.shape[1], dtype=torch.float32, device=grad_output.device
    )
    total.index_add_(0, run, grad_output[kept].float())
    if scale_grad_by_freq:
        total /= torch.bincount(run, minlength=len(rows))[:, None]
    grad_weight = grad_output.new_zeros(num_embeddings, grad_output.shape[1])
    grad_weight[rows] = total.to(grad_output.dtype)
    return grad_weight
