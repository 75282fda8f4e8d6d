"""Thresholds on results: passed, missed, not measured, and not on the whole set."""

from __future__ import annotations

import dataclasses

import pytest

from vfi import gates, report
from vfi.results import FRAME_AVERAGE, ImageScore, Results, Row, write_results


def results(protocol: str, psnr: float, ssim: float, **facts: str) -> Results:
    def row(model: str, path: str | None, by: float) -> Row:
        images = (ImageScore("a", psnr - by, ssim, 1.0),)
        return Row(model, path, None, None, None, None, None, psnr - by, ssim, 1.0, images)

    rows = (
        row(FRAME_AVERAGE, None, -9),
        row("worse", "runs/worse", 1),
        row("ours", "runs/ours", 0),
    )
    said = {"protocol": protocol, "profile": "vfimamba", "TTA": "none", "frame set": "all samples"} | facts
    return Results("set", f"{protocol:0<64}", 1, 1, said, {}, rows, ())


GOOD = [results("vimeo90k", 35.0, 0.98), results("ucf101", 34.9, 0.97)]


def test_what_is_reached_is_passed():
    verdicts = gates.check("phase1", GOOD)
    assert [verdict.passed for verdict in verdicts] == [True] * 3
    assert gates.lines("phase1", verdicts)[:2] == [
        "gate phase1: 3 of 3 passed", "passed: vimeo90k PSNR at least 35 dB: ours has 35.00 (target 35.5)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "why"),
    [(results("vimeo90k", 34.99, 0.98), "ours has 34.99 (target 35.5)"),
     (results("vimeo90k", 36.0, 0.98, profile="rife"), "measured on a part of the set, or by another profile"),
     (results("vimeo90k", 36.0, 0.98, **{"frame set": "the first 3 of 3782 samples"}), "measured on a part of the set"),
     (results("vimeo90k_septuplet_147", 36.0, 0.98), "not measured")],
    ids=["too low", "another profile", "a part", "another set"],
)  # fmt: skip
def test_anything_else_is_not(changed, why):
    first = gates.check("phase1", [changed, GOOD[1]])[0]
    assert not first.passed
    assert why in first.why


def test_what_no_published_model_reaches_is_said():
    missed = {str(v.gate): v.why for v in gates.check("phase2", [results("snu_film_extreme", 25.9, 0.9)]) if not v.passed}
    assert missed["snu_film_extreme PSNR at least 26 dB"] == "ours has 25.90; no published model passes it (best: 25.79)"
    assert missed["snu_film_hard PSNR at least 30 dB"] == "not measured"
    assert set(gates.GATES["phase2"]) < set(gates.GATES["phase3"])


def test_the_report_ends_with_the_verdict(tmp_path, capsys):
    paths = []
    for number, one in enumerate(GOOD):
        environment = {"created": "2026-01-01T00:00:00", "precision": "fp32"}
        write_results(tmp_path / f"{number}.json", dataclasses.replace(one, environment=environment))
        paths.append(str(tmp_path / f"{number}.json"))
    report.main([*paths, "--out", str(tmp_path / "report"), "--gate", "phase1"])
    assert "gate phase1: 3 of 3 passed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        report.main([paths[1], "--out", str(tmp_path / "report"), "--gate", "phase1"])
    assert ended.value.code == 1
    assert "NOT passed: vimeo90k SSIM at least 0.975: not measured" in capsys.readouterr().out
