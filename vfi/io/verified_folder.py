"""Write folders atomically, with a manifest that reveals later damage.

    write_folder(folder, files)     writes beside it under a dot name, syncs, renames; the manifest is written last
    problems(folder)                reads everything again; empty when every file is what was written

manifest.json: {"version": 1, "files": {"model.safetensors": {"bytes": 123, "sha256": "…"}, …}}

Names that begin with a dot are temporary: what a killed process left under one is removed by the next write, and by
sweep(folder).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from vfi.io.dataclass_json import RecordError, from_object, to_json

MANIFEST = "manifest.json"
_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a file in the folder: no path


class ManifestError(ValueError):
    """Raised for a manifest that is missing or not usable; the message says which and why."""


class FolderWriteError(RuntimeError):
    """Raised when a folder could not be written; the former one is kept. The message says why and how much room there is."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Size and hash of a file as it was written."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of a folder as they were written; the manifest does not list itself."""

    version: int
    files: dict[str, Entry]


def write_folder(folder: Path, files: Iterable[tuple[str, bytes | memoryview]]) -> None:
    """Replace `folder` by these files (name, content) and a manifest, or raise FolderWriteError."""
    parent, temporary = folder.parent, _beside(folder, "new")
    at = temporary
    size = 0
    entries: dict[str, Entry] = {}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        temporary.mkdir()
        for name, content in files:
            at, size = temporary / name, len(content)
            entries[name] = Entry(size, hashlib.sha256(content).hexdigest())
            _write(at, content)
        _write(temporary / MANIFEST, to_json(Manifest(_VERSION, entries)).encode())
        _sync(temporary)
        if folder.exists():
            folder.rename(_beside(folder, "old"))
        temporary.rename(folder)
        _sync(parent)
    except OSError as error:
        raise FolderWriteError(_complaint(folder, at.name, size, error)) from error
    finally:
        _delete(temporary)
    _delete(_beside(folder, "old"))


def remove_folder(folder: Path) -> None:
    """Remove a folder atomically: it never exists partially under its name."""
    old = _beside(folder, "old")
    folder.rename(old)
    _delete(old)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of this folder, and of folders whose names differ only in their final number."""
    for path in folder.parent.glob(f".{folder.name.rstrip('0123456789')}*"):
        _delete(path)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of `folder`; ManifestError when it is missing, damaged or names anything outside the folder."""
    path = folder / MANIFEST
    if why := _not_plain(path):
        raise ManifestError(why)
    try:
        manifest: Manifest = from_object(Manifest, json.loads(path.read_bytes()), MANIFEST)
    except (OSError, RecordError, RecursionError, ValueError) as error:
        raise ManifestError(f"{MANIFEST} cannot be used: {error}") from error
    if manifest.version != _VERSION:
        raise ManifestError(f"{MANIFEST} has version {manifest.version}; this program reads version {_VERSION}")
    if wrong := [name for name in manifest.files if not _NAME.fullmatch(name)]:
        raise ManifestError(f"{MANIFEST} names {wrong[0]!r}, which is not the name of a file in this folder")
    return manifest


def problems(folder: Path, names: Iterable[str] | None = None) -> Iterator[str]:
    """Read files again, all that the manifest lists or only `names`, and return a line for each problem."""
    try:
        files = read_manifest(folder).files
    except ManifestError as error:
        yield str(error)
        return
    for name in files if names is None else names:
        why = _difference(folder / name, files[name]) if name in files else f"{name} is not in {MANIFEST}"
        if why:
            yield why


def _difference(path: Path, entry: Entry) -> str:
    """Return how a file differs from its entry; empty when it does not."""
    if why := _not_plain(path):
        return why
    try:
        if path.stat().st_size != entry.bytes:
            return f"{path.name} has {path.stat().st_size} bytes instead of the {entry.bytes} that were written"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return "" if same else f"{path.name} is not what was written (its sha256 differs)"


def _not_plain(path: Path) -> str:
    """Return why a path is no plain file (links and pipes are none); empty when it is one."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        return f"{path.name} is missing" if isinstance(error, FileNotFoundError) else f"{path.name}: {error.strerror}"
    return "" if stat.S_ISREG(mode) else f"{path.name} is not a plain file"


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write a file and sync it to disk, so that a full disk is noticed here."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _delete(path: Path) -> None:
    """Remove a folder or a link to one, if it exists; what can't be removed is left for the next time."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _complaint(folder: Path, name: str, size: int, error: OSError) -> str:
    """Return a message with the path, the problem and the free space."""
    here = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(here).free
    return (
        f"{folder} could not be written: {error.strerror or error} ({name}: {size:,} bytes needed, {free:,} bytes free in "
        f"{here}); what was there before is kept. Make room, or check the quota and the rights of that folder, and start again "
        f"(--resume auto resumes a run)"
    )
