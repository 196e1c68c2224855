"""Launch of the kernel that scales rows down to a norm."""

from torch import Tensor

from .._plan.access import cdiv
from .._plan.renorm import RenormPlan, norm_name
from .device import TritonDevice
from .launch import RENORM_ITEMS, next_power_of_2


class TritonRenorm(TritonDevice, RenormPlan):
    """Rows scaled down to a norm."""

    def _renorm(
        self, weight: Tensor, keys: Tensor, last_valid_key: int, max_norm: float, norm_type: float
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        block_d = min(next_power_of_2(embedding_dim), RENORM_ITEMS)
        block_n = RENORM_ITEMS // block_d
        self._launch(
            self._kernels.renorm,
            (cdiv(keys.numel(), block_n),),
            weight.device,
            weight,
            keys,
            keys.numel(),
            num_embeddings,
            last_valid_key,
            *weight.stride(),
            max_norm,
            # Only the general formula reads it.
            norm_type=norm_type if norm_name(norm_type) == "p" else 0.0,
            D=embedding_dim,
            NORM=norm_name(norm_type),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
