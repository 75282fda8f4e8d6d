"""The speed file that `vfi benchmark --speed` writes and `vfi report` reads: latency and memory of each model.

    speed = read_speed(Path("speed.json"))
    print(table(speed))

It has one row for each frame size, factor and model. `environment` (the machine and its versions) and `settings` (how it was
measured) are for readers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vfi.evaluation.results import ResultError
from vfi.io.dataclass_json import RecordError, from_object, write_text
from vfi.io.text_table import aligned

SCHEMA = "vfi-speed"
VERSION = 1
OWN_PRECISION = "its own"
"""Precision of a model of another repository, which chooses it."""
OUT_OF_MEMORY = "out of memory"
_AGAIN = "run `vfi benchmark --speed` again"
_HEAD = ("size", "model", "params", "rate", "precision", "ms", "p90", "frames/s", "GiB allocated", "GiB reserved", "ratio")
_TO_THE_LEFT = (0, 1, 3, 4)  # columns of text, aligned left


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """One model at one size and factor. None: not measured, such as memory on a CPU, or everything where memory ran out."""

    model: str
    path: str | None
    """As it was given to the benchmark; None for a model of another repository."""
    parameters: int | None
    """Number of trained values; None where an adapter does not state it."""
    size: str
    """HEIGHTxWIDTH of the frames."""
    factor: int
    """Factor by which the frame rate grows: a call predicts factor - 1 frames from one pair."""
    precision: str
    compiled: bool
    """Whether torch.compile was used."""
    ms: float | None = None
    """Median milliseconds of one call."""
    ms_p90: float | None = None
    """90th percentile of the milliseconds of one call."""
    frames_per_s: float | None = None
    """Frames predicted per second of such calls."""
    allocated: int | None = None
    """Peak bytes of all tensors during a call, including weights and inputs."""
    reserved: int | None = None
    """Bytes that the allocator reserved on the device for them."""
    ratio: float | None = None
    """ms / ms of the first model at the same size and factor."""
    out_of_memory: bool = False


@dataclasses.dataclass(frozen=True)
class Speed:
    """Content of a speed file. The first model of each size and factor is the baseline of the others."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[SpeedRow, ...]


def write_speed(path: Path, speed: Speed) -> None:
    """Write a speed file atomically."""
    content = {"schema": SCHEMA, "version": VERSION} | dataclasses.asdict(speed)
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_speed(path: Path) -> Speed:
    """Read and check a speed file; the ResultError says what the file is instead."""
    if path.is_dir():
        raise ResultError(f"{path} is a folder, not a speed file")
    if not path.is_file():
        raise ResultError(f"speed file {path} does not exist: `vfi benchmark --speed --out {path}` writes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ResultError(f"{path} is not a speed file: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ResultError(f"{path} is not a speed file: {_what_is(content)}. `vfi benchmark --speed` writes speed files")
    if content.get("version") != VERSION:
        raise ResultError(f"{path} has version {content.get('version')!r}, this program reads version {VERSION}: {_AGAIN}")
    fields = {name: value for name, value in content.items() if name not in ("schema", "version")}
    try:
        speed: Speed = from_object(Speed, fields, str(path))
    except RecordError as error:
        raise ResultError(f"{error}: {_AGAIN}") from error
    if not speed.rows:
        raise ResultError(f"{path} has no rows: {_AGAIN}")
    for row in speed.rows:
        if (row.ms is None) != row.out_of_memory:
            what = "a time although" if row.out_of_memory else "no time although not"
            raise ResultError(f"{path}: {row.model} at {row.size} has {what} out of memory: {_AGAIN}")
    return speed


def against(now: Speed, then: Speed) -> str:
    """Compare each row of `now` with that of the same model, size, factor and precision in `then`, as aligned text.

    The ratios of time and memory are below 1 where they improved. Other differences, and rows that only one of the files has,
    follow.
    """
    before = {_which(row): row for row in then.rows}
    lines: list[tuple[str, ...]] = [("size", "model", "rate", "precision", "ms", "ms then", "time", "memory")]
    alone = [f"{' '.join(_which(row))} was not measured then" for row in now.rows if _which(row) not in before]
    for row in now.rows:
        if old := before.pop(_which(row), None):
            lines.append((*_which(row), _ms(row), _ms(old), _times(row.ms, old.ms), _times(row.allocated, old.allocated)))
    alone += [f"{' '.join(which)} was measured then, and is not now" for which in before]
    facts, old_facts = _facts(now), _facts(then)
    differ = [
        f"{name}: {facts.get(name)}, then {old_facts.get(name)}"
        for name in dict.fromkeys([*facts, *old_facts])
        if facts.get(name) != old_facts.get(name)
    ]
    return "\n".join([_without_empty(lines, left=range(4)), *differ, *alone])


def _which(row: SpeedRow) -> tuple[str, str, str, str]:
    return row.size, row.model, f"x{row.factor}", row.precision + (", compiled" if row.compiled else "")


def _ms(row: SpeedRow) -> str:
    return OUT_OF_MEMORY if row.out_of_memory else f"{row.ms:.2f}"


def _times(now: float | None, then: float | None) -> str:
    return f"{now / then:.2f}x" if now is not None and then else ""


def is_speed(path: Path) -> bool:
    """Return whether a file is a speed file of any version; False for anything that is not JSON with that schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("schema") == SCHEMA


def _what_is(content: Any) -> str:
    """Guess what a JSON file is that is not a speed file."""
    if not isinstance(content, dict):
        return f"it holds a JSON {type(content).__name__}"
    return f"its schema is {content['schema']!r}" if "schema" in content else "it has no schema"


def table(speed: Speed) -> str:
    """Format the rows as aligned text, followed by the way they were measured."""
    lines = _without_empty([_HEAD, *map(_cells, speed.rows)], _TO_THE_LEFT)
    return "\n".join([lines, *(f"{name}: {value}" for name, value in _facts(speed).items())])


def _facts(speed: Speed) -> dict[str, Any]:
    """Return how the rows were measured."""
    return {"device": speed.environment.get("device")} | speed.settings


def _without_empty(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Align the lines, of which the first is the header, without the columns that are empty below it."""
    shown = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:])]
    return aligned([[line[i] for i in shown] for line in lines], left=[shown.index(i) for i in left if i in shown])


def _cells(row: SpeedRow) -> tuple[str, ...]:
    """Format a row of the table."""

    def number(value: float | None, digits: int, unit: float = 1) -> str:
        return "" if value is None else f"{value / unit:.{digits}f}"

    size, model, rate, precision = _which(row)
    return (
        size,
        model,
        "" if row.parameters is None else f"{row.parameters / 1e6:.1f} M",
        rate,
        precision,
        _ms(row),
        number(row.ms_p90, 2),
        number(row.frames_per_s, 1),
        number(row.allocated, 2, 2**30),
        number(row.reserved, 2, 2**30),
        number(row.ratio, 2),
    )
