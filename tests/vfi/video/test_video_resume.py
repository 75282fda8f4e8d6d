"""An interrupted conversion leaves a playable video, and resuming it gives the result of an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made_videos import call, frames_of, make, new_run, packets_of, pixels, refused, scene, times_of
from PIL import Image

from vfi.inference.engine import InterpolationEngine
from vfi.video.resume import Partial

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = [40 * n for n in range(12)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return new_run(tmp_path_factory.mktemp("work") / "runs" / "fresh")


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n): somebody presses Ctrl-C when the frames of the n-th pair are begun. Gives the list of what was begun."""
    plain = InterpolationEngine.start
    begun: list[object] = []

    def prepare(pair: int) -> list[object]:
        begun.clear()

        def interrupted(self, *given):
            begun.append(given)
            if len(begun) == pair:
                raise KeyboardInterrupt
            return plain(self, *given)

        monkeypatch.setattr(InterpolationEngine, "start", interrupted)
        return begun

    return prepare


def stopped(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 130


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("suffix", "flags"),
    [(".mp4", ()), (".mkv", ()), (".mov", ("--codec", "libx265")), (".webm", ()), (".mkv", ("--codec", "ffv1"))],
)
def test_going_on_makes_what_would_have_been_made(run, tmp_path, stop_at, capsys, suffix, flags):
    source = make(tmp_path / f"in{'.mkv' if suffix == '.webm' else suffix}", TIMES, codec="ffv1" if suffix in (".mkv", ".webm")
                  else "libx264", sound=suffix == ".mp4", frames=[scene(0, n) for n in range(12)])  # fmt: skip
    command = (source, "-o", tmp_path / f"out{suffix}", "--model", run, *flags)
    call(source, "-o", tmp_path / f"whole{suffix}", "--model", run, *flags)
    capsys.readouterr()

    stop_at(6)
    stopped(*command)
    partial = tmp_path / f"out_partial{suffix}"
    assert f"what was done is {partial}" in capsys.readouterr().out
    assert names(tmp_path) == sorted([source.name, f"out_partial{suffix}", "out_partial.json", f"whole{suffix}"])
    assert times_of(partial) == pytest.approx([n * 0.02 for n in range(10)], abs=1e-3)
    kept = [pixels(frame) for frame in frames_of(partial)]

    begun = stop_at(0)
    call(*command, "--resume")
    assert len(begun) == 6  # of eleven pairs: five were done
    assert names(tmp_path) == sorted([source.name, f"out{suffix}", f"whole{suffix}"])
    assert "10 frames are done" in capsys.readouterr().out
    found, whole = (frames_of(tmp_path / f"{name}{suffix}") for name in ("out", "whole"))
    assert [frame.time for frame in found] == pytest.approx([frame.time for frame in whole], abs=2e-3)
    assert all(np.array_equal(pixels(one), other) for one, other in zip(found, kept, strict=False))
    assert max(np.abs(pixels(one) - pixels(other)).mean() for one, other in zip(found, whole, strict=True)) < 2
    if suffix == ".mp4":
        assert packets_of(tmp_path / "out.mp4", "audio") == packets_of(tmp_path / "whole.mp4", "audio")


def test_sound_that_begins_before_zero_moves_a_matroska_which_resumes_all_the_same(run, tmp_path, stop_at):
    """AAC of an MP4 has a frame before zero, which Matroska can't say: it moves all streams, by 21 to 23 ms."""
    source = make(tmp_path / "in.mp4", TIMES, codec="libx264", sound=True, frames=[scene(0, n) for n in range(12)])
    command = (source, "-o", tmp_path / "out.mkv", "--model", run, "--codec", "ffv1")
    call(source, "-o", tmp_path / "whole.mkv", "--model", run, "--codec", "ffv1")
    stop_at(6)
    stopped(*command)
    assert times_of(tmp_path / "out_partial.mkv")[0] > 0.02
    stop_at(0)
    call(*command, "--resume")
    assert times_of(tmp_path / "out.mkv") == pytest.approx(times_of(tmp_path / "whole.mkv"), abs=2e-3)
    assert packets_of(tmp_path / "out.mkv", "audio") == packets_of(tmp_path / "whole.mkv", "audio")
    found, whole = (frames_of(tmp_path / f"{name}.mkv") for name in ("out", "whole"))
    assert all(np.array_equal(pixels(one), pixels(other)) for one, other in zip(found, whole, strict=True))


