"""Command-line entry of every command: flags from a dataclass, and for the shard commands a ShardError as one line."""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import tyro

from shards.schema import ShardError

Options = TypeVar("Options")
_FLAG = re.compile(r"--|-[A-Za-z]")  # how a flag begins; -1 is a value


def parse_flags(
    options_type: type[Options], program: str, description: str | None, argv: Sequence[str] | None, **settings: Any
) -> Options:
    """Parse `argv` (None: the command line) into `options_type`, a dataclass with a field for each flag.

    Flags are accepted with `_` and with `-`. Of a flag that is given twice the last value counts, so that a script can override
    what stands before; a flag of several values has those of all its occurrences, in their order. `settings` go to tyro.cli.
    Usage errors and --help exit as that does.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see the package's __init__.py; commands report Ctrl-C
    argv = join_repeated(sys.argv[1:] if argv is None else argv, names_of_several(options_type))
    return tyro.cli(options_type, prog=program, description=description, args=argv, **settings)


def names_of_several(options_type: type) -> set[str]:
    """Return the names of the fields of any number of values, also in nested dataclasses."""
    names = set[str]()
    for name, kind in typing.get_type_hints(options_type).items():
        if dataclasses.is_dataclass(kind):
            names |= names_of_several(typing.cast(type, kind))
        elif typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is ...:
            names.add(name)
    return names


def join_repeated(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the command line with all values of each flag in `names` (with `_`, without dashes) after its first occurrence."""
    first, kept = dict[str, list[str]](), list[list[str]]()
    for name, words in split_flags(argv):
        if name in first:
            _, equals, value = words[0].partition("=")
            first[name] += [value, *words[1:]] if equals else words[1:]
        else:
            kept.append(words)
            if name in names:
                first[name] = words
    return [word for words in kept for word in words]


def split_flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the name of each flag (with `_`, without dashes), and its words: itself and what follows it up to the next flag.

    Words before the first flag have the name "".
    """
    parts: list[tuple[str, list[str]]] = [("", [])]
    for word in argv:
        if _FLAG.match(word):
            parts.append((word.partition("=")[0].lstrip("-").replace("-", "_"), []))
        parts[-1][1].append(word)
    return [part for part in parts if part[1]]


def run_job(
    options_type: type[Options],
    job: Callable[[Options], int],
    program: str,
    description: str | None,
    argv: Sequence[str] | None,
) -> int:
    """Parse `argv` (None: the command line) into `options_type`, call `job` and return the exit code.

    A ShardError gives 2, an interruption 130.
    """
    options = parse_flags(options_type, f"python -m {program}", description, argv)
    try:
        return job(options)
    except ShardError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted. Run the same command again to go on: finished shards are kept", file=sys.stderr)
        return 130
