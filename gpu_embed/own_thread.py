"""Work that must not see the caller's modes, nor allocate where the caller does."""

import threading
from collections.abc import Callable
from typing import Any


def on_own_thread(work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` on a short-lived thread; its result or its exception.

    There are no fake tensors and no dispatch modes there, no inference mode, and no memory pool of a CUDA graph that
    the caller is warming up: cudagraph trees take what their own thread allocates into the graph's pool.
    """
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work(*args))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="gpu_embed")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
