"""Write samples as numbered tars with an index: in parallel, atomically, resumably, and with the same bytes every time.

A job makes a `Plan` (which shard holds what, decided before any work starts) and passes it to `write`:

    mark = fingerprint(source, files)              # identifies the job by its arguments and source files
    done = check_output(out, mark)                 # the index of a complete folder, None if work is left
    index = write(out, plan, mark, workers=4)

A shard is a pure function of its task, so its bytes depend neither on the number of workers nor on interruptions. It is written
under a hidden name and renamed when it is on disk; index.json is written last. `.plan.json` holds the fingerprint: the same job
resumes where it was killed, and any other job is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shards.codecs import JPEG_ENCODER
from shards.parallel import check_workers, run
from shards.schema import (
    INDEX_NAME,
    VERSION,
    Index,
    SampleMeta,
    ShardEntry,
    ShardError,
    check_limits,
    frame_members,
    read_index,
    sha256_of,
    shard_name,
    write_index,
)

PLAN_NAME = ".plan.json"
SAMPLES_PER_SHARD = 256
_PACKAGES = ("numpy", "pillow", "simplejpeg", "qoi", "av")  # packages that the bytes of a frame depend on
_OURS = re.compile(rf"shard-\d{{6}}\.tar|\.shard-\d{{6}}\.tar\.part|{re.escape(PLAN_NAME)}(\.\d+)?|\.?{INDEX_NAME}(\.\d+)?")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # 80: with its extension it fits the 100 bytes of a ustar name


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence, its frames already compressed. Flows are float32 [H, W, 2], or [H, W, 3] with weights, or None."""

    key: str
    meta: SampleMeta
    frames: tuple[bytes, ...]
    flow_t0: np.ndarray | None = None
    flow_t1: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A shard to write: `make`, which must be picklable, yields its `samples` samples in order. `origin` is for messages."""

    origin: str
    samples: int
    make: Callable[[], Iterator[Sample]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan of a whole folder, made before work starts. The fields are those of `Index`, but `shards` are tasks, not entries."""

    split: str
    codec: str
    frames: int
    has_flow: bool
    source: dict[str, Any]
    clips: tuple[str, ...]
    shards: tuple[ShardTask, ...]
    filtered: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


def source_of(job: str, arguments: dict[str, Any], color_conversion: str | None = None) -> dict[str, Any]:
    """Return `Index.source`: job, arguments and everything else that the bytes depend on.

    That is the versions of packages, `color_conversion` (for frames of videos), and the JPEG encoder for `codec` jpeg.
    """
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    source = {"job": job, "arguments": arguments, "versions": versions}
    if color_conversion is not None:
        source["color_conversion"] = color_conversion
    if arguments.get("codec") == "jpeg":
        source["jpeg_encoder"] = JPEG_ENCODER
    return source


def fingerprint(source: dict[str, Any], files: Iterable[tuple[str, os.stat_result]] = ()) -> str:
    """Return a hex digest of the arguments and of the source files' names, sizes and times, which identifies the job."""
    digest = hashlib.sha256(json.dumps([VERSION, source], sort_keys=True).encode())
    for name, stat in files:
        digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()


def check_output(out: Path, mark: str) -> Index | None:
    """Inspect an output folder without changing it, before any work is done.

    Returns the index of a folder that this same job has completed, or None for a new, empty or unfinished one.
    Raises ShardError for a folder that holds anything else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ShardError(f"output {out} is a file: give a folder")
    names = sorted(child.name for child in out.iterdir())
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise ShardError(
            f"output folder {out} holds other things ({some(foreign)}); nothing was touched: give a new or empty folder"
        )
    if not names:
        return None
    if _read_mark(out) != mark:
        raise ShardError(
            f"output folder {out} holds shards of another job (other settings, source files or package versions); "
            "nothing was touched: give another folder, or delete this one first"
        )
    return read_index(out) if INDEX_NAME in names else None


def write(out: Path, plan: Plan, mark: str, workers: int) -> Index:
    """Write all missing shards of `plan`, then index.json, and return the index.

    Raises ShardError when the folder holds something else, when another process writes into it, or when a shard fails.
    """
    done = check_output(out, mark)
    if done is not None:
        print(f"{out} is complete already, nothing to do", file=sys.stderr)
        return done
    check_workers(workers)
    if not plan.shards:
        raise ShardError(f"nothing to write into {out}: the plan has no samples")
    check_limits(plan.frames, (1, 1), len(plan.shards), sum(task.samples for task in plan.shards))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"output folder {out} cannot be made: {error.strerror}") from error
    with _locked(out, mark):
        for leftover in out.glob(".shard-*.part"):
            leftover.unlink()
        bare = dataclasses.replace(plan, shards=(), clips=(), filtered={}, skipped={})  # goes to every worker: keep it small
        make = functools.partial(_make_shard, out=out, plan=bare)
        tasks = list(enumerate(plan.shards))
        written = run(make, tasks, workers, name=_task_name, title=f"write {out.name}")
        index = _index_of(plan, written)
        write_index(out, index)
    return index


def describe(out: Path, index: Index) -> str:
    """Return a one-line summary of a finished folder for humans."""
    left_out = "".join(f", {count:,} left out as {reason}" for reason, count in index.filtered.items() if count)
    skipped = f", {len(index.skipped)} source files with faults" if index.skipped else ""
    return (
        f"{out}: {index.samples:,} samples of {index.frames} frames ({index.codec}, {index.split}) from {len(index.clips):,} "
        f"clips in {len(index.shards)} shards, {index.bytes / 1e6:,.1f} MB{left_out}{skipped}"
    )


def chunks(count: int, size: int) -> list[range]:
    """Split `count` samples into ranges of at most `size` whose lengths differ by at most one."""
    if size < 1:
        raise ShardError(f"samples_per_shard {size} is too small: give 1 or more")
    shards = -(-count // size)
    return [range(count * n // shards, count * (n + 1) // shards) for n in range(shards)]


def some(names: list[str], limit: int = 3) -> str:
    """Return the first `limit` names for a message: 'a, b, c and 4 more'."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


