"""What NVRTC has compiled, kept on disk: eight ranks and the next start read what the first process made.

The folder is `GPU_EMBED_CACHE_DIR`, or the user's cache folder; an empty `GPU_EMBED_CACHE_DIR` keeps nothing. A folder
that cannot be written, or a file that cannot be read, is no error: the kernel is compiled then.
"""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ... import user_cache


class Compiled(NamedTuple):
    """What NVRTC made of some kernels of one file."""

    image: bytes  # cubin, or PTX for cards newer than NVRTC
    symbols: dict[str, str]  # the name of each expression in the image
    log: str


def file_for(
    source: str, expressions: Sequence[str], options: Sequence[str], nvrtc: str
) -> Path | None:
    """The file of a compilation, named by all that the result depends on; None: no folder.

    Args:
        options: of NVRTC, the architecture among them.
        nvrtc: its version.
    """
    where = user_cache.folder()
    if where is None:
        return None
    depends_on = json.dumps([source, list(expressions), list(options), nvrtc])
    return where / f"{hashlib.sha256(depends_on.encode()).hexdigest()}.json"


def read(file: Path | None) -> Compiled | None:
    """What a file holds; None if there is none, or it is not whole."""
    if file is None:
        return None
    try:
        kept = json.loads(file.read_bytes())
        image = base64.b64decode(kept["image"], validate=True)
        if hashlib.sha256(image).hexdigest() != kept["sha256"]:
            return None
        return Compiled(
            image, {str(k): str(v) for k, v in kept["symbols"].items()}, str(kept["log"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(file: Path | None, compiled: Compiled) -> None:
    """Keep it, for other processes all at once or not at all."""
    if file is None:
        return
    kept = {
        "image": base64.b64encode(compiled.image).decode(),
        "sha256": hashlib.sha256(compiled.image).hexdigest(),
        "symbols": compiled.symbols,
        "log": compiled.log,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".json")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w") as unfinished:
            json.dump(kept, unfinished)
        os.replace(name, file)
    except OSError:
        pass
    finally:
        # Not there any more where all went well.
        with suppress(OSError):
            os.unlink(name)
