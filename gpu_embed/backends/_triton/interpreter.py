"""What Triton's interpreter lacks, up to Triton 3.7, of what a GPU does.

It truncates where the hardware rounds to the nearest even bf16, takes integers for the bits of bf16, multiplies
those bits as integers, and knows no atomics through tensor descriptors.
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
        multiply_bfloat16()
        reduce_through_descriptors()


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


def multiply_bfloat16() -> None:
    """Widen bf16 operands of a matrix product to fp32, which holds their products exactly."""
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def create_wide_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return create_dot(self, _widened(a), _widened(b), *arguments)

    builder.create_dot = create_wide_dot


def reduce_through_descriptors() -> None:
    """tensor_descriptor.atomic_add, in the terms of tl.atomic_add."""

    def create_descriptor_reduce(
        self: Any, kind: Any, desc: Any, value: Any, offsets: list[Any]
    ) -> Any:
        assert kind == interpreter._ir.DESCRIPTOR_REDUCE_KIND.ADD
        assert value.dtype.scalar == tl.float32
        pointers, inside = desc.materialize_pointers(offsets)
        return self.create_atomic_rmw(
            interpreter._ir.ATOMIC_OP.FADD,
            pointers,
            value,
            interpreter.TensorHandle(inside, tl.int1),
            interpreter._ir.MEM_SEMANTIC.RELAXED,
            interpreter._ir.MEM_SYNC_SCOPE.GPU,
        )

    interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce


def _bfloat16_bits(bits: Any) -> Any:
    """The upper halves of fp32 bits, rounded to nearest even; a NaN stays one."""
    odd = (bits >> 16) & 1
    rounded = ((bits.astype(np.uint64) + 0x7FFF + odd) >> 16).astype(np.uint16)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16).astype(np.uint16) | 0x40, rounded).astype(np.uint16)


def _widened(values: Any) -> Any:
    """bf16 as fp32, anything else as it is."""
    if values.dtype.scalar != tl.bfloat16:
        return values
    bits = values.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