@dataclasses.dataclass(frozen=True)
class _Written:
    entry: ShardEntry
    sizes: tuple[tuple[int, int], ...]  # the different (height, width) in the shard


def _task_name(task: tuple[int, ShardTask]) -> str:
    return f"{shard_name(task[0])} ({task[1].origin})"


def _make_shard(numbered: tuple[int, ShardTask], out: Path, plan: Plan) -> _Written:
    number, task = numbered
    path = out / shard_name(number)
    if not path.exists():
        _write_tar(path, task, plan)
    return _read_back(path, task)


def _write_tar(path: Path, task: ShardTask, plan: Plan) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                count = sum(_add_sample(tar, sample, plan) for sample in task.make())
            file.flush()
            os.fsync(file.fileno())
        if count != task.samples:
            raise ShardError(f"the source gave {count} samples instead of {task.samples}: did it change during the job?")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _add_sample(tar: tarfile.TarFile, sample: Sample, plan: Plan) -> int:
    if not _KEY.fullmatch(sample.key):
        raise ShardError(f"key {sample.key!r} is not made of 1 to 80 letters, digits, '_' and '-'")
    if len(sample.frames) != plan.frames:
        raise ShardError(f"sample {sample.key} has {len(sample.frames)} frames instead of {plan.frames}")
    check_limits(plan.frames, (sample.meta.height, sample.meta.width), 1, 1)
    members = {"json": json.dumps(dataclasses.asdict(sample.meta)).encode()}
    members |= dict(zip(frame_members(plan.frames, plan.codec), sample.frames, strict=True))
    if plan.has_flow:
        members |= {"flow_t0.npy": _npy(sample, sample.flow_t0), "flow_t1.npy": _npy(sample, sample.flow_t1)}
    for extension, data in members.items():
        info = tarfile.TarInfo(f"{sample.key}.{extension}")
        info.size, info.mode = len(data), 0o644  # time, owner and group stay 0 for reproducible bytes
        tar.addfile(info, io.BytesIO(data))
    return 1


def _npy(sample: Sample, flow: np.ndarray | None) -> bytes:
    size = sample.meta.height, sample.meta.width
    if flow is None or flow.dtype != np.float32 or flow.shape not in ((*size, 2), (*size, 3)):
        raise ShardError(f"sample {sample.key} needs its flows as float32 [{sample.meta.height}, {sample.meta.width}, 2]")
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(flow), allow_pickle=False)
    return buffer.getvalue()


def _read_back(path: Path, task: ShardTask) -> _Written:
    """Return the entry and image sizes of a finished shard, read from the file: new and kept shards are treated alike."""
    sizes = set()
    samples = 0
    with tarfile.open(path, mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".json") else None
            if content is not None:
                meta = json.load(content)
                sizes.add((int(meta["height"]), int(meta["width"])))
                samples += 1
    if samples != task.samples:
        raise ShardError(f"{path} holds {samples} samples instead of {task.samples}: delete this shard and run the job again")
    return _Written(ShardEntry(path.name, samples, path.stat().st_size, sha256_of(path)), tuple(sorted(sizes)))


def _index_of(plan: Plan, written: list[_Written]) -> Index:
    heights, widths = zip(*(size for shard in written for size in shard.sizes), strict=True)
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    fields["shards"] = tuple(shard.entry for shard in written)
    return Index(**fields, min_size=(min(heights), min(widths)), max_size=(max(heights), max(widths)))


def _read_mark(out: Path) -> str | None:
    try:
        content = json.loads((out / PLAN_NAME).read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content.get("fingerprint") if isinstance(content, dict) else None


@contextlib.contextmanager
def _locked(out: Path, mark: str) -> Iterator[None]:
    """Lock the folder's plan file against concurrent writers; the lock of a killed process is released."""
    path = out / PLAN_NAME
    if not path.exists():
        temporary = path.with_name(f"{PLAN_NAME}.{os.getpid()}")
        temporary.write_text(json.dumps({"fingerprint": mark}) + "\n")
        temporary.replace(path)
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(f"another process is writing into {out}: wait for it or give another folder") from error
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
