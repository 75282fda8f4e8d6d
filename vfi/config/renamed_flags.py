"""Former spellings of flags, which stay valid but are not shown in the help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TRAINING = {"guard_roll_backs": "max_rollbacks", "max_fault_rate": "max_bad_sample_rate"}
"""Renamed flags of training, and fields of config.json: former name -> present one."""


def with_new_names(argv: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """Return a command line with renamed flags in their new spelling.

    `renamed` maps former names to new ones, both with underscores and without the leading dashes. `--NAME`, `--NAME=VALUE` and
    `--no-NAME` are recognised, with `-` or `_` within the name.
    """
    return [_with_new_name(argument, renamed) for argument in argv]


def _with_new_name(argument: str, renamed: Mapping[str, str]) -> str:
    flag, equals, value = argument.partition("=")
    for prefix in ("--no-", "--no_", "--"):
        if flag.startswith(prefix) and (new := renamed.get(flag.removeprefix(prefix).replace("-", "_"))):
            return f"{prefix}{new}{equals}{value}"
    return argument
