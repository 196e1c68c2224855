"""The CUDA C++ kernels behind the `Backend` protocol: compiled by NVRTC, launched by CuPy on torch's stream."""

from .bag import CupyBag
from .gather import CupyGather
from .gradient import CupyGradient
from .renorm import CupyRenorm
from .row_update import CupyRowUpdate
from .sort import CupySort
from .tables import CupyTables
from .take import CupyTake


class CupyBackend(
    CupyGather, CupySort, CupyGradient, CupyRenorm, CupyRowUpdate, CupyBag, CupyTables, CupyTake
):
    """`Backend` on the CUDA C++ kernels in gpu_embed.kernels."""
