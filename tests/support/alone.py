"""Run code where some packages cannot be imported."""

import subprocess
import sys

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
"""


def alone(code, blocked, *paths, block=True):
    """Run code in an interpreter of its own, in which some packages cannot be imported."""
    blocker = BLOCK if block else BLOCK.replace("sys.meta_path.insert(0, Blocker())", "")
    # -I: no variable and no folder of the caller leads to packages.
    command = [sys.executable, "-I", "-c", f"BLOCKED = {blocked!r}\n{blocker}{code}"]
    command += map(str, paths)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
