"""Table of an ablation: means over the seeds of finished runs, and settings that make runs incomparable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vfi import report
from vfi.config import presets
from vfi.io.dataclass_json import to_json
from vfi.tracking.run_status import Status


def write_run(folder: Path, preset: str, seed: int, psnr: list[float], state: str = "finished", **changed: object) -> None:
    """A run folder as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(presets.override(presets.get(preset), seed=seed, **changed)))
    rows = [{"step": step, "event": "val", "psnr": each, "average_psnr": 20.0} for step, each in enumerate(psnr, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "status.json").write_text(to_json(Status(state, 2)))


def test_means_spreads_and_gains(tmp_path, capsys):
    write_run(tmp_path / "a0", "Exp-1a", 0, [40.0, 24.0])  # the last validation counts
    write_run(tmp_path / "a1", "Exp-1a", 1, [26.0])
    write_run(tmp_path / "a2", "Exp-1a", 2, [99.0], state="running")
    write_run(tmp_path / "c0", "Exp-1c", 0, [25.5])
    write_run(tmp_path / "other", "small", 0, [50.0])
    report.main(["--ablation", "phase1", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in printed.splitlines() if line.startswith("| Exp")]
    assert [row[0] for row in rows] == [name for name in presets.ABLATIONS if name.startswith("Exp-1")]
    assert rows[0] == ["Exp-1a", "backbone_mode mamba2_only", "2 of 3", "25.00", "1.41", "-0.50"]
    assert rows[1] == ["Exp-1b", "backbone_mode gated_attn_only", "0 of 0", "-", "-", "-"]
    assert rows[2] == ["Exp-1c", "nothing", "1 of 1", "25.50", "-", "-"]
    assert "the frame average has 20.00 dB" in printed
    assert "differ" not in printed.splitlines()[-1]


def test_settings_that_make_runs_not_comparable_are_named(tmp_path, capsys):
    write_run(tmp_path / "a", "Exp-1a", 0, [24.0], lr=1e-3, batch_size=4, global_batch=32)
    write_run(tmp_path / "c", "Exp-1c", 1, [25.0], batch_size=8, global_batch=32)
    report.main(["--ablation", "phase1", "--output_dir", str(tmp_path)])
    notes = [line for line in capsys.readouterr().out.splitlines() if "differ" in line][1:]
    assert notes == ["The runs differ in --lr, too: 0.0002, 0.001."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ablation", "phase2"], "has no run of --ablation phase2: its presets are Exp-2a"),
        (["--ablation", "phase1", "--out", "x"], "--ablation prints a table of runs"),
        (["results.json"], "--out is missing"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit) as stop:
        report.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
