"""Background work for a writer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from vfi.video.interfaces import Sink

T = TypeVar("T")
_AHEAD = 4  # pieces of work that wait


class BackgroundWriter:
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
