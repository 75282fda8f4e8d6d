"""Serialise dataclasses as JSON files: written atomically, and checked field by field when read.

Settings of an older program lack fields that were added later: these take their defaults, which is logged. So the default of a
new field must mean what the program did before. An unknown field is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

from vfi.config.configs import Config, ConfigError
from vfi.config.renamed_flags import TRAINING
from vfi.credentials import redact_all
from vfi.runtime.logging import logger

_UNIONS = (types.UnionType, typing.Union)


class RecordError(ValueError):
    """Raised for a JSON object that does not fit the dataclass; the message names the place."""


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: a reader sees the old file or the complete new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def to_json(record: Any) -> str:
    """Return a dataclass as JSON text, for a file; addresses in it lose their secrets."""
    return json.dumps(redact_all(dataclasses.asdict(record)), indent=1) + "\n"


def config_from_json(text: str, where: str = "config.json", quiet: bool = False) -> Config:
    """Return the Config that a JSON text holds.

    What an older program did not have yet takes its default, which is logged unless `quiet`. Unknown or wrongly typed entries
    raise ConfigError that names them and `where`.
    """
    defaulted: list[str] = []
    try:
        config: Config = from_object(Config, _with_new_names(json.loads(text)), where, defaulted)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    except (RecordError, RecursionError) as error:
        raise ConfigError(str(error)) from error
    if defaulted and not quiet:
        logger.warning(f"{where} is older than these settings, which have their defaults: {', '.join(defaulted)}")
    return config


def _with_new_names(content: Any) -> Any:
    """Return the content of a config.json with renamed fields under their present names."""
    if not isinstance(content, dict):
        return content
    return {
        group: {TRAINING.get(name, name): value for name, value in fields.items()} if isinstance(fields, dict) else fields
        for group, fields in content.items()
    }


def from_object(kind: Any, content: Any, where: str, defaulted: list[str] | None = None) -> Any:
    """Return a dataclass, with those nested in it, from a JSON object; RecordError names the place that does not fit.

    With a list `defaulted`, a missing field takes its default, and its name is added to the list; without, it is an error.
    """
    if not isinstance(content, dict):
        raise RecordError(f"{where}: expected an object with the fields of {kind.__name__}, found {content!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    missing = [name for name in fields if name not in content]
    if defaulted is not None:
        defaulted += [name for name in missing if _has_default(fields[name])]
        missing = [name for name in missing if not _has_default(fields[name])]
    if unknown := sorted(set(content) - set(fields)):
        raise RecordError(f"{where}: written by another version of the project, a newer one? Unknown fields: {unknown}")
    if missing:
        raise RecordError(f"{where}: written by another version of the project; missing fields: {missing}")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}", defaulted) for name, value in content.items()})


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _value(hint: Any, value: Any, where: str, defaulted: list[str] | None) -> Any:
    """Return a value checked against the types that records have; lists become tuples."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_object(hint, value, where, defaulted)
    if origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_value(kinds[i], item, f"{where}[{i}]", defaulted) for i, item in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {name: _value(inner[1], item, f"{where}.{name}", defaulted) for name, item in value.items()}
    elif isinstance(value, dict) and (record := _record_in(hint)):
        return from_object(record, value, where, defaulted)
    elif _is_plain(hint, value):
        return value
    raise RecordError(f"{where} is {value!r}, expected {hint}")


def _record_in(hint: Any) -> Any:
    """Return the dataclass of an optional one, as in `Measured | None`; None for other types."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else ()
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def _is_plain(hint: Any, value: Any) -> bool:
    """Return whether `value` is a plain value of this type. An integer is also a float; a boolean is not a number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in _UNIONS:
        return any(_is_plain(kind, value) for kind in inner)
    if isinstance(value, bool):
        return hint is bool
    return origin is None and isinstance(value, (int, float) if hint is float else hint)
