"""Thresholds on results, latency and the ablation: passed, missed, not measured, and not on the whole set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vfi import gates, report
from vfi.config import presets
from vfi.evaluation.latency_results import Speed, SpeedRow
from vfi.evaluation.results import BASELINES, ImageScore, Results, Row, write_results
from vfi.io.dataclass_json import to_json
from vfi.reporting import acceptance
from vfi.tracking.run_status import Status


def row(model: str, psnr: float, ssim: float = 0.98, phase: int | None = None, ours: bool = True, ie: float = 1.0) -> Row:
    """Of a run, or of a model of another repository."""
    images = (ImageScore("a", psnr, ssim, ie),)
    path, run = (f"runs/{model}", f"runs/{model}") if ours else (model, None)
    return Row(model, path, run, None, None, None, phase, psnr, ssim, ie, images)


def results(protocol: str, *rows: Row, **facts: str) -> Results:
    """With the baselines before them, which would pass everything."""
    before = [dataclasses.replace(row(name, 60.0, 1.0, ie=0.0), path=None, run=None) for name in BASELINES]
    said = {"protocol": protocol, "profile": "vfimamba", "TTA": "none", "frame set": "all samples"} | facts
    return Results("set", f"{protocol:0<64}", 1, 1, said, {}, (*before, *rows), ())


def speed(*rows: tuple[str, float | None], size: str = "736x1280", factor: int = 2) -> Speed:
    """Rows of (model, ms); of another repository where the model is named by an adapter."""
    made = [
        SpeedRow(
            model, None if ":" in model else f"runs/{model}", None, size, factor, "fp32", False, ms, out_of_memory=ms is None
        )
        for model, ms in rows
    ]
    return Speed({"device": "a GPU"}, {}, tuple(made))


def write_run(folder: Path, preset: str, psnr: float, state: str = "finished", seed: int = 0) -> None:
    """A run folder as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(presets.override(presets.get(preset), seed=seed)))
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "event": "val", "psnr": {psnr}, "average_psnr": 20.0}}\n')
    (folder / "status.json").write_text(to_json(Status(state, 1)))


GOOD = [
    results("vimeo90k", row("worse", 34.0, 0.97), row("ours", 35.0)),
    results("ucf101", row("ours", 34.9)),
    results("vimeo90k_septuplet_147", row("worse", 30.0), row("ours", 31.25)),
]
FAST = [speed(("ours", 60.0), ("adapter:VFIMamba", 40.0))]


@pytest.fixture
def runs(tmp_path) -> Path:
    """Exp-1c is above 1a and, on average over its seeds, above 1b."""
    for number, (preset, psnr) in enumerate([("Exp-1a", 24.0), ("Exp-1b", 24.9), ("Exp-1c", 24.5), ("Exp-1c", 25.5)]):
        write_run(tmp_path / "runs" / str(number), preset, psnr, seed=number)
    return tmp_path / "runs"


def one(name: acceptance.GateName, which: str, *given, **also) -> acceptance.Verdict:
    """The verdict on one gate of a phase, by its name."""
    return next(verdict for verdict in acceptance.check(name, *given, **also) if str(verdict.gate) == which)


def test_what_is_reached_is_passed(runs):
    verdicts = acceptance.check("phase1", GOOD, FAST, runs)
    assert acceptance.lines("phase1", verdicts) == [
        "gate phase1: 7 of 7 passed",
        "passed: vimeo90k PSNR at least 35 dB: ours has 35.00 (target 35.5)",
        "passed: vimeo90k SSIM at least 0.975: ours has 0.9800",
        "passed: vimeo90k_septuplet_147 PSNR reported: ours has 31.25",
        "passed: ucf101 PSNR at least 34.5 dB: ours has 34.90",
        "passed: latency at 736x1280 at most 2 x VFIMamba: ours takes 60.0 ms, adapter:VFIMamba 40.0 ms: 1.50 x",
        "passed: PSNR of Exp-1c above that of Exp-1a: Exp-1c has 25.00, Exp-1a has 24.00",
        "passed: PSNR of Exp-1c above that of Exp-1b: Exp-1c has 25.00, Exp-1b has 24.90",
    ]


def test_nothing_that_was_not_measured_is_passed_and_each_says_how():
    for name in acceptance.GATES:
        for verdict in acceptance.check(name, []):
            assert (verdict.passed, verdict.state) == (None, "not measured")
            assert "vfi benchmark" in verdict.why or "launch.submit" in verdict.why
        assert acceptance.summary(acceptance.check(name, [])) == "0 of {0} passed, {0} not measured".format(
            len(acceptance.GATES[name])
        )


