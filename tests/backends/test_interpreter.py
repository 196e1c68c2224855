"""What is added to Triton's interpreter, so that every version of Triton and NumPy gives what a GPU gives."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
if not triton.knobs.runtime.interpret:
    pytest.skip("the interpreter is off", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

from gpu_embed.backends._triton import interpreter as ours  # noqa: E402

COMPARISONS = sorted(
    name
    for name in dir(interpreter.InterpreterBuilder)
    if name.startswith(("create_icmp", "create_fcmp"))
)


@pytest.fixture(autouse=True)
def completed():
    ours.complete()


def handle(values, dtype):
    return interpreter.TensorHandle(np.array(values, interpreter._get_np_dtype(dtype)), dtype)


@triton.jit
def masked_kernel(source_ptr, copy_ptr, sum_ptr, n, BLOCK: tl.constexpr, NOT: tl.constexpr):
    """Copies and adds where a comparison of scalars, or its opposite, holds."""
    inside = tl.program_id(0) < n
    if NOT:
        inside = ~tl.broadcast_to(inside, (BLOCK,))
    offsets = tl.arange(0, BLOCK)
    mask = inside & (offsets < 3)  # [BLOCK]
    values = tl.load(source_ptr + offsets, mask=mask, other=0.0)  # [BLOCK]
    tl.store(copy_ptr + offsets, values, mask=mask)
    tl.atomic_add(sum_ptr + offsets, values, mask=mask)
    # A scalar's mask, broadcast by the operation itself.
    tl.store(copy_ptr + 3 + offsets, values, mask=tl.broadcast_to(inside, (BLOCK,)))


@pytest.mark.parametrize("opposite", [False, True], ids=["if", "if not"])
@pytest.mark.parametrize("holds", [True, False])
def test_a_comparison_of_scalars_masks_as_on_a_gpu(holds, opposite, monkeypatch):
    """Triton 3.9 refuses a mask that is no boolean; before, its opposite was -2, which is true."""
    native = interpreter._interpreter
    masks = []

    def strict(function, place):
        def call(*arguments):
            masks.append(arguments[place].dtype)
            return function(*arguments)

        return call

    for name, place in (("load", 1), ("store", 2), ("atomic_rmw", 3)):
        monkeypatch.setattr(native, name, strict(getattr(native, name), place))
    source = torch.arange(1.0, 5)
    copy, total = torch.zeros(7), torch.zeros(4)
    masked_kernel[(1,)](source, copy, total, int(holds), BLOCK=4, NOT=opposite)
    assert len(masks) == 4
    assert set(masks) == {np.dtype(bool)}
    copied = torch.tensor([1.0, 2, 3, 1, 2, 3, 0]) * (holds != opposite)
    assert torch.equal(copy, copied)
    assert torch.equal(total, torch.tensor([1.0, 2, 3, 0]) * (holds != opposite))


@pytest.mark.parametrize("name", COMPARISONS)
def test_what_is_compared_is_a_boolean(name):
    dtype = tl.float32 if "fcmp" in name else tl.int64
    compare = getattr(interpreter.interpreter_builder, name)
    result = compare(handle([1], dtype), handle([2], dtype))
    assert result.dtype == tl.int1
    assert result.data.dtype == np.bool_


def test_sums_keep_their_type():
    result = interpreter.interpreter_builder.create_add(
        handle([1], tl.int64), handle([2], tl.int64)
    )
    assert (result.dtype, result.data.tolist()) == (tl.int64, [3])


@pytest.mark.parametrize("scoped", [True, False], ids=["with a scope", "without"])
def test_bounds_of_loops_are_read_from_arrays_of_one_element(scoped, monkeypatch):
    """Below Triton 3.7 the line is int(array), deprecated in NumPy 1.25 and refused by NumPy 2.5."""

    def patch_as_below_3_7(tensor, *scope):
        assert len(scope) == scoped
        tensor.__index__ = lambda self: int(self.handle.data)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_as_below_3_7)
    ours.read_one_element()

    class Tensor:
        def __init__(self, values):
            self.handle = SimpleNamespace(data=np.array(values))

    interpreter._patch_lang_tensor(Tensor, *[object()] * scoped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(range(Tensor([2]), Tensor(4))) == [2, 3]
        with pytest.raises(ValueError):
            range(Tensor([2, 3]))
