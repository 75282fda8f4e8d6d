"""Test that the lists of SNU-FILM lead to the frames wherever a download puts them, and never to others."""

from __future__ import annotations

import shutil

import pytest
from published import build_snu_film
from sources import members, write_set

from shards import snu_film
from shards.schema import read_index

GAPS = {"easy": 1, "medium": 2, "hard": 4, "extreme": 8}


@pytest.fixture
def src(tmp_path):
    return build_snu_film(tmp_path / "SNU-FILM")


def run(src, out, split="easy"):
    return snu_film.main(["--src", str(src), "--out", str(out), "--split", split])


@pytest.mark.parametrize("split", GAPS)
def test_each_difficulty_has_its_own_frames(src, tmp_path, split):
    assert run(src, tmp_path / "out", split) == 0
    frames = [src / "test/GOPRO_test/GOPR0384_11_00" / f"{number:06d}.png" for number in (9 - GAPS[split], 9, 9 + GAPS[split])]
    found = members(tmp_path / "out")
    assert found[f"{split}_GOPRO_test_GOPR0384_11_00_000009"] == [path.read_bytes() for path in frames]
    index = read_index(tmp_path / "out")
    assert index.clips == (f"{split}/GOPRO_test/GOPR0384_11_00", f"{split}/YouTube_test/0015")
    assert (index.split, index.source["arguments"]["split"]) == ("test", split)


@pytest.mark.parametrize("place", ["data/SNU-FILM/test", "test", "."])
def test_frames_are_found_where_downloads_put_them(src, tmp_path, place):
    assert run(src, tmp_path / "as_is") == 0
    other = tmp_path / "other"
    shutil.copytree(src / "test", other / place, dirs_exist_ok=True)
    shutil.copy(src / "test-easy.txt", other)
    assert run(other, tmp_path / "out") == 0
    assert members(tmp_path / "out") == members(tmp_path / "as_is")
    assert read_index(tmp_path / "out").clips == read_index(tmp_path / "as_is").clips


def test_the_list_may_lie_in_eval_modes_and_begin_with_a_slash(src, tmp_path):
    assert run(src, tmp_path / "as_is") == 0
    (src / "eval_modes").mkdir()
    (src / "test-easy.txt").rename(src / "eval_modes" / "test-easy.txt")
    text = (src / "eval_modes" / "test-easy.txt").read_text()
    (src / "eval_modes" / "test-easy.txt").write_text(text.replace("data/", "/home/me/data/").replace("\n", "\r\n"))
    assert run(src, tmp_path / "out") == 0
    assert members(tmp_path / "out") == members(tmp_path / "as_is")


def test_the_longest_path_that_exists_is_taken(src, tmp_path):
    """A second set of frames in a higher folder must not replace the one that the list names."""
    write_set(src, (f"GOPRO_test/GOPR0384_11_00/{number:06d}.png" for number in range(1, 24)), first_seed=1000)
    assert run(src, tmp_path / "out") == 0
    found = members(tmp_path / "out")["easy_GOPRO_test_GOPR0384_11_00_000009"]
    assert found[1] == (src / "test/GOPRO_test/GOPR0384_11_00/000009.png").read_bytes()


def test_a_missing_clip_is_not_looked_for_elsewhere(src, tmp_path, capsys):
    (src / "test" / "GOPRO_test" / "GOPR0384_11_00").rename(src / "GOPR0384_11_00")
    assert run(src, tmp_path / "out") == 2
    assert "3 frame files of the easy list are missing" in capsys.readouterr().err


def test_what_was_tried_is_said(src, tmp_path, fails):
    (src / "test").rename(src / "tset")
    message = fails(snu_film.main, "--src", src, "--out", tmp_path / "out", "--split", "easy")
    tried = ["data/SNU-FILM/test/GOPRO_test/GOPR0384_11_00", "SNU-FILM/test/GOPRO_test/GOPR0384_11_00"]
    tried += ["test/GOPRO_test/GOPR0384_11_00", "GOPRO_test/GOPR0384_11_00", "GOPR0384_11_00"]
    assert ", ".join(tried) in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    [
        "test/a/1.png test/a/2.png",
        "test/a/1.png test/b/2.png test/a/3.png",
        "test/a/3.png test/a/2.png test/a/1.png",
        "test/a/1.png test/a/3.png test/a/2.png",
        "test/a/2.png test/a/2.png test/a/3.png",
        "../a/1.png ../a/2.png ../a/3.png",
        "test/../../a/1.png test/../../a/2.png test/../../a/3.png",
        "test/a/1.txt test/a/2.txt test/a/3.txt",
    ],
)
def test_a_bad_line_is_named(src, tmp_path, fails, line):
    (src / "test-easy.txt").write_text(line + "\n")
    assert "test-easy.txt" in fails(snu_film.main, "--src", src, "--out", tmp_path / "out", "--split", "easy")


def test_an_unknown_or_missing_difficulty(src, tmp_path, fails):
    assert "easy, medium, hard, extreme" in fails(snu_film.main, "--src", src, "--out", tmp_path / "out", "--split", "test")
    (src / "test-hard.txt").unlink()
    assert "test-hard.txt cannot be read" in fails(snu_film.main, "--src", src, "--out", tmp_path / "out", "--split", "hard")


@pytest.mark.parametrize("top", ["D:\\my data\\SNU-FILM\\", ".\\", "/data/SNU FILM/", "\ufeffdata/SNU-FILM/"])
def test_lists_with_spaces_and_from_windows_lead_to_the_frames(src, tmp_path, top):
    path = src / "test-easy.txt"
    text = path.read_text().replace("data/SNU-FILM/", top.removeprefix("\ufeff"))
    path.write_text("\ufeff" + text.replace("/", "\\") if "\\" in top else text.replace(" ", "  "))
    assert run(src, tmp_path / "out") == 0
    assert len(members(tmp_path / "out")) == 2
