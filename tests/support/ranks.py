"""Groups of gloo processes on the CPU that run the cases of many tests, one after another.

A test calls `Ranks(size).run(case, *arguments)`; the case is a function at the top of the test's file, and runs on each
rank. Imports take seconds, so each rank is forked from a server that has done them, and serves until a case fails.
"""

import faulthandler
import functools
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gpu_embed

SUPPORT = Path(__file__).parent
# What a first case would import, on each rank.
PRELOAD = (
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)
# Seconds: a case's own, and what the other ranks get once one has failed.
LIMIT, GRACE = 60, 3


class Ranks:
    """`size` processes in one process group. They start at the first case, and anew after one that failed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, case: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
        """What `case(*arguments)` returns on each rank; AssertionError with each rank's traceback if one raises."""
        if not self._processes:
            self._start()
        call = case.__module__, sys.modules[case.__module__].__file__, case.__qualname__
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((*call, pickle.dumps(arguments))))
        answers = self._answers(time.monotonic() + limit)
        if all(answer is not None and answer[0] for answer in answers):
            return [answer[1] for answer in answers]
        texts = [self._stack(rank) if one is None else one[1] for rank, one in enumerate(answers)]
        passed = [answer is not None and answer[0] for answer in answers]
        self.close()
        lines = [
            f"--- rank {rank} of {self.size}: {'passed' if good else text}"
            for rank, (good, text) in enumerate(zip(passed, texts, strict=True))
        ]
        raise AssertionError("\n".join([f"{case.__qualname__}{arguments}", *lines]))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "ranks"])
        self._folder = tempfile.TemporaryDirectory()
        paths = str(SUPPORT), str(Path(gpu_embed.__file__).parents[1]), os.environ.get("PYTHONPATH")
        environment = {
            # The server looks for what it imports where Python does.
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            # Read when triton is imported, which torch._dynamo does.
            "TRITON_INTERPRET": "1",
            # All processes are on this machine.
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }
        with mock.patch.dict(os.environ, environment):
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, self.size, self._folder.name, theirs), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)

    def _answers(self, deadline: float) -> list[tuple[bool, Any] | None]:
        """Of each rank whether it passed, with its value or traceback; None: no answer in time."""
        answers: list[tuple[bool, Any] | None] = [None] * self.size
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            left = max(deadline - time.monotonic(), 0)
            ready = multiprocessing.connection.wait(list(waiting), left)
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    answers[rank] = False, f"ended with exit code {code}"
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _stack(self, rank: int) -> str:
        """Where a rank that gives no answer is."""
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return "no answer in time\n" + (Path(self._folder.name) / f"stack{rank}").read_text()


def _serve(rank: int, size: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    with open(os.path.join(folder, f"stack{rank}"), "w") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        store = dist.FileStore(os.path.join(folder, "store"), size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT)
        )
        while True:
            try:
                name, file, case, arguments = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            try:
                answer = True, getattr(_module(name, file), case)(*pickle.loads(arguments))
            except BaseException:
                answer = False, traceback.format_exc()
            pipe.send_bytes(pickle.dumps(answer))


def _module(name: str, file: str) -> Any:
    """A test's file under its own name: pytest imports it by its place, and so do the ranks."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# For the cases.


@functools.cache
def mesh(*shape: int) -> DeviceMesh:
    """A mesh of all ranks. Making one is a collective: made once."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])
