"""Access to shards in a local folder, over http(s) or fsspec (s3://, gs:// …), through a cache of bounded size.

    folder = shard_folder("https://host/set/train", cache_at("/scratch/cache", gigabytes=50))
    index = folder.read_index()
    with folder.open(index.shards[0]) as file: …

A remote shard is fetched whole, since the order of an epoch reads it nearly in sequence. In the cache lie

    <sha256>.tar          complete and checked; the one that was not used for longest goes first
    <sha256>.BYTES.part   being fetched, and counted with all its BYTES; what a broken connection left is continued
    lock                  held for the moment in which room is made

All processes of a machine may share a cache on a local disk. A process that fetches a shard holds its file's lock (flock: it
ends with its process) and the others wait; a reader holds a shared lock and so keeps it from being removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import quote

from shards.sample_rules import open_shard
from shards.schema import INDEX_NAME, LARGEST_INDEX, Index, ShardEntry, ShardError, parse_index, read_index, sha256_of
from vfi.credentials import hide
from vfi.data.download import PATIENCE, MissingError, Patience, StorageError, fetch

_LONGEST_WAIT = 1800.0  # seconds for another process to fetch a shard, or to give room
_POLL = 0.05  # seconds
_OURS = re.compile(r"[0-9a-f]{64}(?:\.tar|\.(\d+)\.part)")


class UnusableShardError(OSError):
    """Raised when a remote shard is missing or differs from its index, and fetching it again did not help."""


class Cache(NamedTuple):
    """The folder of cached remote shards, and its maximum size in bytes."""

    directory: Path
    limit: int


class ShardFolder(Protocol):
    """One split of one data set, at any location; its `str` is its path or URL."""

    advice: str
    """What to do about a damaged shard, for the end of a message."""

    def index_bytes(self) -> bytes:
        """Return the content of index.json."""

    def read_index(self) -> Index:
        """Return the checked index.json; ShardError says what is wrong."""

    def check_room(self, size: int, advice: str) -> None:
        """Raise StorageError with `advice` when shards of `needed` bytes can't be available at the same time."""

    def open(self, entry: ShardEntry) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a shard for reading; OSError when it can't be read, StorageError when its storage can't be reached."""


def shard_folder(location: str | Path | ShardFolder, cache: Cache | None = None) -> ShardFolder:
    """Return the shard folder at a path or URL."""
    if not isinstance(location, str | Path):
        return location
    if "://" not in str(location):
        return LocalFolder(Path(location))
    return RemoteFolder(str(location), cache or cache_at())


def cache_at(directory: str = "", gigabytes: float = 50.0) -> Cache:
    """Return the cache in a folder, by default in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vfi" / "shards"
    return Cache(Path(directory) if directory else default, int(gigabytes * 1e9))


