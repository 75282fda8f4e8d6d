"""Data benchmark: the same frames everywhere, every case measured, and rejected options."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shards.codecs import read_image
from shards.schema import read_index
from vfi import benchmark_data
from vfi.data.evaluation_loader import evaluation_batches

pytestmark = pytest.mark.usefixtures("one_thread")


def refusal(capsys, *flags: object) -> str:
    with pytest.raises(SystemExit) as error:
        benchmark_data.main([str(flag) for flag in flags])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_every_case_is_measured_and_written(tmp_path, train_shards, capsys):
    out = tmp_path / "numbers.json"
    flags = ["--data", train_shards, "--samples", 8, "--batch_size", 4, "--crop", 64, "--seconds", 0.1, "--rounds", 1,
             "--workers", 0, 1, "--codecs", "qoi", "jpeg", "--folder", tmp_path, "--out", out]  # fmt: skip
    benchmark_data.main([str(flag) for flag in flags])
    shown = capsys.readouterr().out
    content = json.loads(out.read_text())
    cases = {(case["source"], case["workers"]): case for case in content["cases"]}
    assert cases.keys() == {(source, workers) for source in ("loose png", "qoi", "jpeg") for workers in (0, 1)}
    assert all(case["samples_per_s"] > 0 for case in cases.values())
    assert cases["jpeg", 0]["megabytes"] < cases["loose png", 0]["megabytes"]
    assert content["options"]["crop"] == 64
    assert "torch" in content["environment"]["packages"]
    assert len(shown.splitlines()) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.json"], "temporary files were left behind"


def test_loose_files_and_shards_hold_the_same_frames(tmp_path, train_shards):
    options = benchmark_data.Options(data=train_shards, samples=5)
    count = benchmark_data._write_loose(options, tmp_path / "loose")
    benchmark_data._write_shards(tmp_path / "loose", tmp_path / "qoi", count, "qoi")
    assert read_index(tmp_path / "qoi").samples == 5
    for number, batch in enumerate(evaluation_batches(tmp_path / "qoi", benchmark_data._CPU)):
        for path, frame in zip(
            benchmark_data._loose_frames(tmp_path / "loose", number), (batch.img0, batch.imgt, batch.img1), strict=True
        ):
            pixels = (frame[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            np.testing.assert_array_equal(pixels, read_image(path))


def test_rate_counts_samples_of_whole_batches(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(benchmark_data.time, "perf_counter", lambda: next(clock))
    assert benchmark_data.rate(iter(range(99)), 8, seconds=2.5) == pytest.approx(3 * 8 / 4.0)


def test_bad_options_are_refused(capsys, tmp_path, train_shards):
    assert "fewer than --samples 128" in refusal(capsys, "--data", train_shards)
    assert "--samples 2 must be at least --batch_size 16" in refusal(capsys, "--data", train_shards, "--samples", 2)
    assert "unknown codec 'gif'" in refusal(capsys, "--data", train_shards, "--codecs", "gif")
    assert "72x80" in refusal(capsys, "--data", train_shards, "--samples", 16, "--seconds", 0.1)
    assert "does not exist" in refusal(capsys, "--data", tmp_path / "gone")
