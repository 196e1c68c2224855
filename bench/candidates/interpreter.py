"""What Triton's interpreter lacks, in Triton 3.4 to 3.9, of what the candidates alone need of a GPU.

It multiplies the bits of bf16 as integers, and knows no atomics through tensor descriptors. Below Triton 3.6 it
wants a descriptor's strides to be multiples of 16 elements, not bytes.
"""

from copy import copy
from functools import cache
from typing import Any

import numpy as np
import triton
from triton import language as tl
from triton.runtime import interpreter


@cache
def complete() -> None:
    """Add all of it, once, for the rest of the process."""
    multiply_bfloat16()
    if triton.__version__.startswith(("3.4.", "3.5.")):
        check_strides_in_bytes()
    reduce_through_descriptors()


def multiply_bfloat16() -> None:
    """Widen bf16 operands of a matrix product to fp32, which holds their products exactly."""
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def create_wide_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return create_dot(self, _widened(a), _widened(b), *arguments)

    builder.create_dot = create_wide_dot


def check_strides_in_bytes() -> None:
    """Let a descriptor's strides be multiples of 16 bytes, where Triton asks for 16 elements."""
    handle = interpreter.TensorDescHandle
    validate = handle.validate

    def validate_bytes(self: Any) -> None:
        size = self.base.dtype.element_ty.primitive_bitwidth // 8
        in_bytes = copy(self)
        in_bytes.strides = [
            interpreter.TensorHandle(stride.data * size, stride.dtype)
            for stride in self.strides[:-1]
        ] + self.strides[-1:]
        validate(in_bytes)

    handle.validate = validate_bytes


def reduce_through_descriptors() -> None:
    """tensor_descriptor.atomic_add, in the terms of tl.atomic_add."""

    def create_descriptor_reduce(
        self: Any, kind: Any, desc: Any, value: Any, offsets: list[Any]
    ) -> Any:
        assert kind == interpreter._ir.DESCRIPTOR_REDUCE_KIND.ADD
        assert value.dtype.scalar == tl.float32
        pointers, inside = desc.materialize_pointers(offsets)
        # An array before Triton 3.9.
        if not isinstance(inside, interpreter.TensorHandle):
            inside = interpreter.TensorHandle(inside, tl.int1)
        return self.create_atomic_rmw(
            interpreter._ir.ATOMIC_OP.FADD,
            pointers,
            value,
            inside,
            interpreter._ir.MEM_SEMANTIC.RELAXED,
            interpreter._ir.MEM_SYNC_SCOPE.GPU,
        )

    interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce


def _widened(values: Any) -> Any:
    """bf16 as fp32, anything else as it is."""
    if values.dtype.scalar != tl.bfloat16:
        return values
    bits = values.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
