"""What is in a results.json? The contract between `vfi benchmark`, which writes it, and `vfi report`, which reads it.

    results.json          one data set, one or more models, scored image by image; rows[0] is the frame average
    results_pictures/     some of the frames as PNG, named in results.json relative to its folder

Numbers are finite: PSNR in dB (at most 100), SSIM up to 1. Paths are as the benchmark was given them, except `run` and the
pictures, which are relative to the folder of results.json, so that the whole can be moved.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vfi.records import RecordError, from_object, write_text

SCHEMA = "vfi-results"
VERSION = 2
FRAME_AVERAGE = "frame average"
"""Name of the row that every results file has: the mean of img0 and img1, which any model has to beat."""
ERROR_WHITE = 0.25
"""Mean absolute error over the colours, of colours in 0 … 1, that an error picture shows as white; 0 is black."""


class ResultError(ValueError):
    """A results file is missing, is something else, or was written by another version; the message says which."""


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """One image of one row."""

    key: str
    psnr: float
    ssim: float
    """Of the kind that the protocol names."""
    ie: float
    """Interpolation error, 0 … 255."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One model, or the frame average. psnr, ssim, ie are means over the images.

    Fields about a run are None for a model of another repository, and all about a model for the frame average.
    """

    model: str
    path: str | None
    run: str | None
    step: int | None
    parameters: int | None
    preset: str | None
    phase: int | None
    psnr: float
    ssim: float
    ie: float
    images: tuple[ImageScore, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """PNG files of one sample. `rank` 1 is the smallest gain of the first model over the frame average, `of` the largest."""

    key: str
    rank: int
    of: int
    img0: str
    img1: str
    truth: str
    average: str
    average_error: str
    predictions: dict[str, str]  # model -> file
    errors: dict[str, str]  # model -> file


@dataclasses.dataclass(frozen=True)
class Results:
    """All of results.json. `protocol` says how the numbers were made, `environment` by what; both are for people to read."""

    data: str
    index_sha256: str
    samples: int
    available: int
    protocol: dict[str, str]
    environment: dict[str, str]
    rows: tuple[Row, ...]
    pictures: tuple[Picture, ...]


def write_results(path: Path, results: Results) -> None:
    """Write results.json atomically."""
    content = {"schema": SCHEMA, "version": VERSION} | dataclasses.asdict(results)
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_results(path: Path) -> Results:
    """Read and check a results file; ResultError says what the file is instead."""
    if path.is_dir():
        inside = path / "results.json"
        raise ResultError(f"{path} is a folder, not a results file" + (f": give {inside}" if inside.is_file() else ""))
    if not path.is_file():
        raise ResultError(f"results file {path} does not exist: `vfi benchmark --out {path}` writes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} is not a results file: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ResultError(f"{path} is not a results file: {_what_is(content)}. `vfi benchmark` writes results files")
    if content.get("version") != VERSION:
        raise ResultError(
            f"{path} has version {content.get('version')!r}, this program reads version {VERSION}: run `vfi benchmark` again"
        )
    fields = {name: value for name, value in content.items() if name not in ("schema", "version")}
    try:
        results: Results = from_object(Results, fields, str(path))
    except RecordError as error:
        raise ResultError(f"{error}: run `vfi benchmark` again") from error
    if not results.rows or results.rows[0].model != FRAME_AVERAGE:
        raise ResultError(f"{path} lacks the row {FRAME_AVERAGE!r}: run `vfi benchmark` again")
    return results


def _what_is(content: Any) -> str:
    """A guess at what a JSON file is that is no results file."""
    if not isinstance(content, dict):
        return f"it holds a JSON {type(content).__name__}"
    if "schema" in content:
        return f"its schema is {content['schema']!r}"
    if {"run", "data", "optim", "model"} <= set(content):
        return "it is the config.json of a run"
    return f"it has no schema (its fields: {', '.join(map(str, list(content)[:6])) or 'none'})"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model's row, what it is called among the others, and the file it comes from."""

    label: str
    row: Row
    file: Path
    results: Results


@dataclasses.dataclass(frozen=True)
class Group:
    """Everything that was measured on the same samples and may stand in one table."""

    data: str
    samples: int
    average: Row
    entries: tuple[Entry, ...]
    files: tuple[tuple[Path, Results], ...]


def _title(results: Results) -> str:
    """What was measured on, and how."""
    facts = results.protocol
    if "profile" not in facts:
        return results.data
    tta = "" if facts["TTA"] == "none" else ", TTA"
    return f"{facts['protocol']}, profile {facts['profile']}{tta}: {results.data}"


def group_by_data(files: dict[Path, Results]) -> list[Group]:
    """One group for each set of samples and way of measuring, in the order in which they first appear.

    Together are results on the same index and number of samples, by the same protocol and profile, all with TTA or all without.
    """
    together: dict[tuple[object, ...], list[tuple[Path, Results]]] = {}
    for path, results in files.items():
        way = [results.protocol.get(fact) for fact in ("protocol", "profile", "TTA")]
        together.setdefault((results.index_sha256, results.samples, *way), []).append((path, results))
    groups = []
    for members in together.values():
        first = members[0][1]
        rows = [(row, path, results) for path, results in members for row in results.rows[1:]]
        names = [row.model for row, _, _ in rows]
        entries = tuple(
            Entry(row.model if names.count(row.model) == 1 else f"{row.model} ({path})", row, path, results)
            for row, path, results in rows
        )
        groups.append(Group(_title(first), first.samples, first.rows[0], entries, tuple(members)))
    return groups
