"""The Triton kernels behind the `Backend` protocol: launch settings, and the launches by operation."""

from .bag import TritonBag
from .gather import TritonGather
from .gradient import TritonGradient
from .renorm import TritonRenorm
from .row_update import TritonRowUpdate
from .sort import TritonSort
from .tables import TritonTables
from .take import TritonTake


class TritonBackend(
    TritonGather,
    TritonSort,
    TritonGradient,
    TritonRenorm,
    TritonRowUpdate,
    TritonBag,
    TritonTables,
    TritonTake,
):
    """`Backend` on the kernels in gpu_embed.kernels.

    With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run in its
    interpreter and take CPU tensors too.
    """
