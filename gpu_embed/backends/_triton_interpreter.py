"""Triton's interpreter, made to round to bf16 as a GPU does.

Up to Triton 3.7 the interpreter truncates where the hardware rounds to nearest even.
"""

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter


def round_to_nearest() -> None:
    """Replace the interpreter's fp32 to bf16 conversion, for the rest of the process."""
    convert = interpreter._convert_float
    if convert.__module__ == __name__:
        return

    def convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return _bfloat16_bits(values.view(np.uint32))
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def _bfloat16_bits(bits: Any) -> Any:
    """The upper halves of fp32 bits, rounded to nearest even; a NaN stays one."""
    odd = (bits >> 16) & 1
    rounded = ((bits.astype(np.uint64) + 0x7FFF + odd) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16).astype(np.uint16) | 0x40, rounded).astype(np.uint16)
