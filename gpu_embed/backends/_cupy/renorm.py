"""Launch of the kernel that scales rows down to a norm."""

from torch import Tensor

from .._plan.renorm import RenormPlan, norm_name
from .device import FLOATS, CupyDevice
from .launch import RENORM
from .nvrtc import Kernel

# In the order of the enum in renorm.cu.
NORMS = ("inf", "-inf", "0", "1", "2", "p")


class CupyRenorm(CupyDevice, RenormPlan):
    """Rows scaled down to a norm."""

    def _renorm(
        self, weight: Tensor, keys: Tensor, last_valid_key: int, max_norm: float, norm_type: float
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        self._launch(
            Kernel("renorm", f"renorm_kernel<{FLOATS[weight.dtype]}>"),
            *RENORM.grid(keys.numel()),
            weight.device,
            weight,
            keys,
            keys.numel(),
            num_embeddings,
            last_valid_key,
            weight.stride(0),
            weight.stride(1),
            max_norm,
            norm_type,
            embedding_dim,
            NORMS.index(norm_name(norm_type)),
            keys.element_size(),
        )
