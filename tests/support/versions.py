"""Try other versions of torch, Triton and NumPy, in an environment of their own.

    python tests/support/versions.py ROW

makes build/versions/ROW anew with pip and runs in it the tests of the kernels in Triton's interpreter, of known
launches and of modules. ROW is one of ROWS; `newest` takes the newest release of each. No GPU is needed.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """One set of versions that people have together; no version is the newest."""

    python: str
    torch: str
    triton: str
    numpy: str
    # Whether launches past Triton's own path are made with this Triton.
    known_launch: bool = True


ROWS = {
    "lowest": Row("3.10", "2.8.0", "3.4.0", "2.2.6", known_launch=False),
    "images": Row("3.12", "2.11.0", "3.6.0", "2.5.5"),
    "pinned": Row("3.11", "2.13.0", "3.7.1", "2.4.6"),
    "middle": Row("3.11", "2.14.1", "3.8.0", "2.4.6"),
    "newest": Row("", "", "", ""),
}
TOOLS = ["setuptools", "pytest", "pytest-xdist", "hypothesis", "expecttest"]
KERNEL_TESTS = [
    *(f"tests/api/test_{name}.py" for name in ("forward", "gradient", "bag", "tables", "renorm")),
    *(f"tests/backends/test_{name}.py" for name in ("take", "row_update")),
]
TESTS = [
    [*KERNEL_TESTS, "-k", "triton-cpu"],
    ["tests/backends/test_interpreter.py", "tests/api/test_module.py"],
]
KNOWN_LAUNCH_TESTS = ["tests/backends/test_known_launch.py"]


def release(name: str, version: str) -> str:
    return f"{name}=={version}" if version else name


def install_commands(row: Row, python: str) -> list[list[str]]:
    """What makes the environment whose interpreter is `python`."""
    pip = [python, "-m", "pip", "install"]
    return [
        [*pip, "-c", str(ROOT / "constraints.txt"), *TOOLS],
        # With what it asks for: the CUDA build does not load without CUDA's libraries.
        [*pip, release("torch", row.torch)],
        # torch asks for one Triton; compiling and interpreting need no more than the package.
        [
            *pip,
            "--no-deps",
            "--upgrade",
            release("triton", row.triton),
            release("numpy", row.numpy),
        ],
        [*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)],
    ]


def try_row(
    row: Row, folder: Path, call: Callable[..., "subprocess.CompletedProcess[bytes]"]
) -> int:
    """Install, test, and return how many parts of the tests failed.

    Raises:
        subprocess.CalledProcessError: something could not be installed.
    """
    call([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin" / "python3")
    for command in install_commands(row, python):
        call(command, check=True)
    call([python, "-m", "pip", "list"], check=True)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    pytest = [python, "-m", "pytest", "--full", "-n", "auto", "-p", "no:cacheprovider"]
    # Every part runs, so that one failure hides no other.
    parts = [*TESTS, KNOWN_LAUNCH_TESTS] if row.known_launch else TESTS
    ended = [call([*pytest, *tests], cwd=ROOT, env=env).returncode for tests in parts]
    return sum(code != 0 for code in ended)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=ROWS)
    name = parser.parse_args(arguments).row
    row = ROWS[name]
    here = "{}.{}".format(*sys.version_info[:2])
    if row.python not in ("", here):
        parser.error(
            f"{name} is tried with Python {row.python}, this is {here}: "
            f"make versions ROW={name} PYTHON=python{row.python}"
        )
    return try_row(row, ROOT / "build" / "versions" / name, subprocess.run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