def test_it_may_be_stopped_again_and_a_folder_goes_on_too(run, tmp_path, stop_at):
    source = make(tmp_path / "in.mp4", TIMES, codec="libx264")
    out, command = tmp_path / "out", (source, "-o", tmp_path / "out", "--model", run)
    call(source, "-o", tmp_path / "whole", "--model", run)
    stop_at(4)
    stopped(*command)
    assert names(tmp_path) == ["in.mp4", "out_partial", "out_partial.json", "whole"]
    assert len(names(tmp_path / "out_partial")) == 6
    stop_at(2)
    stopped(*command, "--resume")
    assert len(names(tmp_path / "out_partial")) == 8
    assert json.loads((tmp_path / "out_partial.json").read_text())["frames"] == 8
    stop_at(0)
    call(*command, "--resume")
    assert names(tmp_path) == ["in.mp4", "out", "whole"]
    assert names(out) == names(tmp_path / "whole")
    for name in names(out):
        assert np.array_equal(*(np.asarray(Image.open(tmp_path / folder / name)) for folder in ("out", "whole")))


def test_only_the_same_conversion_goes_on(run, tmp_path, stop_at, capsys):
    source = make(tmp_path / "in.mp4", TIMES, codec="libx264")
    out, partial = tmp_path / "out.mp4", tmp_path / "out_partial.mp4"
    stop_at(4)
    stopped(source, "-o", out, "--model", run)
    left = partial.read_bytes()
    capsys.readouterr()
    assert "out_partial.mp4 is there" in refused(capsys, source, "-o", out, "--model", run)
    line = refused(capsys, source, "-o", out, "--model", run, "--resume", "--multiplier", 4, "--crf", 30)
    assert "was made with multiplier None (now 4), crf None (now 30)" in line
    facts = (tmp_path / "out_partial.json").read_text()
    (tmp_path / "out_partial.json").write_text("{")
    assert "out_partial.json, which says how" in refused(capsys, source, "-o", out, "--model", run, "--resume")
    (tmp_path / "out_partial.json").write_text(facts.replace('"frames": 6', '"frames": 7'))
    assert "holds 6 frames, and 7 were written" in refused(capsys, source, "-o", out, "--model", run, "--resume")
    (tmp_path / "out_partial.json").write_text(facts)
    partial.write_bytes(b"no video")
    assert "out_partial.mp4 cannot be read" in refused(capsys, source, "-o", out, "--model", run, "--resume")
    partial.write_bytes(left)
    stop_at(0)
    call(source, "-o", out, "--model", run, "--resume")
    assert len(frames_of(out)) == 23


def test_without_anything_to_go_on_with_it_starts(run, tmp_path, capsys):
    source = make(tmp_path / "in.mp4", TIMES[:3], codec="libx264")
    call(source, "-o", tmp_path / "out.mp4", "--model", run, "--resume")
    assert "out_partial.mp4 is not there: this starts at the first frame" in capsys.readouterr().out
    assert len(frames_of(tmp_path / "out.mp4")) == 5


def test_a_partial_result_of_before_a_flag_was_renamed_is_resumed(tmp_path):
    partial = Partial.of(tmp_path / "out.mkv")
    partial.path.touch()
    partial.facts_path.write_text(json.dumps({"frames": 3, "facts": {"input": "a", "keep_still": False}}))
    assert partial.frames({"input": "a", "static_regions": False}) == 3
