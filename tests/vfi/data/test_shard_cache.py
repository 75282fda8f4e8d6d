"""Shards behind a URL: the same batches as from a folder, over a network that fails, through a cache that stays small."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import itertools
import json
import multiprocessing
import os
import pwd
import re
import shutil
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from warm import TRAIN, Process

from shards.schema import ShardError, read_index
from vfi import benchmark, train
from vfi.checkpoint.store import latest
from vfi.config import command_line
from vfi.config.configs import ConfigError, DataConfig
from vfi.data.download import MissingError, Patience, StorageError, fetch
from vfi.data.evaluation_loader import evaluation_batches
from vfi.data.loader import TrainingLoader
from vfi.data.shard_cache import Cache, RemoteFolder, UnusableShardError, cache_at, make_room, shard_folder

CPU = torch.device("cpu")
IMPATIENT = Patience(attempts=4, first_wait=0.01, longest_wait=0.05, timeout=1.0)
GB = 10**9


class Server:
    """A folder over http, on loopback; `troubles` are taken one a request, then it works."""

    def __init__(self, root: Path, ranges: bool = True) -> None:
        self.root, self.ranges = root, ranges
        self.troubles: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, span = self.path.rpartition("/")[2], self.headers.get("Range")
                server.requests.append((name, span))
                trouble = server.troubles.pop(0) if server.troubles else ""
                if trouble.isdigit():
                    self.send_error(int(trouble))
                    return
                if trouble == "hang":
                    time.sleep(2)
                    return
                if not (server.root / name).is_file():
                    self.send_error(404)
                    return
                whole = (server.root / name).read_bytes()
                start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and server.ranges else 0
                data = whole[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
                if trouble == "truncate":  # a body that is short, and a header that agrees
                    data = data[: len(data) // 2]
                elif trouble == "long":
                    data += b"more"
                elif trouble == "flip":
                    data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
                if trouble != "no length":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if trouble == "slow":
                    time.sleep(0.5)
                if trouble == "trickle":
                    for byte in data[:100]:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.05)
                    return
                if trouble == "cut":
                    data = data[: len(data) // 3]
                if trouble == "drop":
                    self.wfile.write(data[: len(data) // 3])
                    self.wfile.flush()
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, no goodbye
                    self.connection.close()
                    return
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        class Quiet(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: object) -> None:
                pass

        self.httpd = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/set/train"
        threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True).start()

    def count(self, name: str) -> int:
        return sum(requested == name for requested, _ in self.requests)

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


@contextlib.contextmanager
def serving(root: Path, **options: bool) -> Iterator[Server]:
    server = Server(root, **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(train_shards) -> Iterator[Server]:
    with serving(train_shards) as server:
        yield server


def remote(server: Server, directory: Path, limit: int = GB) -> RemoteFolder:
    return RemoteFolder(server.url, Cache(directory, limit), IMPATIENT)


def content(folder, entry) -> bytes:
    with folder.open(entry) as file:
        file.seek(0)
        return file.read()


def cached(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "lock")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_local_folder(server, train_shards, tmp_path, workers):
    def batches(path):
        config = DataConfig(data_path=(path,), batch_size=4, crop=64, num_workers=workers, cache_dir=str(tmp_path / "cache"))
        return list(itertools.islice(TrainingLoader(config, 3, CPU, accumulation=1).batches(), 7))

    for one, other in zip(batches(str(train_shards)), batches(server.url), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.imgt, other.imgt)
        assert other.faults == ()
    assert [server.count(entry.name) for entry in read_index(train_shards).shards] == [1, 1, 1]


def test_evaluation_reads_a_url_and_the_second_time_the_cache(server, train_shards, tmp_path):
    for _ in range(2):
        folder = remote(server, tmp_path)
        for one, other in zip(evaluation_batches(folder, CPU, workers=2), evaluation_batches(train_shards, CPU), strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.imgt, other.imgt)
    names = Counter(name for name, _ in server.requests)
    assert names == {"index.json": 2} | {entry.name: 1 for entry in read_index(train_shards).shards}
    assert cached(tmp_path) == sorted(f"{entry.sha256}.tar" for entry in read_index(train_shards).shards)


class Versioned(MemoryFileSystem):
    """Takes its arguments in the order of s3fs, and has errors of a kind of its own."""

    protocol = "versioned"
    troubles: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("versioned://"))

    def cat_file(self, path, version_id=None, start=None, end=None, **options):
        assert version_id is None
        if self.troubles:
            raise MemoryError(self.troubles.pop())
        return super().cat_file(path, start=start, end=end, **options)


@pytest.mark.parametrize("protocol", ["memory", "versioned"])
def test_other_storage_comes_through_fsspec(monkeypatch, train_shards, tmp_path, protocol):
    fsspec.register_implementation("versioned", Versioned, clobber=True)
    monkeypatch.setattr("vfi.data.download._PIECE", 1000)
    store = fsspec.filesystem(protocol)
    store.put(str(train_shards), "/shards-of-test", recursive=True)
    url = f"{protocol}://shards-of-test"
    try:
        folder = RemoteFolder(url, Cache(tmp_path, GB), IMPATIENT)
        Versioned.troubles = ["first", "second"]
        assert folder.read_index() == read_index(train_shards)
        for entry in read_index(train_shards).shards:
            assert content(folder, entry) == (train_shards / entry.name).read_bytes()
        with pytest.raises(StorageError, match=rf"{url}/none is not a shard folder: it has no index\.json"):
            shard_folder(f"{url}/none").read_index()
    finally:
        store.rm("/shards-of-test", recursive=True)


@pytest.mark.parametrize(
    "troubles",
    [
        ["drop"],
        ["drop"] * 3,
        ["truncate", "cut"],
        ["500", "503", "429"],
        ["hang"],
        ["slow"],
        ["trickle"],
        ["no length"],
        ["long"],
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_failing_network_costs_time_and_nothing_else(train_shards, tmp_path, troubles, ranges):
    index = read_index(train_shards)
    with serving(train_shards, ranges=ranges) as server:
        server.troubles = list(troubles)
        folder = remote(server, tmp_path)
        if troubles == ["long"]:  # never written further than the index says
            with pytest.raises(StorageError, match="is longer than the"):
                content(folder, index.shards[0])
        else:
            assert content(folder, index.shards[0]) == (train_shards / index.shards[0].name).read_bytes()
        assert server.troubles == []
        starts = [int(span[6:-1]) for _, span in server.requests if span]
        if troubles == ["truncate", "cut"]:  # goes on where it ended
            size = index.shards[0].bytes
            assert starts == [size // 2, size // 2 + (size - size // 2 if ranges else 0) // 3]


def test_an_index_is_fetched_anew_and_not_continued(server, train_shards, tmp_path):
    server.troubles = ["drop", "500", "drop"]
    assert remote(server, tmp_path).read_index() == read_index(train_shards)
    assert server.requests == [("index.json", None)] * 4


def test_what_was_left_behind_is_continued_and_checked(server, train_shards, tmp_path):
    first, second, third = read_index(train_shards).shards
    left = (first, (train_shards / first.name).read_bytes()[:5000]), (second, b"j" * 5000), (third, bytes(third.bytes + 1))
    for entry, start in left:
        (tmp_path / f"{entry.sha256}.{entry.bytes}.part").write_bytes(start)
        assert content(remote(server, tmp_path), entry) == (train_shards / entry.name).read_bytes()
    spans = [span for _, span in server.requests]
    # junk is seen by its sha256 and fetched from the start, what is too long at once
    assert spans == ["bytes=5000-", "bytes=5000-", None, None]


def test_attempts_are_counted_and_the_last_cause_is_named(server, train_shards, tmp_path):
    server.troubles = ["500", "drop", "500", "503"]
    folder, entry = remote(server, tmp_path), read_index(train_shards).shards[0]
    with pytest.raises(StorageError) as error:
        content(folder, entry)
    message = f"{server.url}/{entry.name} could not be fetched in 4 attempts, the last of which failed: 503 Service Unavailable"
    assert str(error.value).startswith(message)
    assert server.count(entry.name) == 4
    assert content(folder, entry) == (train_shards / entry.name).read_bytes()  # a later try is not refused


def test_progress_is_no_failure(tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(12 << 20))
    with serving(tmp_path) as server, (tmp_path / "copy").open("w+b") as file:
        server.troubles = ["cut"] * 4  # more than the attempts that may fail in a row
        fetch(f"{server.url}/large", file, 12 << 20, 12 << 20, IMPATIENT._replace(attempts=2))
        assert len(server.requests) == 5
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "large").read_bytes()


def test_waits_double_up_to_a_limit(monkeypatch, tmp_path):
    waits: list[float] = []
    monkeypatch.setattr("vfi.data.download.time.sleep", waits.append)
    monkeypatch.setattr("vfi.data.download.random.uniform", lambda low, high: high)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(StorageError, match=rf"http://127\.0\.0\.1:{port}/x could not be fetched in 8 attempts.*refused"):
        fetch(f"http://127.0.0.1:{port}/x", (tmp_path / "x").open("w+b"), 9, 9, Patience())
    assert waits == [0.5, 1, 2, 4, 8, 16, 30]


@pytest.mark.parametrize(("code", "kind"), [("403", StorageError), ("401", StorageError), ("404", MissingError)])
def test_a_refusal_is_not_tried_again(server, tmp_path, code, kind):
    server.troubles = [code]
    with pytest.raises(kind, match=rf"{server.url}/index\.json: {code}"):
        fetch(f"{server.url}/index.json", (tmp_path / "x").open("w+b"), None, GB, IMPATIENT)
    assert len(server.requests) == 1


def test_a_wrong_shard_is_fetched_once_more_and_never_used(train_shards, tmp_path):
    source = Path(shutil.copytree(train_shards, tmp_path / "source"))
    entry = read_index(source).shards[1]
    wrong = bytearray((source / entry.name).read_bytes())
    wrong[600] ^= 1
    with serving(source) as server:
        server.troubles = ["flip"]
        assert content(remote(server, tmp_path / "cache"), entry) == (train_shards / entry.name).read_bytes()
        assert server.count(entry.name) == 2
        (source / entry.name).write_bytes(wrong)
        folder = remote(server, tmp_path / "other")
        for _ in range(3):  # and not again for each of its samples
            with pytest.raises(UnusableShardError, match="fetched twice, and its sha256 is not what the index says"):
                content(folder, entry)
        assert server.count(entry.name) == 4
        assert cached(tmp_path / "other") == []
        (source / entry.name).unlink()
        with pytest.raises(ShardError, match=rf"{server.url}/{entry.name}: .*404"):
            list(evaluation_batches(remote(server, tmp_path / "third"), CPU))


@pytest.mark.parametrize("keep_time", [True, False])
def test_damage_in_the_cache_is_noticed(server, train_shards, tmp_path, keep_time):
    """By each process at its first look, and by one that has looked before when the file has changed since."""
    entry = read_index(train_shards).shards[0]
    path = tmp_path / f"{entry.sha256}.tar"
    first = remote(server, tmp_path)
    whole = content(first, entry)
    for damaged in (whole[:-1] + b"x", whole[:600] + b"\xff" + whole[601:], whole[:100], b""):
        before = path.stat()
        path.write_bytes(damaged)
        if keep_time:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        folder = remote(server, tmp_path) if keep_time else first
        fetched = server.count(entry.name)
        assert content(folder, entry) == whole
        assert server.count(entry.name) == fetched + (damaged != whole)


def test_the_least_recently_used_goes_first(server, train_shards, tmp_path):
    entries = read_index(train_shards).shards
    folder = remote(server, tmp_path, limit=sum(entry.bytes for entry in entries) - 1)
    for number in (0, 1, 0, 2):
        content(folder, entries[number])
        time.sleep(0.01)
    assert cached(tmp_path) == sorted(f"{entries[number].sha256}.tar" for number in (0, 2))


def test_foreign_files_are_neither_counted_nor_removed(tmp_path):
    (tmp_path / "thesis.tar").write_bytes(bytes(1000))
    (tmp_path / ("0" * 64 + ".tar")).write_bytes(bytes(1000))
    assert make_room(Cache(tmp_path, 1500), 1500)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tar"]


def test_what_is_being_read_or_fetched_is_not_removed(server, train_shards, tmp_path):
    first, second, _ = read_index(train_shards).shards
    folder = remote(server, tmp_path)
    with folder.open(first) as file:
        assert not make_room(Cache(tmp_path, first.bytes), 1)
        file.seek(0)
        assert file.read() == (train_shards / first.name).read_bytes()
    part = tmp_path / f"{second.sha256}.{second.bytes}.part"
    part.touch()  # nobody is at it: counted as whole, and removed
    assert not make_room(Cache(tmp_path, 10), 11)
    assert cached(tmp_path) == []


def read_all(url: str, directory: Path, limit: int, rounds: int, seed: int) -> None:
    """What a process of a test does: read every shard a few times, in an order of its own."""
    folder = RemoteFolder(url, Cache(directory, limit), IMPATIENT)
    entries = list(folder.read_index().shards)
    for number in range(rounds):
        for entry in entries[(seed + number) % len(entries) :] + entries[: (seed + number) % len(entries)]:
            assert hashlib.sha256(content(folder, entry)).hexdigest() == entry.sha256


def in_processes(count: int, *arguments: object) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all, args=(*arguments, seed)) for seed in range(count)]
    for process in processes:
        process.start()
    return processes


def used(directory: Path) -> int:
    """Blocks that the files of a folder take, and parts with all they will take."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            declared = re.fullmatch(r"\w{64}\.(\d+)\.part", path.name)
            with contextlib.suppress(FileNotFoundError):
                total += int(declared[1]) if declared else path.stat().st_size
    return total


