"""Scores that outlive their process: nothing is measured twice, and scores of other settings are discarded."""

from __future__ import annotations

import json

import pytest

from vfi.errors import JobError
from vfi.evaluation.partial_scores import ScoreCache

SETTINGS = {"data": "a" * 64, "models": {"first": "b" * 64}}


def open_cache(folder, settings=None, rank=0):
    """One process, whatever its rank: the others are those of an earlier start."""
    cache = ScoreCache(folder, settings or SETTINGS, 0, 1)
    cache.rank = rank
    return cache


def test_what_was_measured_is_not_missing_after_a_stop(tmp_path):
    value = 1 / 3 + 1e-17
    with open_cache(tmp_path / "u") as cache:
        assert cache.missing(4) == [0, 1, 2, 3]
        cache.add(0, {"psnr": value})
        cache.add(2, [35.1234567890123456, None])
    with open_cache(tmp_path / "u") as cache:
        assert cache.missing(4) == [1, 3]
        cache.add(3, "c")
        cache.add(1, "b")
        assert cache.finish(4) == [{"psnr": value}, "b", [35.1234567890123456, None], "c"]
        cache.forget()
    assert not (tmp_path / "u").exists()


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    with open_cache(tmp_path / "u") as cache:
        for number in range(3):
            cache.add(number, number)
    file = tmp_path / "u" / "scores_0000.jsonl"
    file.write_text(file.read_text()[:-5])
    with open_cache(tmp_path / "u") as cache:
        assert cache.missing(4) == [2, 3]
        cache.add(2, "again")
        cache.add(3, 3)
        assert cache.finish(4) == [0, 1, "again", 3]
    assert [json.loads(line)["number"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]


def test_each_process_has_a_part_of_what_is_missing(tmp_path):
    with open_cache(tmp_path / "u") as cache:
        cache.add(1, "x")
        shares = []
        for rank in range(3):
            cache.rank, cache.world = rank, 3
            shares.append(cache.missing(8))
        cache.rank, cache.world = 0, 1
    assert shares == [[0, 4, 7], [2, 5], [3, 6]]


def test_files_of_all_processes_count(tmp_path):
    for rank in range(3):
        with open_cache(tmp_path / "u", rank=rank) as cache:
            cache.add(rank, f"by {rank}")
    assert len(list((tmp_path / "u").glob("scores_*.jsonl"))) == 3
    with open_cache(tmp_path / "u") as cache:
        assert cache.finish(3) == ["by 0", "by 1", "by 2"]


def test_scores_of_other_settings_are_not_taken(tmp_path, messages):
    with open_cache(tmp_path / "u") as cache:
        cache.add(0, "old")
    other = SETTINGS | {"models": {"first": "c" * 64}}
    with open_cache(tmp_path / "u", other) as cache:
        assert cache.missing(2) == [0, 1]
    assert len(messages) == 1
    assert "unfinished scores of other settings" in messages[0]
    with open_cache(tmp_path / "u", other) as cache:
        cache.add(0, "new")
    assert len(messages) == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "thesis.txt").write_text("kept")
    with pytest.raises(JobError, match="holds something else"), open_cache(tmp_path / "u"):
        pass
    assert (tmp_path / "u" / "thesis.txt").read_text() == "kept"