class LocalFolder:
    """A shard folder on a disk of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.advice = f": run `python -m shards.verify {path}`"

    def __str__(self) -> str:
        return str(self.path)

    def index_bytes(self) -> bytes:
        """See ShardFolder."""
        return (self.path / INDEX_NAME).read_bytes()

    def read_index(self) -> Index:
        """See ShardFolder."""
        return read_index(self.path)

    def check_room(self, size: int, advice: str) -> None:
        """See ShardFolder; local shards are always available."""

    def open(self, entry: ShardEntry) -> contextlib.AbstractContextManager[BinaryIO]:
        """See ShardFolder."""
        return open_shard(self.path / entry.name)


class RemoteFolder:
    """A shard folder behind a URL, and its shards in the cache."""

    def __init__(self, url: str, cache: Cache, patience: Patience = PATIENCE) -> None:
        self.url, self.cache, self.patience = hide([url])[0].rstrip("/"), cache, patience
        self.advice = ""
        self.checked: dict[str, tuple[int, ...]] = {}  # sha256 -> state of the file in which it was found
        self.unusable: dict[str, str] = {}  # sha256 -> why: it is not fetched for each of its samples

    def __str__(self) -> str:
        return self.url

    def index_bytes(self) -> bytes:
        """See ShardFolder."""
        data = io.BytesIO()
        try:
            fetch(f"{self.url}/{INDEX_NAME}", data, None, LARGEST_INDEX, self.patience)
        except MissingError as error:
            raise StorageError(f"{self.url} is not a shard folder: it has no {INDEX_NAME} ({error})") from error
        return data.getvalue()

    def read_index(self) -> Index:
        """See ShardFolder."""
        index = parse_index(self.index_bytes(), f"{self.url}/{INDEX_NAME}")
        for entry in index.shards:
            if not re.fullmatch(r"[0-9a-f]{64}", str(entry.sha256)) or not isinstance(entry.bytes, int) or entry.bytes < 1:
                raise ShardError(f"{self.url}/{INDEX_NAME}: {entry.name} has no sha256 or size: make the shards again")
        return index

    def check_room(self, size: int, advice: str) -> None:
        """See ShardFolder."""
        if size > self.cache.limit:
            raise StorageError(
                f"about {size / 1e9:.3g} GB of {self.url} are read at a time, and --cache_gb is {self.cache.limit / 1e9:.3g}: "
                f"each shard would be fetched over and over. Raise --cache_gb, or {advice}"
            )

    @contextlib.contextmanager
    def open(self, entry: ShardEntry) -> Iterator[BinaryIO]:
        """See ShardFolder."""
        if entry.sha256 in self.unusable:
            raise UnusableShardError(self.unusable[entry.sha256])
        try:
            file = self._obtain(entry)
        except UnusableShardError as error:
            self.unusable[entry.sha256] = str(error)
            raise
        except OSError as error:
            raise StorageError(
                f"the cache {self.cache.directory} can't be used ({error}): give another folder with --cache_dir, "
                f"or less room with --cache_gb"
            ) from error
        with file:
            yield file

    def _obtain(self, entry: ShardEntry) -> BinaryIO:
        """Return the complete, checked shard, opened and protected from removal until it is closed."""
        if entry.bytes > self.cache.limit:
            raise StorageError(
                f"{self.url}/{entry.name} has {entry.bytes / 1e9:.3g} GB, the whole cache {self.cache.limit / 1e9:.3g} GB: "
                f"raise --cache_gb"
            )
        if self.cache.directory.parts[:1] == ("~",):
            raise OSError("this user has no home folder that ~ could stand for")
        self.cache.directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _LONGEST_WAIT
        while time.monotonic() < deadline:
            file = self._open_complete(entry) or self._fetch_or_wait(entry)
            if file is not None:
                return file
        raise StorageError(
            f"{self.url}/{entry.name} could not be put into the cache {self.cache.directory} within {_LONGEST_WAIT / 60:.0f} "
            f"minutes: other processes hold what is in it; raise --cache_gb, or look for one that hangs"
        )

    def _open_complete(self, entry: ShardEntry) -> BinaryIO | None:
        """Return the shard from the cache; None when it isn't there, or was damaged and has been removed."""
        path = self.cache.directory / f"{entry.sha256}.tar"
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not self._is_good(file, entry):
            fcntl.flock(file, fcntl.LOCK_EX)
            with self._bookkeeping():
                if os.fstat(file.fileno()).st_nlink:  # no other process was faster
                    path.unlink()
            file.close()
            return None
        with contextlib.suppress(PermissionError):  # another user's file reads as well
            os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))  # the time of access: last use
        return file

    def _is_good(self, file: BinaryIO, entry: ShardEntry) -> bool:
        """Return whether a file is still in the cache, with the right size and sha256; hashed again only after a change."""
        found = os.fstat(file.fileno())
        state = (found.st_ino, found.st_size, found.st_mtime_ns)
        if not found.st_nlink or found.st_size != entry.bytes:
            return False
        if self.checked.get(entry.sha256) != state:
            if sha256_of(file) != entry.sha256:
                return False
            self.checked[entry.sha256] = state
        return True

    def _fetch_or_wait(self, entry: ShardEntry) -> BinaryIO | None:
        """Fetch the shard; return None after a moment when another process is fetching it, or when there is no room yet."""
        path = self.cache.directory / f"{entry.sha256}.{entry.bytes}.part"
        with contextlib.ExitStack() as stack:
            with self._bookkeeping():
                if (self.cache.directory / f"{entry.sha256}.tar").exists():
                    return None
                if not path.exists() and not make_room(self.cache, entry.bytes):
                    file = None
                else:
                    file = stack.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b"))
                    # while nobody else makes room: they take a part without a lock for one that was left behind
                    file = file if _try_lock(file) else None
            if file is None:
                time.sleep(_POLL)
                return None
            self._fill(file, path, entry)
            stack.pop_all()
        return file

    def _fill(self, file: BinaryIO, path: Path, entry: ShardEntry) -> None:
        """Complete a partial file, check and rename it; one that fails the check is fetched once more from the start."""
        url = f"{self.url}/{quote(entry.name)}"
        for _ in range(2):
            if file.seek(0, os.SEEK_END) > entry.bytes:
                file.truncate(file.seek(0))
            try:
                fetch(url, file, entry.bytes, entry.bytes, self.patience)
            except MissingError as error:
                self._drop(path)
                raise UnusableShardError(str(error)) from error
            if sha256_of(file) == entry.sha256:
                break
            file.truncate(0)
        else:
            self._drop(path)
            raise UnusableShardError("fetched twice, and its sha256 is not what the index says")
        file.flush()
        with self._bookkeeping():
            path.rename(self.cache.directory / f"{entry.sha256}.tar")
            fcntl.flock(file, fcntl.LOCK_SH)
        found = os.fstat(file.fileno())
        self.checked[entry.sha256] = (found.st_ino, found.st_size, found.st_mtime_ns)

    def _drop(self, path: Path) -> None:
        with self._bookkeeping():
            path.unlink()

    @contextlib.contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        """Hold the lock under which one process at a time makes room or adds and removes files."""
        with (self.cache.directory / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def make_room(cache: Cache, needed: int) -> bool:
    """Remove the least recently used shards until `needed` bytes fit; return False when too many are in use."""
    files = []
    for found in os.scandir(cache.directory):
        if match := _OURS.fullmatch(found.name):
            state = found.stat()
            size = int(match[1]) if match[1] else state.st_size
            files.append((max(state.st_atime_ns, state.st_mtime_ns), size, found.path))
    used = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if used + needed <= cache.limit:
            break
        with open(path, "rb") as file:
            if _try_lock(file):
                os.unlink(path)
                used -= size
    return used + needed <= cache.limit


def _try_lock(file: BinaryIO) -> bool:
    """Lock a file for this process alone; return whether no other process has it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