@pytest.mark.parametrize("room", [1, 2])
def test_the_bound_holds_with_several_processes(server, train_shards, tmp_path, room):
    """With room for one shard or two and three processes after all of them."""
    limit = room * max(entry.bytes for entry in read_index(train_shards).shards)
    processes = in_processes(3, server.url, tmp_path, limit, 6)
    largest = 0
    while any(process.is_alive() for process in processes):
        # a file that is renamed or removed during the walk is counted twice or not at all: the least of several looks
        largest = max(largest, min(used(tmp_path) for _ in range(3)))
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 0 < largest <= limit


def test_processes_fetch_a_shard_once(server, train_shards, tmp_path):
    server.troubles = ["slow"] * 6
    processes = in_processes(4, server.url, tmp_path, GB, 2)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [server.count(entry.name) for entry in read_index(train_shards).shards] == [1, 1, 1]


def test_a_process_that_is_killed_leaves_nothing_locked(server, train_shards, tmp_path):
    entry = read_index(train_shards).shards[0]
    server.troubles = ["", "hang"]
    (process,) = in_processes(1, server.url, tmp_path, GB, 1)
    while server.count(entry.name) == 0:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert cached(tmp_path) == [f"{entry.sha256}.{entry.bytes}.part"]
    assert content(remote(server, tmp_path), entry) == (train_shards / entry.name).read_bytes()
    assert cached(tmp_path) == [f"{entry.sha256}.tar"]


