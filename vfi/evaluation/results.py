"""The results file: the contract between `vfi benchmark`, which writes it, and `vfi report`, which reads it.

    results.json          one data set, one or more models, scored image by image; before them the two baselines
    results_pictures/     some of the frames as PNG, named in results.json relative to its folder

Numbers are finite: PSNR in dB (at most 100), SSIM up to 1; None is what was not measured. Paths are as they were given to the
benchmark, except `run` and the pictures, which are relative to the folder of results.json, so that all of it can be moved.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vfi.errors import JobError
from vfi.io.dataclass_json import RecordError, from_object, write_text
from vfi.io.text_table import aligned

SCHEMA = "vfi-results"
VERSION = 3
FRAME_AVERAGE = "frame average"
"""Name of the first row of every results file: the mean of img0 and img1, which any model has to beat."""
NEAREST_FRAME = "nearest frame"
"""Name of the second row: img0 up to timestep 0.5, img1 after it, which is what a player shows without interpolation."""
BASELINES = (FRAME_AVERAGE, NEAREST_FRAME)
ERROR_WHITE = 0.25
"""Mean absolute error over the colours, in 0 … 1, that an error picture shows as white; 0 is black."""


class ResultError(ValueError):
    """A results file is missing, is something else, or was written by another version; the message says which."""


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """Scores of one image of a row."""

    key: str
    psnr: float
    ssim: float
    """SSIM of the kind that the protocol names."""
    ie: float
    """Interpolation error, 0 … 255."""
    psnr_moving: float | None = None
    """PSNR of the pixels that move; None where none do."""
    lpips: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A model or a baseline. Measures are means over the images that have them.

    Fields about a run are None for a model of another repository; all fields about a model are None for a baseline.
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
    psnr_moving: float | None = None
    lpips: float | None = None
    psnr_of_changes: float | None = None
    """Temporal consistency: PSNR of the changes from frame to frame, for sets with several truths between two frames."""
    macs: int | None = None
    """Multiply-accumulates for one frame of the first sample's size, as vfi/profiling/costs.py counts them."""


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
    flows: dict[str, str] = dataclasses.field(default_factory=dict)
    """Model -> file: flow from the timestep to the first frame as colours, for models that have flow."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Content of results.json. `protocol` states how the numbers were measured, `environment` on what; both are for readers."""

    data: str
    index_sha256: str
    samples: int
    available: int
    protocol: dict[str, str]
    environment: dict[str, str]
    rows: tuple[Row, ...]
    pictures: tuple[Picture, ...]
    motion: tuple[float, ...] = ()
    """Mean motion of the frames of each image's sample, in pixels between the inputs; empty if it was not estimated."""

    @property
    def models(self) -> tuple[Row, ...]:
        """Return the rows of models, without the baselines."""
        return self.rows[len(BASELINES) :]


def check_output(out: Path, example: str) -> None:
    """Raise JobError for a path that no .json file can be written to."""
    if out.is_dir():
        raise JobError(f"--out {out} is a folder: give a file name, such as --out {out / example}")
    if out.suffix != ".json":
        raise JobError(f"--out {out} must end in .json")
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise JobError(f"--out {out}: {parent} is not a folder")


def write_results(path: Path, results: Results) -> None:
    """Write results.json atomically."""
    content = {"schema": SCHEMA, "version": VERSION} | dataclasses.asdict(results)
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_results(path: Path) -> Results:
    """Read and check a results file; the ResultError says what the file is instead."""
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
    if tuple(row.model for row in results.rows[: len(BASELINES)]) != BASELINES:
        raise ResultError(f"{path} lacks the rows {', '.join(map(repr, BASELINES))}: run `vfi benchmark` again")
    if misfit := next(_misfits(results), ""):
        raise ResultError(f"{path} does not fit together: {misfit}. Was it edited? Run `vfi benchmark` again")
    return results


def _misfits(results: Results) -> Iterator[str]:
    """Yield what in one part of the results has no counterpart in another."""
    names, keys = [row.model for row in results.rows], _keys(results.rows[0])
    yield from (f"two rows are called {name!r}" for name, count in Counter(names).items() if count > 1)
    yield from (f"row {row.model!r} has other images than {FRAME_AVERAGE!r}" for row in results.rows if _keys(row) != keys)
    if results.motion and len(results.motion) != len(keys):
        yield f"it has the motion of {len(results.motion)} images, and {len(keys)} images"
    for picture in results.pictures:
        if picture.key not in keys:
            yield f"no image has the key {picture.key!r} of a picture"
        if not picture.predictions:
            yield f"the picture {picture.key!r} shows no model"
        for name in (*picture.predictions, *picture.errors, *picture.flows):
            if name not in names:
                yield f"the picture {picture.key!r} is of the model {name!r}, and the rows are {', '.join(map(repr, names))}"
    if "profile" in results.protocol:
        yield from (
            f"its protocol has no {fact!r}" for fact in ("protocol", "TTA", "frame set") if fact not in results.protocol
        )


def _keys(row: Row) -> list[str]:
    return [image.key for image in row.images]


