"""Command-line entry of the shard commands: flags from a dataclass, and a ShardError as one line with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from shards.schema import ShardError

Options = TypeVar("Options")


def run_job(
    options_type: type[Options],
    job: Callable[[Options], int],
    program: str,
    description: str | None,
    argv: Sequence[str] | None,
) -> int:
    """Parse `argv` (None: the command line) into `options_type`, call `job` and return the exit code.

    Flags are accepted with `_` and with `-`. Usage errors and --help exit as the command-line library does. A ShardError gives
    2, an interruption 130.
    """
    options = tyro.cli(options_type, prog=f"python -m {program}", description=description, args=argv)
    try:
        return job(options)
    except ShardError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted. Run the same command again to go on: finished shards are kept", file=sys.stderr)
        return 130
