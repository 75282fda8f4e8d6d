"""How does a job end, other than well? A user's mistake: one line on stderr and exit code 2, without a traceback.

    with clear_errors(ShardError, ConfigError):
        …
    @clear_errors(ResultError)
    def main(…): …

Each job names the kinds that carry a message for its user; every other exception is a bug and keeps its traceback.

Exit codes: 0 done · 1 a bug, or a process that hangs or died · 2 a mistake of the user · 75 training was told to stop and has
saved: --resume auto goes on from there · 130 interrupted. torchrun and accelerate launch make 1 of every code but 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 75
"""Exit code of training that was told to stop and has saved; EX_TEMPFAIL of sysexits.h: try again later."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Training was told to stop by a signal and has saved its last step; the message says which, and how to go on."""


class JobError(ValueError):
    """An argument of a job is not usable; the message says what was given and what to do."""


@contextmanager
def clear_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Print `error: …` and exit with 2 for JobError and the named kinds, with 130 when interrupted; also a decorator.

    Training that was stopped has said so: exit code 75.

    A loader process that died is no mistake but no bug either: one line, too, and exit code 1.
    """
    caught: tuple[type[Exception], ...] = (JobError, *kinds)
    try:
        yield
    except caught as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # torch has no kind of error for it
            raise
        print(
            f"error: a loader process died: {message_of(error)} Its signal or exit code says how; Killed is often the kernel, "
            f"for want of memory: take fewer loader processes or smaller batches, and start again "
            f"(--resume auto goes on with a run)",
            file=sys.stderr,
        )
        sys.exit(1)
    except Stopped:
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def message_of(error: Exception) -> str:
    """The message on one line. What a loader process raised arrives with its whole traceback as message: the end is taken."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split())


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another architecture or can't be written; the message says which and what to do."""