def _what_is(content: Any) -> str:
    """Guess what a JSON file is that is not a results file."""
    if not isinstance(content, dict):
        return f"it holds a JSON {type(content).__name__}"
    if "schema" in content:
        return f"its schema is {content['schema']!r}"
    if {"run", "data", "optim", "model"} <= set(content):
        return "it is the config.json of a run"
    return f"it has no schema (its fields: {', '.join(map(str, list(content)[:6])) or 'none'})"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model's row, its label, which is unique in its group, and the file that it comes from."""

    label: str
    row: Row
    file: Path
    results: Results


@dataclasses.dataclass(frozen=True)
class Group:
    """Results that were measured on the same samples and may share a table."""

    data: str
    samples: int
    average: Row
    nearest: Row
    entries: tuple[Entry, ...]
    files: tuple[tuple[Path, Results], ...]


def _title(results: Results) -> str:
    """Return what was measured on, and how."""
    facts = results.protocol
    if "profile" not in facts:
        return results.data
    tta = "" if facts["TTA"] == "none" else ", TTA"
    return f"{facts['protocol']}, profile {facts['profile']}{tta}: {results.data}"


def group_by_data(files: dict[Path, Results]) -> list[Group]:
    """Group results by samples and way of measuring, in the order of first appearance.

    A group has the same index and number of samples, the same protocol and profile, and either TTA throughout or none. Raises
    ResultError where the images of a group differ nevertheless.
    """
    together: dict[tuple[object, ...], list[tuple[Path, Results]]] = {}
    for path, results in files.items():
        way = [results.protocol.get(fact) for fact in ("protocol", "profile", "TTA")]
        together.setdefault((results.index_sha256, results.samples, *way), []).append((path, results))
    groups = []
    for members in together.values():
        first = members[0][1]
        for path, results in members:
            if _keys(results.rows[0]) != _keys(first.rows[0]):
                raise ResultError(
                    f"{path} and {members[0][0]} state the same samples and have other images: was one edited? Report on them "
                    f"one by one, or run `vfi benchmark` again"
                )
        rows = [(row, path, results) for path, results in members for row in results.models]
        names = [row.model for row, _, _ in rows]
        entries = tuple(
            Entry(row.model if names.count(row.model) == 1 else f"{row.model} ({path})", row, path, results)
            for row, path, results in rows
        )
        groups.append(Group(_title(first), first.samples, first.rows[0], first.rows[1], entries, tuple(members)))
    return groups


QUARTERS = ("slowest quarter", "second", "third", "fastest quarter")


def by_motion(row: Row, motion: Sequence[float]) -> list[tuple[float, float]]:
    """Return (upper bound of the motion in pixels, mean PSNR in dB) of each quarter of the images, slowest first.

    Empty for fewer than four images, or where motion was not estimated.
    """
    if len(motion) < len(QUARTERS):
        return []
    order = sorted(range(len(motion)), key=motion.__getitem__)
    edges = [round(len(order) * quarter / len(QUARTERS)) for quarter in range(len(QUARTERS) + 1)]
    parts = [order[start:end] for start, end in itertools.pairwise(edges)]
    return [(motion[part[-1]], statistics.mean(row.images[i].psnr for i in part)) for part in parts]


MOST_CLIPS = 40
"""Most clips of a set with results by clip: more of them would fill pages."""
_CLIP = re.compile(r"(?P<clip>.+)-\d{6,}")  # keys of shards.video: the clip and the number of its first frame


def by_clip(images: Sequence[ImageScore]) -> dict[str, list[int]]:
    """Return the numbers of the images of each clip, and of each folder that holds several clips.

    Clips and folders are read from the keys of `shards.video`: `davis__goat-000012` is of the clip `davis__goat` in the folder
    `davis`, which is called `davis__*`. Empty for other keys, a single clip, and more than MOST_CLIPS of them.
    """
    clips: dict[str, list[int]] = {}
    for number, image in enumerate(images):
        match = _CLIP.fullmatch(image.key)
        if match is None:
            return {}
        clips.setdefault(match["clip"], []).append(number)
    if not 1 < len(clips) <= MOST_CLIPS:
        return {}
    folders: dict[str, list[str]] = {}
    for clip in clips:
        folder, separator, _ = clip.rpartition("__")
        if separator:
            folders.setdefault(folder, []).append(clip)
    groups: dict[str, list[int]] = {}
    for folder, inside in folders.items():
        if 1 < len(inside) < len(clips):
            groups[f"{folder}__*"] = [number for clip in inside for number in clips[clip]]
    return groups | clips


def table(results: Results) -> str:
    """Format the rows as aligned text."""
    average = results.rows[0].psnr
    lines = [("model", "PSNR dB", "SSIM", "IE", "gain dB")]
    for row in results.rows:
        gain = f"{row.psnr - average:+.3f}" if row.model != FRAME_AVERAGE else ""
        lines.append((row.model, f"{row.psnr:.3f}", f"{row.ssim:.4f}", f"{row.ie:.3f}", gain))
    return f"{aligned(lines)}\n{results.samples} samples of {results.data}"
