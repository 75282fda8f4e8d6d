"""Conversion of data sets to tar shards, on the CPU and without torch. Commands: python -m shards.<set> and shards.verify."""

import signal
import sys


def end_imports_quietly(package: str) -> None:
    """Let Ctrl-C end `python -m PACKAGE.COMMAND` without a traceback while it imports; parse_flags restores the handler."""
    is_command = sys.argv[:1] == ["-m"] and any(word.startswith(f"{package}.") for word in sys.orig_argv)
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


end_imports_quietly(__name__)
