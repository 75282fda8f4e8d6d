"""Prefetching for a reader and background work for a writer, in threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from vfi.video.interfaces import Sink

T = TypeVar("T")
_AHEAD = 4  # prefetched frames, or pairs that wait to be written


def _ahead(items: Iterator[T]) -> Generator[T]:
    """Yield the items, some of which a thread prefetches."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 (raised again where the items are taken)
            put((False, error))
        else:
            put((False, None))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stop.set()
        thread.join()


class _Behind:
    """Work on a sink in a background thread. Its errors are raised at the next call, or at the end."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(_AHEAD)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.waiting.put(None)
        self.thread.join()
        if kind is None and self.error is not None:
            raise self.error

    def put(self, work: Callable[[], None]) -> None:
        """Queue work for the thread."""
        if self.error is not None:
            raise self.error
        self.waiting.put(work)

    def _work(self) -> None:
        while (work := self.waiting.get()) is not None:
            if self.error is None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 (raised again where work is given)
                    self.error = error
