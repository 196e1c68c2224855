"""Which tables the bulk copy engine of tensor descriptors can serve."""

from torch import Tensor

from .._plan.access import VECTOR_BYTES, word_layout
from .device import DESCRIPTOR_CAPABILITY, TritonDevice

# The engine's coordinates are 32 bit.
MAX_COORDINATE = 2**31 - 1


class DescriptorRules(TritonDevice):
    """Refusals of tensor descriptors."""

    def _descriptor_refusal(self, table: Tensor) -> str | None:
        """What keeps the bulk copy engine from a table's rows; None: nothing."""
        capability = self._capability(table.device)
        if capability < DESCRIPTOR_CAPABILITY:
            return "compute capability {}.{}; it needs {}.{}".format(
                *capability, *DESCRIPTOR_CAPABILITY
            )
        layout = word_layout(table)
        if layout.word_bytes * layout.vec < VECTOR_BYTES or layout.row_stride < layout.row_words:
            return (
                f"rows of {table.shape[1]} x {table.dtype} at strides {table.stride()}; it needs rows "
                f"side by side, at multiples of {VECTOR_BYTES} bytes, and so many bytes long"
            )
        if table.shape[0] > MAX_COORDINATE:
            return too_many(table.shape[0], "rows")
        return None


def too_many(number: int, what: str) -> str:
    """Why tensor descriptors refuse so many rows or ids."""
    return f"{number} {what}; it takes {MAX_COORDINATE}"