@pytest.mark.parametrize(
    ("changed", "why"),
    [(results("vimeo90k", row("ours", 34.99)), "ours has 34.99 (target 35.5)"),
     (results("vimeo90k", row("ours", 36.0), profile="rife"), "measured on a part of the set, or by another profile: vfi"),
     (results("vimeo90k", row("ours", 36.0), **{"frame set": "the first 3 of 3782 samples"}), "measured on a part of the set"),
     (results("vimeo90k_septuplet_147", row("ours", 36.0)), "needs Vimeo90K triplets: vfi benchmark --model RUN --protocol"),
     (results("vimeo90k", row("rife:rife", 36.0, ours=False)), "only models of others were measured: vfi benchmark")],
    ids=["too low", "another profile", "a part", "another set", "of another repository"],
)  # fmt: skip
def test_anything_else_is_not(changed, why):
    first = acceptance.check("phase1", [changed, GOOD[1]])[0]
    assert not first.passed
    assert why in first.why


def test_what_no_published_model_reaches_is_said():
    verdicts = acceptance.check("phase2", [results("snu_film_extreme", row("ours", 25.9, 0.9))])
    missed = {str(verdict.gate): verdict.why for verdict in verdicts if not verdict.passed}
    assert missed["snu_film_extreme PSNR at least 26 dB"] == "ours has 25.90; no published model passes it (best: 25.79)"
    assert missed["snu_film_hard PSNR at least 30 dB"].startswith("needs SNU-FILM hard: vfi benchmark --model RUN ")
    benchmarks = {
        name: {gate for gate in found if isinstance(gate, acceptance.Threshold)} for name, found in acceptance.GATES.items()
    }
    assert benchmarks["phase2"] < benchmarks["phase3"]


NOT_BELOW = "vimeo90k PSNR of phase 2 not below that of phase 1"


@pytest.mark.parametrize(
    ("rows", "passed", "why"),
    [
        ([row("a", 35.0, phase=1), row("b", 35.5, phase=1), row("c", 35.5, phase=2)], True, "c has 35.50, b has 35.50"),
        ([row("b", 35.5, phase=1), row("c", 35.4, phase=2)], False, "c has 35.40, b has 35.50"),
        ([row("c", 36.0, phase=2)], None, "no model of phase 1: vfi benchmark --protocol vimeo90k on both"),
        ([row("b", 36.0, phase=1)], None, "no model of phase 2: "),
        ([row("x:y", 36.0, ours=False)], None, "no model of phase 2 and 1: "),
    ],
)
def test_phase_2_is_compared_with_phase_1(rows, passed, why):
    for files in ([results("vimeo90k", *rows)], [results("vimeo90k", one) for one in rows]):
        verdict = one("phase2", NOT_BELOW, files)
        assert (verdict.passed, verdict.why.startswith(why)) == (passed, True)


def test_phases_are_compared_with_the_same_tta():
    early, late = results("vimeo90k", row("b", 35.5, phase=1)), row("c", 35.6, phase=2)
    turned = results("vimeo90k", late, TTA="with the frames turned by 180 degrees")
    verdict = one("phase2", NOT_BELOW, [early, turned])
    assert not verdict.passed
    assert verdict.why.startswith("one has TTA, the other has not: vfi benchmark")
    verdict = one("phase2", NOT_BELOW, [early, turned, results("vimeo90k", row("c", 35.4, phase=2))])
    assert (verdict.passed, verdict.why) == (False, "c has 35.40, b has 35.50")


def test_an_interpolation_error_is_reported():
    for name in ("phase2", "phase3"):
        files = [results("middlebury", row("ours", 30.0, ie=2.125), row("worse", 30.0, ie=3.0))]
        verdict = one(name, "middlebury IE reported", files)
        assert (verdict.passed, verdict.why) == (True, "ours has 2.12")
        part = [results("middlebury", row("ours", 30.0), **{"frame set": "the first 3 of 12 samples"})]
        assert not one(name, "middlebury IE reported", part).passed


