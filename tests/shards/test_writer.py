"""Test that shards have the same bytes however they are made, are never partial, and never mixed with anything else."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from sources import digests

from shards import codecs, writer
from shards.schema import INDEX_NAME, SampleMeta, ShardError, read_index


def some_samples(numbers, size=(32, 48)):
    for number in numbers:
        frames = np.random.default_rng(number).integers(0, 256, (3, *size, 3), dtype=np.uint8)
        meta = SampleMeta(f"clip{number}", (0, 1, 2), *size)
        yield writer.Sample(f"sample-{number:04d}", meta, tuple(codecs.encode(frame, "png") for frame in frames))


def broken_samples(numbers):
    yield from some_samples(numbers[:1])
    raise ShardError("frame 7 is damaged")


def dying_samples(numbers):
    yield from some_samples(numbers[:1])
    os.kill(os.getpid(), signal.SIGKILL)


def faulty_samples(numbers):
    raise KeyError("a fault of the program")


def plan_of(count=10, size=4, make=some_samples, has_flow=False):
    tasks = tuple(
        writer.ShardTask(f"numbers {part[0]} to {part[-1]}", len(part), functools.partial(make, part))
        for part in writer.chunks(count, size)
    )
    return writer.Plan("train", "png", 3, has_flow, {"job": "test"}, tuple(f"clip{n}" for n in range(count)), tasks)


def test_plain_tar_and_plain_webdataset_read_the_shards(tmp_path):
    import webdataset

    index = writer.write(tmp_path, plan_of(), "mark", workers=1)
    assert [entry.samples for entry in index.shards] == [3, 3, 4]
    assert read_index(tmp_path) == index
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        names = tar.getnames()
        assert names[:5] == [
            "sample-0000.json",
            "sample-0000.im1.png",
            "sample-0000.im2.png",
            "sample-0000.im3.png",
            "sample-0001.json",
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
    urls = [str(tmp_path / entry.name) for entry in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"sample-{n:04d}" for n in range(10)]
    expected = np.random.default_rng(9).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    np.testing.assert_array_equal(samples[9]["im2.png"], expected[1])
    assert samples[9]["json"] == {"clip": "clip9", "frames": [0, 1, 2], "height": 32, "width": 48}


def test_bytes_do_not_depend_on_workers_or_on_interruptions(tmp_path):
    one, two, cut = tmp_path / "one", tmp_path / "two", tmp_path / "cut"
    writer.write(one, plan_of(), "mark", workers=1)
    writer.write(two, plan_of(), "mark", workers=2)
    writer.write(cut, plan_of(), "mark", workers=0)
    # as a killed job leaves it: no index, a shard missing, another one half written under its hidden name
    (cut / INDEX_NAME).unlink()
    (cut / "shard-000001.tar").unlink()
    (cut / ".shard-000001.tar.part").write_bytes(b"half a shard")
    kept = (cut / "shard-000000.tar").stat().st_mtime_ns
    writer.write(cut, plan_of(), "mark", workers=1)
    assert digests(one) == digests(two) == digests(cut)
    assert (cut / "shard-000000.tar").stat().st_mtime_ns == kept  # not made again


def test_a_killed_job_goes_on(tmp_path):
    """After a real SIGKILL of a parallel job no worker survives, and the next run completes the folder."""
    arguments = ["--samples", "60", "--size", "64x64", "--samples_per_shard", "2"]
    command = [sys.executable, "-m", "shards.synthetic", "--out", str(tmp_path / "cut"), "--workers", "2", *arguments]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "shard-000003.tar").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.kill()
    # stderr is shared with the workers: it ends when the last of them has gone
    job.communicate(timeout=30)
    assert not (tmp_path / "cut" / INDEX_NAME).exists()
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("shard-*.tar")}
    assert 0 < len(done) < 30

    from shards import synthetic

    synthetic.main(["--out", str(tmp_path / "cut"), *arguments])
    synthetic.main(["--out", str(tmp_path / "whole"), *arguments])
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in done} == done


def test_a_complete_folder_is_left_alone(tmp_path, capsys):
    first = writer.write(tmp_path, plan_of(), "mark", workers=1)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert writer.check_output(tmp_path, "mark") == first
    assert writer.write(tmp_path, plan_of(), "mark", workers=1) == first
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "complete already" in capsys.readouterr().err


@pytest.mark.parametrize("foreign", ["notes.txt", "shard-1.tar", "other.tar", "sequences/im1.png", ".hidden"])
def test_a_folder_with_other_things_is_refused_untouched(tmp_path, foreign):
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(ShardError, match="holds other things"):
        writer.write(tmp_path, plan_of(), "mark", workers=1)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("complete", [True, False])
def test_shards_of_another_job_are_refused_untouched(tmp_path, complete):
    writer.write(tmp_path, plan_of(), "mark", workers=1)
    if not complete:
        (tmp_path / INDEX_NAME).unlink()
    before = digests(tmp_path)
    with pytest.raises(ShardError, match=r"another job .* nothing was touched"):
        writer.write(tmp_path, plan_of(count=4), "another mark", workers=1)
    (tmp_path / writer.PLAN_NAME).unlink()
    before.pop(writer.PLAN_NAME)
    with pytest.raises(ShardError, match="another job"):
        writer.write(tmp_path, plan_of(), "mark", workers=1)
    assert digests(tmp_path) == before


def test_an_output_that_is_a_file_or_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="is a file"):
        writer.write(tmp_path / "file", plan_of(), "mark", workers=1)
    with pytest.raises(ShardError, match="cannot be made"):
        writer.write(tmp_path / "file" / "below", plan_of(), "mark", workers=1)


def test_two_jobs_never_write_into_one_folder(tmp_path):
    with writer._locked(tmp_path, "mark"), pytest.raises(ShardError, match="another process"):
        writer.write(tmp_path, plan_of(), "mark", workers=1)
    writer.write(tmp_path, plan_of(), "mark", workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_source_is_named_and_leaves_no_half_shard(tmp_path, workers):
    with pytest.raises(ShardError, match=r"shard-00000\d.tar \(numbers \d to \d\): frame 7 is damaged"):
        writer.write(tmp_path, plan_of(make=broken_samples), "mark", workers=workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == [writer.PLAN_NAME]
    writer.write(tmp_path, plan_of(), "mark", workers=1)  # the same job with its source repaired goes on


def test_a_dead_worker_ends_the_job_and_names_the_source(tmp_path):
    with pytest.raises(ShardError, match=r"worker process died .* \(numbers 0 to 2\)"):
        writer.write(tmp_path, plan_of(make=dying_samples), "mark", workers=2)
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_the_program_is_not_hidden(tmp_path, workers):
    with pytest.raises(KeyError):
        writer.write(tmp_path, plan_of(make=faulty_samples), "mark", workers=workers)


def test_samples_that_break_the_contract_are_refused(tmp_path):
    def one(**changes):
        sample = next(some_samples([0]))
        fields = {name: getattr(sample, name) for name in sample.__dataclass_fields__} | changes
        plan = plan_of(1, has_flow="flow_t0" in changes)
        task = writer.ShardTask("numbers", 1, lambda: iter([writer.Sample(**fields)]))
        return writer.write(tmp_path / "out", writer.dataclasses.replace(plan, shards=(task,)), "mark", workers=1)

    for key in ("a.b", "a/b", "", "ü", "x" * 81):
        with pytest.raises(ShardError, match="letters, digits"):
            one(key=key)
    with pytest.raises(ShardError, match="2 frames instead of 3"):
        one(frames=(b"1", b"2"))
    with pytest.raises(ShardError, match="float32"):
        one(flow_t0=np.zeros((32, 48, 2)), flow_t1=None)
    assert not (tmp_path / "out" / "shard-000000.tar").exists()


def test_a_source_that_gives_fewer_samples_than_planned_is_an_error(tmp_path):
    plan = plan_of(4, 4)
    task = writer.dataclasses.replace(plan.shards[0], samples=5)
    with pytest.raises(ShardError, match="4 samples instead of 5"):
        writer.write(tmp_path, writer.dataclasses.replace(plan, shards=(task,)), "mark", workers=1)


def test_chunks_cover_everything_evenly():
    for count, size in ((1, 1), (10, 3), (512, 256), (513, 256), (5, 100)):
        parts = writer.chunks(count, size)
        assert [n for part in parts for n in part] == list(range(count))
        lengths = [len(part) for part in parts]
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1
    with pytest.raises(ShardError, match="samples_per_shard"):
        writer.chunks(10, 0)


def test_fingerprint_follows_arguments_and_sources(tmp_path):
    (tmp_path / "a").write_text("1")
    files = [("a", (tmp_path / "a").stat())]
    marks = {writer.fingerprint({"codec": "png"}, files), writer.fingerprint({"codec": "qoi"}, files)}
    os.utime(tmp_path / "a", ns=(1, 1))
    marks |= {writer.fingerprint({"codec": "png"}, [("a", (tmp_path / "a").stat())]), writer.fingerprint({"codec": "png"})}
    assert len(marks) == 4
    assert all(json.dumps(mark) for mark in marks)
