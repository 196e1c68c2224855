"""The CUDA C++ kernels behind the `Backend` protocol: compiled by NVRTC, launched by CuPy on torch's stream."""

from .bag import CupyBags
from .gather import CupyGather
from .gradient import CupyGradient
from .row_update import CupyRowUpdate
from .tables import CupyTables


class CupyBackend(CupyGather, CupyGradient, CupyRowUpdate, CupyBags, CupyTables):
    """`Backend` on the CUDA C++ kernels in gpu_embed.kernels."""