@pytest.mark.parametrize(
    ("speeds", "passed", "why"),
    [
        ([speed(("ours", 80.0), ("x:vfimamba_s", 40.0))], True, "ours takes 80.0 ms, x:vfimamba_s 40.0 ms: 2.00 x"),
        ([speed(("ours", 80.1), ("x:VFIMamba", 40.0))], False, "ours takes 80.1 ms, x:VFIMamba 40.0 ms: 2.00 x"),
        ([speed(("slow", 90.0), ("fast", 9.0), ("x:vfimamba", 40.0))], False, "slow takes 90.0 ms"),
        ([speed(("a", 90.0), ("x:vfimamba", 40.0)), speed(("b", 50.0), ("x:vfimamba", 40.0))], True, "b takes 50.0 ms"),
        ([speed(("ours", 9.0)), speed(("x:vfimamba", 40.0))], None, "needs VFIMamba in the same run: vfi benchmark --speed"),
        ([speed(("ours", 9.0), ("vfimamba_like", 40.0), ("x:rife", 40.0))], None, "needs VFIMamba in the same run"),
        ([speed(("ours", None), ("x:vfimamba", 40.0))], False, "ours: out of memory"),
        ([speed(("ours", 9.0), ("x:vfimamba", None))], None, "needs VFIMamba in the same run"),
        ([speed(("ours", 9.0), ("x:vfimamba", 40.0), size="256x448")], None, "needs VFIMamba in the same run"),
        ([speed(("ours", 9.0), ("x:vfimamba", 40.0), factor=8)], None, "needs VFIMamba in the same run"),
    ],
)
def test_latency_beside_vfimamba(speeds, passed, why):
    for name in ("phase1", "phase2"):
        verdict = one(name, "latency at 736x1280 at most 2 x VFIMamba", [], speeds)
        assert (verdict.passed, verdict.why[: len(why)]) == (passed, why)


@pytest.mark.parametrize(
    ("speeds", "passed", "why"),
    [
        ([speed(("ours", 300.0), size="2176x4096")], True, "ours takes 300.0 ms on a GPU"),
        ([speed(("ours", 300.5), ("other", 9.0), size="2176x4096")], False, "ours takes 300.5 ms on a GPU"),
        ([speed(("ours", None), size="2176x4096")], False, "ours: out of memory"),
        ([speed(("x:y", 9.0), size="2176x4096"), speed(("ours", 9.0))], None, "needs a speed file: vfi benchmark --speed"),
    ],
)
def test_latency_at_4k(speeds, passed, why):
    verdict = one("phase3", "latency at 2176x4096 at most 300 ms a frame", [], speeds)
    assert (verdict.passed, verdict.why[: len(why)]) == (passed, why)


def test_an_experiment_that_is_equal_or_not_finished_does_not_pass(runs):
    write_run(runs / "4", "Exp-1a", 26.0, seed=4)  # 24 and 26: as Exp-1c
    write_run(runs / "5", "Exp-1b", 20.0, state="failed", seed=5)
    which = "PSNR of Exp-1c above that of Exp-1{}"
    assert one("phase1", which.format("a"), [], output_dir=runs)[1:] == (False, "Exp-1c has 25.00, Exp-1a has 25.00")
    assert one("phase1", which.format("b"), [], output_dir=runs).passed
    (runs / "1" / "status.json").write_text(to_json(Status("stopped", 1)))
    verdict = one("phase1", which.format("b"), [], output_dir=runs)
    assert not verdict.passed
    assert verdict.why.startswith(f"no finished run of Exp-1b in {runs}; python -m launch.submit")
    nothing = one("phase1", which.format("a"), [], output_dir=runs / "none")
    assert "no finished run of Exp-1c and Exp-1a in" in nothing.why


def test_the_report_ends_with_the_verdict(tmp_path, capsys):
    environment = {"created": "2026-01-01T00:00:00", "precision": "fp32"}
    paths = []
    for number, each in enumerate(GOOD):
        write_results(tmp_path / f"{number}.json", dataclasses.replace(each, environment=environment))
        paths.append(str(tmp_path / f"{number}.json"))
    with pytest.raises(SystemExit) as ended:
        report.main([*paths[1:], "--out", str(tmp_path / "report"), "--gate", "phase1"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "gate phase1: 2 of 7 passed, 5 not measured" in printed
    assert "not measured: vimeo90k SSIM at least 0.975: needs Vimeo90K triplets: vfi benchmark" in printed


def test_all_gates_are_listed_with_what_was_measured(tmp_path, runs, capsys):
    environment = {"created": "2026-01-01T00:00:00", "precision": "fp32"}
    write_results(tmp_path / "vimeo.json", dataclasses.replace(GOOD[0], environment=environment))
    gates.main([str(tmp_path / "vimeo.json"), "--output_dir", str(runs)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "phase1: 4 of 7 passed, 3 not measured"
    assert lines[2].startswith("passed        vimeo90k PSNR at least 35 dB  ")
    assert lines[2].endswith("  ours has 35.00 (target 35.5)")
    assert "phase2: 1 of 13 passed, 11 not measured" in lines  # SSIM; the PSNR is too low
    gates.main([])
    assert "phase3: 0 of 16 passed, 16 not measured" in capsys.readouterr().out
