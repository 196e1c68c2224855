"""Locks that a forked process finds free."""

import os
import threading
from contextlib import AbstractContextManager


def forkable_lock() -> AbstractContextManager[bool]:
    """A lock for the life of the process: a fork waits until no other thread holds it.

    Else a child that is forked meanwhile, as a data loader's worker is, would wait for a thread that it has not got. A
    fork takes the locks of modules that were imported last first: so must who takes several.
    """
    lock = threading.RLock()
    # Not on Windows, which has no fork.
    if hasattr(os, "register_at_fork"):
        release = lock.release
        os.register_at_fork(before=lock.acquire, after_in_parent=release, after_in_child=release)
    return lock
