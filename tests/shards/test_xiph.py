"""Test Xiph's clips as loose frames or in folders, but never both; frames that no sample needs may be missing."""

from __future__ import annotations

from published import PUBLISHED
from sources import members, write_set

from shards import xiph
from shards.schema import read_index


def test_the_published_set_has_392_samples_of_eight_clips(tmp_path):
    names = [f"{clip}-{number:03d}.png" for clip in xiph.CLIPS for number in range(1, 101)]
    assert len(names) == 800
    options = xiph.Options(src=write_set(tmp_path / "set", names), out=tmp_path / "out")
    found = xiph.find(options)
    assert len(found.groups) == found.published_samples == 392
    assert {len([group for group in found.groups if group.clip == clip]) for clip in xiph.CLIPS} == {49}
    assert found.groups[-1].files == ("Tango-097.png", "Tango-098.png", "Tango-099.png")


def test_folders_with_plain_numbers(tmp_path):
    write_set(tmp_path / "set", (f"Tango/{number:03d}.png" for number in range(1, 101)))
    assert xiph.main(["--src", str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == 0
    frames = [(tmp_path / "set" / "Tango" / f"{number:03d}.png").read_bytes() for number in (41, 42, 43)]
    assert members(tmp_path / "out")["Tango-042"] == frames
    assert read_index(tmp_path / "out").clips == ("Tango",)


def test_frame_100_is_in_no_sample_and_may_be_missing(tmp_path):
    src = PUBLISHED["xiph"].build(tmp_path / "set")
    (src / "Tango-100.png").unlink()
    assert xiph.main(["--src", str(src), "--out", str(tmp_path / "out")]) == 0


def test_a_clip_that_is_there_twice_is_refused(tmp_path, fails):
    src = PUBLISHED["xiph"].build(tmp_path / "set")
    write_set(src, ["Tango/001.png"])
    message = fails(xiph.main, "--src", src, "--out", tmp_path / "out")
    assert "clip Tango is in" in message
    assert "twice" in message
    assert not (tmp_path / "out").exists()