def test_a_cache_that_is_too_small_is_refused_before_training(server, train_shards, tmp_path):
    sizes = [entry.bytes for entry in read_index(train_shards).shards]
    data = DataConfig(data_path=(server.url,), batch_size=4, crop=64, num_workers=0, cache_dir=str(tmp_path))
    small = dataclasses.replace(data, cache_gb=(sum(sizes) - 1) / GB)
    with pytest.raises(StorageError, match=r"are read at a time.*Raise --cache_gb, or lower --shuffle_shards 8"):
        TrainingLoader(small, 3, CPU, accumulation=1)
    TrainingLoader(dataclasses.replace(small, shuffle_shards=1), 3, CPU, accumulation=1)
    TrainingLoader(dataclasses.replace(data, cache_gb=sum(sizes) / GB), 3, CPU, accumulation=1)
    with pytest.raises(StorageError, match=r"the whole cache .*: raise --cache_gb"):
        content(remote(server, tmp_path, limit=max(sizes) - 1), max(read_index(train_shards).shards, key=lambda e: e.bytes))


def test_a_cache_that_cannot_be_written_is_said(server, train_shards, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"the cache .*file.*can't be used.*--cache_dir"):
        content(remote(server, tmp_path / "file" / "cache"), read_index(train_shards).shards[0])


