"""Run a list of tasks in several processes: results in order, errors that name the task, no orphaned workers.

    results = run(function, tasks, workers=4, name=str, title="read clips")

With `workers` 0 or 1, tasks run in this process. Processes are spawned, never forked, as the caller may hold threads and locks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from tqdm import tqdm

from shards.schema import ShardError

Task = TypeVar("Task")
Result = TypeVar("Result")


def check_workers(workers: int) -> None:
    """Raise ShardError for a negative number of workers."""
    if workers < 0:
        raise ShardError(f"workers {workers} is negative: give 0 for this process alone, or the number of processes")


def run(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, name: Callable[[Task], str], title: str
) -> list[Result]:
    """Return `[function(task) for task in tasks]`, computed by `workers` processes, with a progress bar on a terminal.

    The first task that fails with ShardError, OSError or ValueError ends the run with a ShardError that contains its name, as
    does a worker process that dies. Any other exception is a bug in the program and is raised unchanged.
    """
    check_workers(workers)
    with tqdm(total=len(tasks), desc=title, disable=None, leave=False) as bar:
        if workers <= 1 or len(tasks) <= 1:
            results = []
            for task in tasks:
                results.append(_named(function, task, name(task)))
                bar.update()
            return results
        return _run_pool(function, tasks, workers, name, bar)


def _named(function: Callable[[Task], Result], task: Task, name: str) -> Result:
    try:
        return function(task)
    except (ShardError, OSError, ValueError) as error:
        raise _with_name(name, error) from error


def _run_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, name: Callable[[Task], str], bar: tqdm
) -> list[Result]:
    pool = ProcessPoolExecutor(min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        futures = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise ShardError(_worker_died(futures, tasks, workers, name)) from error
            if isinstance(error, (ShardError, OSError, ValueError)):
                raise _with_name(name(tasks[futures[future]]), error) from error
            if error is not None:
                raise error
            bar.update()
        return [future.result() for future in futures]
    finally:
        # after a failure, too: no worker may keep writing behind the caller's back
        pool.shutdown(wait=True, cancel_futures=True)


def _with_name(name: str, error: Exception) -> ShardError:
    text = str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
    return error if isinstance(error, ShardError) and name in text else ShardError(f"{name}: {text}")


def _worker_died(futures: dict[Future[Result], int], tasks: Sequence[Task], workers: int, name: Callable[[Task], str]) -> str:
    """Return a message that names the first unfinished tasks, since a pool doesn't say which task's worker died."""
    unfinished = [n for future, n in futures.items() if isinstance(future.exception(), BrokenProcessPool)][:workers]
    return (
        "a worker process died (killed, or out of memory?) while it worked on one of: "
        + ", ".join(name(tasks[n]) for n in unfinished)
        + ". Run the same command again, with fewer --workers if memory was short: finished shards are kept"
    )


def _start_worker() -> None:
    """Leave Ctrl-C to the parent and exit with it, since a pool's workers would outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
