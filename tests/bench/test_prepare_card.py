"""Kernels that are compiled for the machine of a card: under the names that Triton looks for there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

import triton
from commands import ROOT

from gpu_embed.bench import prepare_card
from gpu_embed.bench.codegen.compile import record_launches

# What the sum is taken over, but for the library, which is large.
SUMMED = ("backends", "compiler", "language", "runtime")


@pytest.fixture
def unpacked(tmp_path):
    """A Triton of another Python: the same files, and another library."""
    installed = Path(triton.__file__).parent
    for name in SUMMED:
        ignored = shutil.ignore_patterns("bin", "include", "lib", "__pycache__")
        shutil.copytree(installed / name, tmp_path / "triton" / name, ignore=ignored)
    (tmp_path / "triton/_C").mkdir()
    for library in (installed / "_C").glob("libtriton.*"):
        (tmp_path / "triton/_C" / library.name).write_bytes(b"another")
    shutil.copy(installed / "__init__.py", tmp_path / "triton")
    return tmp_path


def key_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.cache, "triton_key", None)
        prepare_card.use_key_of(folder)
        return triton.runtime.cache.triton_key()


@pytest.mark.full
def test_the_key_is_the_one_of_the_unpacked_triton(unpacked, monkeypatch):
    own = triton.runtime.cache.triton_key()
    installed = Path(triton.__file__).parents[1]
    assert key_of(installed, monkeypatch) == own
    other = key_of(unpacked, monkeypatch)
    assert other != own
    for library in (unpacked / "triton/_C").iterdir():
        library.write_bytes((installed / "triton/_C" / library.name).read_bytes())
    assert key_of(unpacked, monkeypatch) == own


def test_the_measured_shapes_launch_what_can_be_compiled():
    cases = list(prepare_card.measured_cases())
    assert len(cases) == len(set(cases)) > 50
    launches, failures = record_launches(cases)
    assert not failures
    assert {launch.case for launch in launches} == set(map(str, cases))


@pytest.mark.full
def test_the_self_check_is_compiled(tmp_path):
    """In a process of its own, since Triton's driver stays replaced; no kernel twice."""
    code = (
        "from gpu_embed.bench import prepare_card as p; "
        "p.CASES = (); p.MEASURED = (); print(*p.compile_launches(90))"
    )
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_STORE_BINARY_ONLY": "1"}
    environ.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    launches, failures = done.stdout.split(maxsplit=1)
    assert failures == "{}\n"
    assert 15 < len(list(tmp_path.glob("*/*.cubin"))) <= int(launches)


def test_wrong_arguments_are_refused(capsys):
    assert prepare_card.main([]) == 2
    assert "usage: python -m gpu_embed.bench.prepare_card" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="bash")
@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--help"], {}, "usage: bench/prepare_card.sh"),
        (["out"], {}, "usage: bench/prepare_card.sh"),
        ([], {"SM": "sm_90"}, "SM=sm_90: give a number"),
        ([], {"TRITON_CACHE_DIR": "{}/kept"}, "/kept is no empty folder"),
        ([], {"TRITON_CACHE_DIR": "{}/kept/file"}, "/kept/file is no empty folder"),
    ],
)
def test_the_script_refuses_before_it_downloads_or_deletes(tmp_path, arguments, environ, said):
    kept = tmp_path / "kept/file"
    kept.parent.mkdir()
    kept.touch()
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    python.chmod(0o755)
    environ = {name: text.format(tmp_path) for name, text in environ.items()}
    environ = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "PYTHON": str(python), **environ}
    command = [ROOT / "bench/prepare_card.sh", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert kept.exists()
    assert not (tmp_path / "called").exists()
