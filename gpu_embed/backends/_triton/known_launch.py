"""Cache of compiled binaries, keyed by Triton's own specialization (dtype, == 1, % 16); skips `JITFunction.run`.

`kernel[grid](...)` derives the type of each argument, the options and the environment anew in every call, which takes
the host longer than the rest of a lookup. The key below is as fine as Triton's or finer, and the binary is the one
that Triton chose. Settings of the process are in the key too: profilers that instrument, `knobs.runtime.debug`.
"""

import threading
from functools import cache, lru_cache
from typing import Any

from ...settings import KNOWN_LAUNCH

# Versions whose launch path was compared with this one; with any other, Triton launches.
CHECKED_VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
# Knobs that change a binary, where the version has them.
KNOBS = ("instrumentation_mode", "fpsan_homomorphic_casts")
INT32 = 2**31
INT64 = 2**63
# Triton specializes on addresses and integers that are multiples of 16.
ALIGNMENT_MASK = 15

Key = tuple[Any, ...]


def launch(
    kernel: Any, grid: tuple[int, ...], device: int | None, args: Key, settings: dict[str, Any]
) -> None:
    """`kernel[grid](*args, **settings)` on this device, which is the current one.

    Args:
        settings: the kernel's constants, by name, and Triton's options.
    """
    if not is_used():
        with _first_launch:
            kernel[grid](*args, **settings)
        return
    key = _key(kernel, device, args, settings)
    known = _binaries.get(key)
    if known is not None:
        binary, constants, _ = known
        binary[(*grid, 1, 1)[:3]](*args, *constants)
        return
    # A thread that meets another's half-loaded binary would launch nothing.
    with _first_launch:
        binary = kernel[grid](*args, **settings)
    # A cache hook may have kept Triton from compiling, and what compiles in the background is no binary yet.
    if key is not None and hasattr(type(binary), "__getitem__"):
        rest = kernel.params[len(args) :]
        constants = tuple(settings.get(param.name, param.default) for param in rest)
        # The kernel is kept, as its id is in the key.
        _binaries[key] = binary, constants, kernel


@cache
def is_used() -> bool:
    """Whether launches are remembered in this process: see `unused_reason`."""
    return unused_reason() is None


def unused_reason() -> str | None:
    """Why each launch goes Triton's own way; None: it does not."""
    import triton

    if KNOWN_LAUNCH.value == "0":
        return f"{KNOWN_LAUNCH.variable}=0"
    if triton.__version__ not in CHECKED_VERSIONS:
        return (
            f"triton {triton.__version__} is not a checked version ({', '.join(CHECKED_VERSIONS)})"
        )
    return None


def _key(kernel: Any, device: int | None, args: Key, settings: dict[str, Any]) -> Key | None:
    """What Triton specialises a binary for; None: an argument whose type is not known here, or a hook on the way."""
    try:
        runtime, compilation = _knobs()
        # Not every version has all of these.
        if kernel.pre_run_hooks or getattr(runtime, "add_stages_inspection_hook", None) is not None:
            return None
        # A kernel's own hash takes as long as two arguments.
        key: list[Any] = [id(kernel), device, runtime.debug]
        key += [getattr(compilation, knob, None) for knob in KNOBS]
        key += settings
        key += settings.values()
        append = key.append
        for arg in args:
            kind = type(arg)
            if kind is int:
                append(_number_kind(arg))
            elif arg is None or kind is float:
                append(kind)
            else:
                append(arg.dtype)
                append(arg.data_ptr() & ALIGNMENT_MASK)
    except AttributeError:
        return None
    return tuple(key)


@cache
def _knobs() -> tuple[Any, Any]:
    from triton import knobs

    return knobs.runtime, knobs.compilation


@lru_cache(maxsize=2**14)
def _number_kind(number: int) -> int:
    """Numbers of one kind are the same to Triton: 1, multiples of 16, and the others, each by its width."""
    width = 0 if -INT32 <= number < INT32 else 1 if -INT64 <= number < INT64 else 2
    return 4 * width + 2 * (number & ALIGNMENT_MASK == 0) + (number == 1)


_binaries: dict[Key | None, tuple[Any, Key, Any]] = {}
_first_launch = threading.RLock()
