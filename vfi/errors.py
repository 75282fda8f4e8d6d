"""Errors that end a command with one line on stderr and exit code 2, without a traceback.

    with clear_errors(ShardError, ConfigError):
        …
    @clear_errors(ResultError)
    def main(…): …

Each command names the exceptions that carry a message for its user; every other one is a bug and keeps its traceback.

Exit codes: 0 success · 1 a bug, or a process that stalled or died · 2 a user error · 75 training stopped by a signal after
saving, to be resumed by --resume auto · 130 interrupted. torchrun and accelerate launch make 1 of every code but 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vfi.credentials import CredentialsError, redact

STOPPED = 75
"""Exit code of training that was told to stop and has saved; EX_TEMPFAIL of sysexits.h: try again later."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Raised when a signal stopped training and its last step is saved; the message says which signal, and how to resume."""


class JobError(ValueError):
    """Raised for an unusable argument of a command; the message says what was given and what to do."""


@contextmanager
def clear_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Print `error: …` and exit with 2 for JobError and the named kinds, with 130 when interrupted; also a decorator.

    Training that was stopped by a signal has already reported it: exit code 75.

    A loader process that died is neither a user error nor a bug: one line, too, and exit code 1.
    """
    caught: tuple[type[Exception], ...] = (JobError, CredentialsError, *kinds)
    try:
        yield
    except caught as error:
        _report(message_of(error))
        sys.exit(2)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # torch has no kind of error for it
            raise
        _report(
            f"a loader process died: {message_of(error)} Its signal or exit code says how; Killed is often the kernel, for "
            f"lack of memory: use fewer loader processes or smaller batches, and start again (--resume auto resumes a run)"
        )
        sys.exit(1)
    except Stopped:
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        _report("interrupted")
        sys.exit(130)


def _report(text: str) -> None:
    """Print an error without secrets of addresses.

    torchrun and accelerate launch show it again below their own traceback, as the root cause.
    """
    text = redact(text)
    print(f"error: {text}", file=sys.stderr)
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):  # the launcher removes the folder when it ends first
            Path(place).write_text(json.dumps({"message": f"error: {text}", "timestamp": int(time.time())}), encoding="utf-8")


def message_of(error: Exception) -> str:
    """Return the message on one line. For an error of a loader process, whose message is a traceback, that is its end."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split())


class CheckpointError(ValueError):
    """Raised for a checkpoint that is missing, damaged, of another architecture or can't be written."""
