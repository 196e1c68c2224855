"""A table of 8-bit or 4-bit integers, in Keras's layout."""

from typing import NamedTuple

from torch import Tensor


class QuantizedTable(NamedTuple):
    """V rows of D columns; each group of columns of a row has a scale, and may have a zero.

    A number is value / scale, or (value - zero) * scale where there are zeros.
    """

    values: Tensor  # int8 [V, D]; of 4 bits [V, ceil(D / 2)], the even column in the lower half of its byte
    scale: Tensor  # float [V], or [V, ceil(D / group_size)]
    zero: Tensor | None  # int8, of scale's shape
    embedding_dim: int
    group_size: int  # columns a scale; embedding_dim: one a row
    bits: int  # 8 or 4

    def adjacent(self) -> "QuantizedTable":
        """The same with its tensors' items adjacent in memory."""
        zero = None if self.zero is None else self.zero.contiguous()
        return self._replace(
            values=self.values.contiguous(), scale=self.scale.contiguous(), zero=zero
        )
