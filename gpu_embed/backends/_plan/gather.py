"""Which kernel looks rows up, where one is forced: whole rows, a flat range of words, or tensor descriptors.

Left alone, each backend chooses between the first two by the width of the rows; nothing is known yet of the
speed of descriptors.
"""

from collections.abc import Callable

from ...settings import GATHER_METHOD, Restore


def forced(refusal: Callable[[str], str | None]) -> str:
    """The method that is forced, or "auto".

    Args:
        refusal: what of the call the backend cannot serve with a method; None: nothing.

    Raises RuntimeError if the method cannot serve the call.
    """
    method = GATHER_METHOD.value
    if method != "auto":
        reason = refusal(method)
        if reason is not None:
            raise GATHER_METHOD.cannot_serve("gather method", reason)
    return method


def use_gather_method(name: str) -> Restore:
    """Force how rows are looked up, for tests and benchmarks; "auto" gives the choice back.

    "rows" gives each program whole rows, "flat" an equal piece of the output. "descriptor" copies each row with
    the bulk copy engine: from compute capability 9.0 on, where columns are adjacent and rows 16-byte aligned
    and a multiple of 16 bytes. The triton backend has all three, cupy the first two; the others have no choice
    and ignore it.

    A plain call or a context manager. Raises ValueError for another name. A lookup that the method cannot
    serve raises RuntimeError.
    """
    return GATHER_METHOD.set(name, "use_gather_method")