def test_a_user_without_a_home_names_a_cache(server, train_shards, monkeypatch):
    """Such as the id of a container, which no list of users has."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(StorageError, match=r"the cache ~.* can't be used \(this user has no home folder.*--cache_dir"):
        content(remote(server, cache_at().directory), read_index(train_shards).shards[0])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://x/y", r"nothing://x/y/index\.json: Protocol not known: nothing; give a folder, http\(s\)://, s3://"),
        ("http://127.0.0.1:1/x", r"http://127\.0\.0\.1:1/x/index\.json could not be fetched in 4 attempts.*refused"),
    ],
)
def test_an_address_that_does_not_work_is_named(tmp_path, url, message):
    with pytest.raises(StorageError, match=message):
        RemoteFolder(url, Cache(tmp_path, GB), IMPATIENT).read_index()


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, tmp_path, protocol, package):
    def without(url: str) -> None:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr("fsspec.core.url_to_fs", without)
    with pytest.raises(StorageError, match=rf"{protocol}:// needs a package that is not installed; .*pip install {package}"):
        RemoteFolder(f"{protocol}://bucket/train", Cache(tmp_path, GB), IMPATIENT).read_index()


def altered(folder: Path, out: Path, **changes: object) -> Path:
    """A folder with nothing but an index, the first shard of which has other entries."""
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0] |= changes
    out.mkdir()
    (out / "index.json").write_text(json.dumps(index))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../../etc/passwd"}, "must be a plain file name"),
        ({"name": "/etc/passwd"}, "must be a plain file name"),
        ({"sha256": "../../../tmp/x"}, "has no sha256 or size"),
        ({"sha256": "0" * 63}, "has no sha256 or size"),
        ({"bytes": -1}, "samples and bytes must be whole numbers of at least 0, and sha256 a text"),
    ],
)
def test_an_index_does_not_choose_where_files_go(train_shards, tmp_path, changes, message):
    with serving(altered(train_shards, tmp_path / "set", **changes)) as server, pytest.raises(ShardError, match=message):
        remote(server, tmp_path / "cache").read_index()


def test_the_job_says_what_is_wrong_in_one_line(server, tmp_path):
    server.troubles = ["403"]
    process = Process(TRAIN, "--preset", "tiny", "--data_path", server.url, "--output_dir", tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = output.strip().splitlines()[-1:]
    assert line.startswith(f"error: {server.url}/index.json: 403 Forbidden: the server refuses")
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cache_gb 0", "--cache_gb is 0.0; it must be positive"),
        ("--max_bad_sample_rate 1.5", "--max_bad_sample_rate is 1.5.*must be a fraction between 0 and 1"),
        ("--data_path here --cache_dir there", "--cache_dir there has no effect without a URL in --data_path or --val_path"),
        ("--data_path here --cache_gb 3", "--cache_gb 3.0 has no effect"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        command_line.from_command_line(flags.split())
    command_line.from_command_line(
        ["--data_path", "here", "--val_path", "s3://bucket/val", "--cache_dir", "there", "--cache_gb", "3"]
    )


@pytest.mark.slow
def test_a_run_and_a_benchmark_from_a_url_are_those_from_a_folder(server, train_shards, tmp_path):
    numbers = []
    for name, path in (("local", str(train_shards)), ("remote", server.url)):
        cache = ["--cache_dir", str(tmp_path / "cache")] if name == "remote" else []
        flags = ["--preset", "tiny", "--crop", "64", "--steps", "2", "--batch_size", "4", "--num_workers", "1", *cache]
        folders = ["--data_path", path, "--val_path", path, "--val_samples", "3", "--output_dir", str(tmp_path)]
        train.main([*flags, *folders, "--exp_name", name])
        out = tmp_path / f"{name}.json"
        flags = ["--model", str(tmp_path / name), "--limit", "3", "--pictures", "0", "--workers", "1", *cache]
        benchmark.main([*flags, "--data", path, "--out", str(out)])
        results = json.loads(out.read_text())
        weights = (latest(tmp_path / name).path / "model.safetensors").read_bytes()
        numbers.append((hashlib.sha256(weights).hexdigest(), results["index_sha256"], [row["psnr"] for row in results["rows"]]))
    assert numbers[0] == numbers[1]
