"""Parallel compilation of all Triton kernels of a call, for a shorter first step on a machine.

    with compiling_ahead(device):
        step(frames)          # records the kernels that it meets, and runs none of them

Triton compiles a kernel when it is launched, one after another, and a training step has a hundred of them. Much of that is
Python, which threads can't run in parallel: forks of this process compile into Triton's cache, from which they are loaded here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import Tensor

from vfi.ops.triton.launch_config import can_not_run
from vfi.runtime.attributes import replaced

Compile = Callable[[], Any]


@contextlib.contextmanager
def compiling_ahead(device: torch.device, failing: bool = False) -> Iterator[None]:
    """While active, record Triton's kernels without running them: their outputs are undefined. Ends when all are loaded.

    `failing`: some may be impossible to compile or to load. All are only left in Triton's cache, and launching one reports its
    error.
    """
    from triton.runtime.jit import JITFunction

    run, met = JITFunction.run, dict[tuple[Any, ...], Compile]()
    index = torch.cuda.current_device() if device.index is None else device.index
    first: Future[Any] | None = None

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        nonlocal first
        key = (kernel, *map(_kind, arguments), *((name, _kind(value)) for name, value in options.items()))
        if key not in met:
            met[key] = functools.partial(run, kernel, *map(_stand_in, arguments), grid=grid, warmup=True, **options)
            first = first or pool.submit(met[key])  # meanwhile; the forks inherit what all of them need from it

    with ThreadPoolExecutor(_cores(), "load", torch.cuda.set_device, (index,)) as pool:
        with replaced(JITFunction, "run", note):
            yield
        if first is not None:
            with _may_be_impossible(failing):
                first.result()
            # makes Triton parse their source: not in several threads, for which the parser of Python 3.11 is not safe
            for kernel in {kernel for kernel, *_ in met}:
                kernel.cache_key  # noqa: B018 (a property that does it)
            compiled = _compile_in_copies(list(met.values())[1:], index, failing)
            if not failing:
                list((pool.map if compiled else map)(_load, met.values()))


def _load(compile_or_find: Compile) -> None:
    """Load a kernel onto the GPU with the small C library that launches it, compiled here if it isn't in the cache."""
    compile_or_find().run  # noqa: B018 (a property that does it)


def _compile_in_copies(launches: Sequence[Compile], index: int, failing: bool) -> bool:
    """Compile into Triton's cache in forks, and return whether everything is there, except what may be `failing`."""
    from triton.runtime import driver

    if not launches:
        return True
    copies = multiprocessing.get_context("fork")  # they inherit what is to be compiled
    answers = Answers(index, driver.active.get_current_target())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # they only compile
        with ProcessPoolExecutor(min(_cores(), len(launches)), copies, _begin, (launches, answers)) as pool:
            try:
                list(pool.map(_try_to_compile if failing else _compile, range(len(launches))))
            except (BrokenProcessPool, OSError) as error:  # no memory for a fork; loading reports a full disk again
                warnings.warn(f"the rest of the kernels is compiled one by one, which takes longer: {error}", stacklevel=2)
                return False
    return True


@dataclasses.dataclass(frozen=True)
class Answers:
    """Driver that answers Triton's questions during compilation where CUDA is unavailable: in a fork, or without a GPU."""

    device: int
    target: Any
    """triton.backends.compiler.GPUTarget."""

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


_inherited: Sequence[Compile] = ()


def _begin(launches: Sequence[Compile], answers: Answers) -> None:
    from triton.runtime import driver

    global _inherited
    _inherited = launches
    driver.set_active(answers)


def _compile(number: int) -> None:
    _inherited[number]()


def _try_to_compile(number: int) -> None:
    with _may_be_impossible():
        _compile(number)


@contextlib.contextmanager
def _may_be_impossible(it_may: bool = True) -> Iterator[None]:
    """Suppress errors that say that a kernel's options are impossible."""
    try:
        yield
    except Exception as error:
        if not (it_may and can_not_run(error)):
            raise


def _cores() -> int:
    """Return the number of cores for each of the processes on this machine that train together."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _StandIn:
    """Properties of a tensor for which a kernel is compiled, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.place = tensor.dtype, tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        """Return the address modulo 16: only whether it is a multiple of 16 matters."""
        return self.place


def _stand_in(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _StandIn(argument)
    if not isinstance(argument, tuple | list):
        return argument
    parts = map(_stand_in, argument)
    return type(argument)(*parts) if hasattr(argument, "_fields") else type(argument)(parts)


def _kind(argument: Any) -> Hashable:
    """Return what a kernel is compiled for, slightly too fine: some are requested twice, and Triton's cache answers."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return tuple(map(_kind, argument)) if isinstance(argument, tuple | list) else argument
