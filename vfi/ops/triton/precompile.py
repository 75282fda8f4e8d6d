"""How does one wait less for kernels that were never compiled on this machine? All that a call needs are compiled side by side.

    with compiling_ahead(device):
        step(frames)          # notes the kernels that it meets, and runs none of them

Triton compiles a kernel when it is launched, one after the other, and a training step has a hundred of them. Much of it is
Python, which threads do one at a time: copies of this process compile into Triton's cache, from which they are loaded here.
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
from unittest import mock

import torch
from torch import Tensor

from vfi.ops.triton.launch_config import can_not_run

Compile = Callable[[], Any]


@contextlib.contextmanager
def compiling_ahead(device: torch.device, failing: bool = False) -> Iterator[None]:
    """Meanwhile Triton's kernels are not run: what they would write holds anything. Ends when all of them are loaded.

    `failing`: some may be impossible to compile or to load. All are left in Triton's cache, for whoever launches them to see.
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
            first = first or pool.submit(met[key])  # meanwhile; what it needs the others need, too, and inherit

    with ThreadPoolExecutor(_cores(), "load", torch.cuda.set_device, (index,)) as pool:
        with mock.patch.object(JITFunction, "run", note):
            yield
        if first is not None:
            with _may_be_impossible(failing):
                first.result()
            # makes Triton parse their source: not to be done by several threads, for which Python 3.11's parser is not safe
            for kernel in {kernel for kernel, *_ in met}:
                kernel.cache_key  # noqa: B018 (a property that does it)
            compiled = _compile_in_copies(list(met.values())[1:], index, failing)
            if not failing:
                list((pool.map if compiled else map)(_load, met.values()))


def _load(compile_or_find: Compile) -> None:
    """Onto the GPU, with the little C library by which it is launched: that is made here, too, if it isn't in the cache."""
    compile_or_find().run  # noqa: B018 (a property that does it)


def _compile_in_copies(launches: Sequence[Compile], index: int, failing: bool) -> bool:
    """Into Triton's cache. Is all of it there, but for those that are `failing`?"""
    from triton.runtime import driver

    if not launches:
        return True
    copies = multiprocessing.get_context("fork")  # which inherit what is to be compiled
    answers = Answers(index, driver.active.get_current_target())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # they only compile, and end
        with ProcessPoolExecutor(min(_cores(), len(launches)), copies, _begin, (launches, answers)) as pool:
            try:
                list(pool.map(_try_to_compile if failing else _compile, range(len(launches))))
            except (BrokenProcessPool, OSError) as error:  # no memory for a copy; a full disk is met again when they are loaded
                warnings.warn(f"the rest of the kernels is compiled one by one, which takes longer: {error}", stacklevel=2)
                return False
    return True


@dataclasses.dataclass(frozen=True)
class Answers:
    """What Triton asks its driver when it compiles, where CUDA can't be asked: in a copy, or without a GPU."""

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
    """Leave out what a kernel's options make impossible."""
    try:
        yield
    except Exception as error:
        if not (it_may and can_not_run(error)):
            raise


def _cores() -> int:
    """For each of the processes on this machine that train together."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _StandIn:
    """What a kernel is compiled for, of a tensor, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.place = tensor.dtype, tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        """Whether it is a multiple of 16 is what counts."""
        return self.place


def _stand_in(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _StandIn(argument)
    if not isinstance(argument, tuple | list):
        return argument
    parts = map(_stand_in, argument)
    return type(argument)(*parts) if hasattr(argument, "_fields") else type(argument)(parts)


def _kind(argument: Any) -> Hashable:
    """What a kernel is compiled for; a little finer, so that some are asked for twice, which Triton's cache answers."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return tuple(map(_kind, argument)) if isinstance(argument, tuple | list) else argument
