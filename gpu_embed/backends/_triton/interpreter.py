"""Patches where Triton's interpreter (3.4 to 3.9) differs from a GPU.

It truncates where the hardware rounds to the nearest even bf16, takes integers for the bits of bf16, and gives a
comparison the type of what it compares. Below Triton 3.7 it reads a loop's bounds in a way that NumPy 2.5 refuses.
"""

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter


def complete() -> None:
    """Add all of it, for the rest of the process."""
    if interpreter._convert_float.__module__ != __name__:
        round_to_nearest()
        convert_integers()
        compare_to_booleans()
        read_one_element()


def round_to_nearest() -> None:
    """Replace the conversion from fp32 to bf16."""
    convert = interpreter._convert_float

    def convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return _bfloat16_bits(values.view(np.uint32))
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def convert_integers() -> None:
    """Convert integers to bf16 by way of fp32."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self: Any, values: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and values.dtype.scalar.is_int():
            values = cast(self, values, tl.float32)
        return cast(self, values, target)

    builder.cast_impl = cast_impl


def compare_to_booleans() -> None:
    """Make what is compared a boolean: as an integer, a splat of it becomes a mask that Triton 3.9 refuses."""
    builder = interpreter.InterpreterBuilder
    binary_op = builder.binary_op

    def typed_binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = binary_op(self, lhs, rhs, op)
        if result.data.dtype != np.bool_:
            return result
        return interpreter.TensorHandle(result.data, tl.int1)

    builder.binary_op = typed_binary_op


def read_one_element() -> None:
    """Take the number out of an array of one dimension too, which NumPy 2.5 no longer converts."""
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # A scope, where Triton has one, has noted what was there before.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _bfloat16_bits(bits: Any) -> Any:
    """The upper halves of fp32 bits, rounded to nearest even; a NaN stays one."""
    odd = (bits >> 16) & 1
    rounded = ((bits.astype(np.uint64) + 0x7FFF + odd) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16).astype(np.uint16) | 0x40, rounded).astype(np.uint16)
