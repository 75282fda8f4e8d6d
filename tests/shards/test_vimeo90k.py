"""Test that the published layout becomes shards bit for bit, and that missing files are reported before a byte is written."""

from __future__ import annotations

import tarfile

import pytest
from PIL import Image
from sources import HEIGHT, WIDTH, digests, panning

from shards import vimeo90k
from shards.schema import ShardError, read_index
from shards.verify import verify


@pytest.fixture
def triplets(tmp_path):
    return make_set(tmp_path / "vimeo_triplet", 3, "tri")


def make_set(root, frames, prefix):
    names = [f"0000{a}/000{b}" for a in (1, 2) for b in (1, 2, 3)]
    for seed, name in enumerate(names):
        folder = root / "sequences" / name
        folder.mkdir(parents=True)
        for number, frame in enumerate(panning(frames, seed), 1):
            Image.fromarray(frame).save(folder / f"im{number}.png", compress_level=seed + 1)
    (root / f"{prefix}_trainlist.txt").write_text("\n".join(names[:4]) + "\n\n")
    (root / f"{prefix}_testlist.txt").write_text("\n" + "\r\n".join(names[4:]) + "\r\n \n")
    return root


def run(src, out, *flags, kind="triplet", split="train"):
    arguments = ["--src", src, "--out", out, "--kind", kind, "--split", split, *flags]
    return vimeo90k.main([str(argument) for argument in arguments])


def test_png_files_are_copied_as_they_are(triplets, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(triplets, out, "--samples_per_shard", "2") == 0
    printed = capsys.readouterr()
    assert "4 samples of 3 frames" in printed.out
    assert "the triplet train list has 4 samples, the published one has 51,312" in printed.err
    index = read_index(out)
    assert (index.codec, index.split, index.frames, len(index.shards)) == ("png", "train", 3, 2)
    assert index.clips == ("00001/0001", "00001/0002", "00001/0003", "00002/0001")
    copied = {}
    for entry in index.shards:
        with tarfile.open(out / entry.name) as tar:
            copied |= {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".png")}
    assert len(copied) == 12
    for name, data in copied.items():
        key, member, _ = name.split(".")
        assert data == (triplets / "sequences" / key.replace("_", "/") / f"{member}.png").read_bytes()
    assert verify(out) == []


def test_test_split_with_blank_lines_and_foreign_line_ends(triplets, tmp_path):
    assert run(triplets, tmp_path / "out", split="test") == 0
    index = read_index(tmp_path / "out")
    assert (index.split, index.clips) == ("test", ("00002/0002", "00002/0003"))


def test_septuplets_hold_all_seven_frames(tmp_path, capsys):
    src = make_set(tmp_path / "vimeo_septuplet", 7, "sep")
    assert run(src, tmp_path / "out", kind="septuplet") == 0
    assert "64,612" in capsys.readouterr().err
    assert read_index(tmp_path / "out").frames == 7
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert tar.getnames()[1:8] == [f"00001_0001.im{n}.png" for n in range(1, 8)]


@pytest.mark.parametrize("codec", ["qoi", "jpeg", "png"])
def test_frames_can_be_compressed_anew(triplets, tmp_path, codec):
    assert run(triplets, tmp_path / "out", "--codec", codec) == 0
    assert read_index(tmp_path / "out").codec == codec
    assert verify(tmp_path / "out") == []


def test_bytes_do_not_depend_on_workers(triplets, tmp_path):
    run(triplets, tmp_path / "one", "--samples_per_shard", "1")
    run(triplets, tmp_path / "two", "--samples_per_shard", "1", "--workers", "2")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_no_warning_for_the_published_count(triplets, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(vimeo90k.EXPECTED, ("triplet", "train"), 4)
    monkeypatch.setattr(vimeo90k, "SIZE", (HEIGHT, WIDTH))
    run(triplets, tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_missing_frames_are_named_and_nothing_is_written(triplets, tmp_path, capsys):
    for number in (1, 2):
        (triplets / "sequences" / "00001" / "0002" / f"im{number}.png").unlink()
    for number in (1, 3):
        (triplets / "sequences" / "00001" / "0003" / f"im{number}.png").unlink()
    assert run(triplets, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "4 frame files" in error
    assert "sequences/00001/0002/im1.png" in error
    assert "and 1 more" in error
    assert not (tmp_path / "out").exists()


def test_a_broken_frame_is_named(triplets, tmp_path):
    path = triplets / "sequences" / "00001" / "0003" / "im2.png"
    path.write_bytes(path.read_bytes()[:200])
    options = vimeo90k.Options(src=triplets, out=tmp_path / "out", kind="triplet", split="train")
    with pytest.raises(ShardError, match=r"00001/0003/im2\.png cannot be decoded"):
        vimeo90k.make(options)
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_changed_list_is_another_job(triplets, tmp_path, capsys):
    assert run(triplets, tmp_path / "out") == 0
    (triplets / "tri_trainlist.txt").write_text("00001/0001\n")
    before = digests(tmp_path / "out")
    assert run(triplets, tmp_path / "out") == 2
    assert "another job" in capsys.readouterr().err
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "quadruplet"}, "triplet, septuplet"),
        ({"split": "val"}, "train, test"),
        ({"codec": "gif"}, "png, qoi, jpeg"),
        ({"kind": "septuplet"}, "sep_trainlist.txt cannot be read"),
        ({"src": "absent"}, "does not exist"),
    ],
)
def test_bad_options_are_one_clear_line(triplets, tmp_path, fails, changes, message):
    values = {"src": triplets, "out": tmp_path / "out", "kind": "triplet", "split": "train"} | changes
    arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    assert message in fails(vimeo90k.main, *arguments)
    assert not (tmp_path / "out").exists()


def test_output_inside_the_source_is_refused(triplets, fails):
    arguments = ["--src", triplets, "--out", triplets / "shards", "--kind", "triplet", "--split", "train"]
    assert "lies inside the source" in fails(vimeo90k.main, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("../../etc\n", "line 1"), ("00001/0001\n00001/0001\n", "line 2: .* line 1"), ("00001\n", "line 1")],
)
def test_bad_lists_are_named(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ShardError, match=message):
        vimeo90k.read_list(tmp_path / "list.txt")
