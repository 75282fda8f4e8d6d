"""The project's logger: progress of a job on stdout, notes on stderr.

    logger.info("step 7: …")                 # as it is, on stdout
    logger.warning("… is older than …")      # after "note: ", on stderr, since stdout is for results

Messages appear above a progress bar. logging.getLogger("vfi") changes what is shown, as for any package.
"""

from __future__ import annotations

import logging
import sys

from vfi.credentials import redact


class _Screen(logging.Handler):
    """Write messages above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # deferred: most programs show no message

        is_note = record.levelno >= logging.WARNING
        stream = sys.stderr if is_note else sys.stdout
        text = redact(record.getMessage())
        tqdm.write(f"note: {text}" if is_note else text, file=stream)
        stream.flush()  # in a log file it would lag behind stderr, and be lost when the process is killed


logger = logging.getLogger("vfi")
logger.setLevel(logging.INFO)
logger.propagate = False  # a program's own handlers would show each message twice
if not logger.handlers:
    logger.addHandler(_Screen())


def show_messages(is_main: bool) -> None:
    """Show messages on the main process of several, and none on the others."""
    logger.setLevel(logging.INFO if is_main else logging.CRITICAL)
