"""Run a module as one rank of a job, with its own log file and a record of its exit code.

    torchrun … -m launch.node.rank FOLDER vfi.train --preset small …

FOLDER/rank_3.log    output of rank 3        rank_3.pid    its process id        rank_3.exit    its exit code

Launchers turn every non-zero exit code into 1; rank_*.exit holds the original. A process that was killed leaves none.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the module with the arguments that follow its name, as `python -m` would."""
    folder, module, *arguments = sys.argv[1:] if argv is None else argv
    mine = Path(folder) / f"rank_{os.environ.get('RANK', '0')}"
    log = os.open(mine.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # the launcher ignores them, and its children inherit that
    _write(mine.with_suffix(".pid"), os.getpid())
    with noted(mine.with_suffix(".exit")):
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def noted(path: Path) -> Iterator[None]:
    """Write the exit code with which the process is about to end."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        raise
    finally:
        _write(path, code)


def _write(path: Path, number: int) -> None:
    """Write the file atomically, since others may be reading it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(str(number))
    temporary.replace(path)


if __name__ == "__main__":
    main()
