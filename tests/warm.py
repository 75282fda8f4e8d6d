"""Processes of their own for tests, without the five seconds in which each would load torch and the training first.

    process = Process(TRAIN, "--data_path", shards, …)        # as `python -c TRAIN --data_path …`, on the CPU
    output, _ = process.communicate(timeout=60)

A server that has loaded everything, has one thread and never computes anything itself is forked for each of them. What is so of
a process that Python starts from scratch is so of these: environment, a session and output of their own, exit codes, signals,
random numbers to begin with. Only their command line is that of the server.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
TRAIN = "import sys; from vfi import train; train.main(sys.argv[1:])"
TORCHRUN = "from torch.distributed.run import main; main()"
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_SERVER = multiprocessing.get_context("forkserver")
# the second and the third are loaded late otherwise, by each process again
_SERVER.set_forkserver_preload(["vfi.train", "torch._dynamo", "torch.nn.parallel", "torch.distributed.run"])


class Process:
    """Python code in a process of its own: of subprocess.Popen's methods those that tests need."""

    def __init__(self, code: str, *arguments: object, limit: int = 0, **environment: str) -> None:
        """`limit`: bytes to which the system lets its files grow."""
        self.arguments = list(map(str, arguments))
        self.output, writing = _SERVER.Pipe(duplex=False)
        settings = os.environ | ON_CPU | environment
        self.process = _SERVER.Process(target=_live, args=(code, self.arguments, settings, limit, writing))
        with mock.patch.dict(os.environ, ON_CPU):  # of the server, which the first one starts
            self.process.start()
        writing.close()
        self.pid: int = self.process.pid

    @property
    def returncode(self) -> int | None:
        """As far as known: negative after a signal."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Has it ended?"""
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What it and its children printed, once all of them have closed their output and it has ended."""
        deadline, pieces = time.monotonic() + timeout, list[bytes]()
        while not pieces or pieces[-1]:
            if not select.select([self.output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout, b"".join(pieces))
            pieces.append(os.read(self.output.fileno(), 1 << 16))
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, b"".join(pieces))
        return b"".join(pieces).decode(), None

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """By SIGKILL, and wait until it has ended."""
        self.send_signal(signal.SIGKILL)
        self.process.join()


def start_ranks(number: int, code: str, *arguments: object, **environment: str) -> list[Process]:
    """The processes of one run, as a launcher starts them on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [Process(code, *arguments, **common, **rank, **environment) for rank in own]


def finish(processes: list[Process], timeout: float = 300) -> list[str]:
    """What they printed; AssertionError unless all of them end well."""
    outputs = [process.communicate(timeout)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def _live(code: str, arguments: list[str], environment: dict[str, str], limit: int, output: Connection) -> None:
    """The forked process."""
    assert len(list(Path(f"/proc/{os.getppid()}/task").iterdir())) == 1, "a fork would lose threads"
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    multiprocessing.set_start_method("fork", force=True)  # of loader processes; as it was for this one otherwise
    gc.freeze()  # as in tests/conftest.py
    torch.set_num_threads(1)
    random.seed()  # all would begin with the numbers of the server
    np.random.seed()
    torch.seed()
    sys.argv[:] = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


@atexit.register
def _kill_what_is_left() -> None:
    """After a test that failed: the end of this process waits for them otherwise."""
    for process in multiprocessing.active_children():
        process.kill()
