"""The user's cache folder: compiled kernels, and what was tuned on this machine."""

import os
import sys
from pathlib import Path

VARIABLE = "GPU_EMBED_CACHE_DIR"


def folder() -> Path | None:
    """Where the files lie; None: nowhere."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local") / "gpu_embed"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "gpu_embed"
