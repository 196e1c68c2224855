"""The Triton kernels behind the `Backend` protocol: launch settings, and the launches by operation."""

from .bag import TritonBags
from .gather import TritonGather
from .gradient import TritonGradient
from .row_update import TritonRowUpdate
from .tables import TritonTables


class TritonBackend(TritonGather, TritonGradient, TritonRowUpdate, TritonBags, TritonTables):
    """`Backend` on the kernels in gpu_embed.kernels.

    With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run in its
    interpreter and take CPU tensors too.
    """
