"""Folders that are whole or absent, and whose damage is found: against real small disks, not only simulated ones."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vfi.io.verified_folder import (
    MANIFEST,
    FolderWriteError,
    ManifestError,
    problems,
    read_manifest,
    remove_folder,
    write_folder,
)

FILES = {"a.bin": b"first" * 1000, "b.json": b"{}", "empty": b""}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "parent" / "thing_1"
    write_folder(path, FILES.items())
    return path


def test_what_was_written_is_there_and_listed(folder):
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST} == FILES
    listed = json.loads((folder / MANIFEST).read_text())
    assert listed == {
        "version": 1,
        "files": {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in FILES.items()},
    }
    assert list(problems(folder)) == []
    assert [path.name for path in folder.parent.iterdir()] == ["thing_1"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "a.bin is missing"),
        (lambda folder: (folder / "a.bin").write_bytes(b"first" * 999), "a.bin has 4995 bytes instead of the 5000"),
        (lambda folder: (folder / "a.bin").write_bytes(b"First" + b"first" * 999), "a.bin is not what was written"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json cannot be used"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "manifest.json cannot be used"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json cannot be used"),
        (lambda folder: (folder / MANIFEST).write_text('{"version": 2, "files": {}}'), "has version 2"),
    ],
)
def test_damage_names_the_file(folder, damage, message):
    damage(folder)
    (found,) = problems(folder)
    assert message in found


def test_only_the_files_asked_for_are_read(folder):
    (folder / "a.bin").write_bytes(b"x" * 5000)
    assert list(problems(folder, ["b.json"])) == []
    assert list(problems(folder, ["other"])) == ["other is not in manifest.json"]


def link_to_the_same(folder: Path) -> None:
    (folder / "a.bin").rename(folder.parent / "elsewhere")
    (folder / "a.bin").symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    (folder / "a.bin").unlink()
    os.mkfifo(folder / "a.bin")


@pytest.mark.parametrize("replace", [link_to_the_same, pipe])
def test_links_and_pipes_are_not_followed(folder, replace):
    replace(folder)
    assert list(problems(folder)) == ["a.bin is not a plain file"]


@pytest.mark.parametrize("name", ["../thing_1/a.bin", "/etc/passwd", "..", "", "a\\b", ".hidden", "a/b", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(folder, name):
    entry = {"bytes": 5000, "sha256": hashlib.sha256(FILES["a.bin"]).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": {name: entry}}))
    with pytest.raises(ManifestError, match="not the name of a file in this folder"):
        read_manifest(folder)
    (found,) = problems(folder)
    assert "not the name of a file" in found


def test_a_folder_is_replaced_and_what_was_killed_is_cleared_away(folder):
    parent = folder.parent
    for name in (".thing_2", ".thing_2.new", ".thing_1.old"):
        (parent / name).mkdir()
        (parent / name / "part").write_text("half")
    (parent / ".others").mkdir()
    write_folder(folder, [("a.bin", b"second")])
    assert (folder / "a.bin").read_bytes() == b"second"
    assert list(problems(folder)) == []
    assert sorted(path.name for path in parent.iterdir()) == [".others", "thing_1"]


def test_a_link_to_a_folder_is_replaced_and_its_target_kept(folder):
    link = folder.parent / "thing_2"
    link.symlink_to(folder)
    write_folder(link, [("a.bin", b"second")])
    assert not link.is_symlink()
    assert list(problems(folder)) == list(problems(link)) == []
    link_again = folder.parent / "thing_3"
    link_again.symlink_to(folder)
    remove_folder(link_again)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["thing_1", "thing_2"]
    assert list(problems(folder)) == []


def test_an_error_or_interrupt_while_contents_are_made_leaves_what_was_there(folder):
    def contents(error):
        yield "a.bin", b"new"
        raise error

    for error in (KeyboardInterrupt(), ValueError("a bug")):
        with pytest.raises(type(error)):
            write_folder(folder, contents(error))
        assert list(problems(folder)) == []
        assert [path.name for path in folder.parent.iterdir()] == ["thing_1"]


WRITE = """
import resource, sys
from pathlib import Path
from vfi.io.verified_folder import FolderWriteError, write_folder
limit, folder = int(sys.argv[1]), Path(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    write_folder(folder, [("small", b"x" * 100), ("large", b"y" * 300_000)])
except FolderWriteError as error:
    print(error)
else:
    print("written")
"""


def written_elsewhere(folder: Path, limit: int = 0) -> str:
    command = [sys.executable, "-c", WRITE, str(limit), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_limit_on_the_size_of_files_keeps_what_was_there(folder):
    """The system itself refuses the write, as it does on a full disk or above a quota."""
    printed = written_elsewhere(folder, limit=200_000)
    assert f"{folder} could not be written: File too large (large: 300,000 bytes needed" in printed
    assert "bytes free in" in printed
    assert list(problems(folder)) == []
    assert [path.name for path in folder.parent.iterdir()] == ["thing_1"]
    assert written_elsewhere(folder, limit=400_000) == "written\n"
    assert (folder / "large").stat().st_size == 300_000


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"no file system of its own can be mounted here: {mount.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_keeps_what_was_there(small_disk):
    folder = small_disk / "thing_1"
    assert written_elsewhere(folder) == "written\n"
    printed = written_elsewhere(folder)  # there is room for one, not for two
    assert "No space left on device (large: 300,000 bytes needed, " in printed
    assert f"bytes free in {small_disk})" in printed
    assert list(problems(folder)) == []
    assert [path.name for path in small_disk.iterdir()] == ["thing_1"]
    remove_folder(folder)
    assert written_elsewhere(folder) == "written\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_right_to_write_is_a_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FolderWriteError, match="Permission denied"):
        write_folder(tmp_path / "parent" / "thing_1", FILES.items())
    tmp_path.chmod(0o700)


def test_a_file_in_place_of_the_parent_is_a_clear_error(tmp_path):
    (tmp_path / "parent").write_text("in the way")
    with pytest.raises(FolderWriteError, match="could not be written: File exists"):
        write_folder(tmp_path / "parent" / "thing_1", FILES.items())


def test_everything_is_synced_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut can't leave the name without the content: each file and the folder are synced before the renaming."""
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(number: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(number)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"{path.name} -> {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    write_folder(tmp_path / "thing_1", FILES.items())
    assert events == [*FILES, MANIFEST, ".thing_1.new", ".thing_1.new -> thing_1", tmp_path.name]
