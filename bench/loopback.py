"""The loopback of a network namespace of one's own: what goes over it was sent by the processes in it alone.

As a program: brings the loopback up, reads it once, and fails where the machine does not let it.
"""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

# A namespace of one's own, for which no root is needed where the system allows it.
UNSHARE = ("unshare", "--map-root-user", "--net")
COUNTERS = Path("/proc/net/dev")
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


def has_namespaces() -> bool:
    """Whether a command may be run in a network namespace of its own, and count there."""
    if shutil.which(UNSHARE[0]) is None:
        return False
    probe = subprocess.run([*UNSHARE, sys.executable, __file__], capture_output=True)
    return probe.returncode == 0


def bring_up() -> None:
    """A new namespace has a loopback that is down."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def sent_bytes() -> int:
    """What this namespace has sent over its loopback, the headers of the packets included."""
    (line,) = (line for line in COUNTERS.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


if __name__ == "__main__":
    bring_up()
    sent_bytes()
