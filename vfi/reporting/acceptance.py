"""Acceptance of a phase: thresholds on published benchmarks, on latency and on the ablation.

    vfi report results/*.json --out report --gate phase1          exit code 1 when one of them is not passed

A gate takes the best of this project's models in the results files, measured by a profile of the VFIMamba family and on the
complete set. Latency is that of the first such model in a speed file. What was not measured is listed apart, and is not passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from vfi.evaluation.latency_results import OUT_OF_MEMORY, Speed, SpeedRow
from vfi.evaluation.protocols import PROTOCOLS
from vfi.evaluation.published import PUBLISHED
from vfi.evaluation.results import Results, Row
from vfi.reporting.ablation import mean_psnr

GateName = Literal["phase1", "phase2", "phase3"]
_PROFILES = ("vfimamba", "ema")
_RIVAL = "vfimamba"


class Measurements(NamedTuple):
    """The measurements that gates are checked against."""

    results: Sequence[Results]
    speeds: Sequence[Speed]
    output_dir: Path | None
    """Folder of the runs of an ablation."""

    def rows(self, protocol: str) -> list[tuple[Results, Row]]:
        """Return the rows of this project's models that count on this protocol."""
        return [(one, row) for one in self.on(protocol) if _is_comparable(one) for row in one.rows if row.run is not None]

    def on(self, protocol: str) -> list[Results]:
        """Return all results on this protocol."""
        return [one for one in self.results if one.protocol.get("protocol") == protocol]

    def missing(self, protocol: str) -> str:
        """Explain why there are no rows, and how to get some."""
        comparable = [one for one in self.on(protocol) if _is_comparable(one)]
        if comparable:
            why = "only models of others were measured"
        elif self.on(protocol):
            why = "measured on a part of the set, or by another profile"
        else:
            why = f"needs {PROTOCOLS[protocol].title}"
        return f"{why}: vfi benchmark --model RUN --protocol {protocol} --data FOLDER --out {protocol}.json"


Outcome = tuple[bool | None, str]
"""Whether a gate is passed, None where it was not measured, and why."""


class Threshold(NamedTuple):
    """A lower bound for a measure on a benchmark."""

    protocol: str
    measure: Literal["psnr", "ssim"]
    least: float
    target: float | None = None
    """The value to aim for, above the bound."""

    def __str__(self) -> str:
        unit = " dB" if self.measure == "psnr" else ""
        return f"{self.protocol} {self.measure.upper()} at least {self.least:g}{unit}"

    def check(self, evidence: Measurements) -> Outcome:
        """See Outcome."""
        rows = [row for _, row in evidence.rows(self.protocol)]
        if not rows:
            return None, evidence.missing(self.protocol) + self._beyond()
        best: Row = max(rows, key=lambda row: getattr(row, self.measure))
        value = getattr(best, self.measure)
        why = f"{best.model} has {value:.{2 if self.measure == 'psnr' else 4}f}"
        if self.target is not None:
            why += f" (target {self.target:g})"
        return value >= self.least, why + ("" if value >= self.least else self._beyond())

    def _beyond(self) -> str:
        """Return a remark where no published model is known to pass."""
        known = [value for row in PUBLISHED.get(self.protocol, ()) if (value := getattr(row, self.measure)) is not None]
        return f"; no published model passes it (best: {max(known):g})" if known and max(known) < self.least else ""


class MinMetric(NamedTuple):
    """A phase is at least as good as an earlier one on a benchmark: the best model of each, both with TTA or both without."""

    protocol: str
    phase: int
    earlier: int

    def __str__(self) -> str:
        return f"{self.protocol} PSNR of phase {self.phase} not below that of phase {self.earlier}"

    def check(self, evidence: Measurements) -> Outcome:
        """See Outcome."""
        best: dict[tuple[str | None, int | None], Row] = {}
        for results, row in sorted(evidence.rows(self.protocol), key=lambda one: one[1].psnr):
            best[results.protocol.get("TTA"), row.phase] = row
        pairs = [
            (row, best[tta, self.earlier])
            for (tta, phase), row in best.items()
            if phase == self.phase and (tta, self.earlier) in best
        ]
        if not pairs:
            measured = {phase for _, phase in best}
            lacking = [str(phase) for phase in (self.phase, self.earlier) if phase not in measured]
            why = f"no model of phase {' and '.join(lacking)}" if lacking else "one has TTA, the other has not"
            return None, f"{why}: vfi benchmark --protocol {self.protocol} on both, and give both results files"
        late, early = max(pairs, key=lambda pair: pair[0].psnr - pair[1].psnr)
        return late.psnr >= early.psnr, f"{late.model} has {late.psnr:.2f}, {early.model} has {early.psnr:.2f}"


class Reported(NamedTuple):
    """A measure is known, whatever its value."""

    protocol: str
    measure: Literal["psnr", "ie"] = "ie"

    def __str__(self) -> str:
        return f"{self.protocol} {self.measure.upper()} reported"

    def check(self, evidence: Measurements) -> Outcome:
        """See Outcome."""
        rows = [row for _, row in evidence.rows(self.protocol)]
        if not rows:
            return None, evidence.missing(self.protocol)
        best = min(rows, key=lambda row: row.ie) if self.measure == "ie" else max(rows, key=lambda row: row.psnr)
        return True, f"{best.model} has {getattr(best, self.measure):.2f}"


class Speedup(NamedTuple):
    """Upper bound for the time of one in-between frame, relative to VFIMamba in the same speed file."""

    size: str
    most: float

    def __str__(self) -> str:
        return f"latency at {self.size} at most {self.most:g} x VFIMamba"

    def check(self, evidence: Measurements) -> Outcome:
        """See Outcome."""
        how = f"vfi benchmark --speed --sizes {self.size} --model RUN MODULE:FACTORY --out speed.json (docs/benchmarks.md)"
        found = []
        for _, ours, rows in _latencies(evidence.speeds, self.size):
            rival = next((row for row in rows if row.path is None and _RIVAL in row.model.lower()), None)
            if rival and rival.ms and ours.ms is not None:
                found.append((ours.ms / rival.ms, ours, rival))
        if not found:
            return _no_latency(evidence.speeds, self.size, "needs VFIMamba in the same run", how)
        ratio, ours, rival = min(found, key=lambda one: one[0])
        return ratio <= self.most, f"{ours.model} takes {ours.ms:.1f} ms, {rival.model} {rival.ms:.1f} ms: {ratio:.2f} x"


class Milliseconds(NamedTuple):
    """Upper bound for the time of one in-between frame."""

    size: str
    most: float

    def __str__(self) -> str:
        return f"latency at {self.size} at most {self.most:g} ms a frame"

    def check(self, evidence: Measurements) -> Outcome:
        """See Outcome."""
        found = [(ours.ms, ours, speed) for speed, ours, _ in _latencies(evidence.speeds, self.size) if ours.ms is not None]
        if not found:
            how = f"vfi benchmark --speed --sizes {self.size} --model RUN --out speed.json"
            return _no_latency(evidence.speeds, self.size, "needs a speed file", how)
        ms, ours, speed = min(found, key=lambda one: one[0])
        return ms <= self.most, f"{ours.model} takes {ms:.1f} ms on {speed.environment.get('device', 'an unknown device')}"


class Improvement(NamedTuple):
    """An experiment of the phase-1 ablation beats another one."""

    experiment: str
    other: str

    def __str__(self) -> str:
        return f"PSNR of {self.experiment} above that of {self.other}"

    def check(self, evidence: Measurements) -> Outcome:
        """See Outcome."""
        found = mean_psnr(evidence.output_dir, "phase1") if evidence.output_dir else {}
        lacking = [name for name in (self.experiment, self.other) if name not in found]
        if lacking:
            where = f" in {evidence.output_dir}" if evidence.output_dir else ""
            how = "python -m launch.submit --ablation phase1 trains it, and --output_dir names the folder of its runs"
            return None, f"no finished run of {' and '.join(lacking)}{where}; {how}"
        ours, theirs = found[self.experiment], found[self.other]
        return ours > theirs, f"{self.experiment} has {ours:.2f}, {self.other} has {theirs:.2f}"


Gate = Threshold | MinMetric | Reported | Speedup | Milliseconds | Improvement


class Verdict(NamedTuple):
    """Outcome of a gate."""

    gate: Gate
    passed: bool | None
    """None: not measured."""
    why: str

    @property
    def state(self) -> str:
        """The outcome in words."""
        return "not measured" if self.passed is None else "passed" if self.passed else "NOT passed"


_FLOW = (
    Threshold("ucf101", "psnr", 35.0), Threshold("snu_film_easy", "psnr", 39.5), Threshold("snu_film_medium", "psnr", 35.0),
    Threshold("snu_film_hard", "psnr", 30.0), Threshold("snu_film_hard", "ssim", 0.90),
    Threshold("snu_film_extreme", "psnr", 26.0), Threshold("snu_film_extreme", "ssim", 0.85),
    Threshold("vimeo90k", "psnr", 36.0), Threshold("vimeo90k", "ssim", 0.978),
    Reported("vimeo90k_septuplet_147", "psnr"), Reported("middlebury"),
)  # fmt: skip
_720P, _4K = "736x1280", "2176x4096"  # the padded sizes that networks see
GATES: dict[GateName, tuple[Gate, ...]] = {
    "phase1": (
        Threshold("vimeo90k", "psnr", 35.0, 35.5), Threshold("vimeo90k", "ssim", 0.975),
        Reported("vimeo90k_septuplet_147", "psnr"), Threshold("ucf101", "psnr", 34.5),
        Speedup(_720P, 2.0), Improvement("Exp-1c", "Exp-1a"), Improvement("Exp-1c", "Exp-1b"),
    ),
    "phase2": (*_FLOW, MinMetric("vimeo90k", 2, 1), Speedup(_720P, 2.0)),
    "phase3": (
        *_FLOW, MinMetric("vimeo90k", 3, 2), Threshold("xtest_4k", "psnr", 30.0), Threshold("xtest_4k", "ssim", 0.88),
        Threshold("xtest_2k", "psnr", 33.0), Milliseconds(_4K, 300.0),
    ),
}  # fmt: skip


def check(
    name: GateName, results: Sequence[Results], speeds: Sequence[Speed] = (), output_dir: Path | None = None
) -> list[Verdict]:
    """Check all gates of a phase, in their order. `output_dir`: folder of the ablation's runs."""
    evidence = Measurements(results, speeds, output_dir)
    return [Verdict(gate, *gate.check(evidence)) for gate in GATES[name]]


def lines(name: GateName, verdicts: Sequence[Verdict]) -> list[str]:
    """Format the verdicts as lines to print."""
    return [f"gate {name}: {summary(verdicts)}", *(f"{verdict.state}: {verdict.gate}: {verdict.why}" for verdict in verdicts)]


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return how many gates are passed, and how many were not measured."""
    missing = sum(verdict.passed is None for verdict in verdicts)
    passed = f"{sum(verdict.passed is True for verdict in verdicts)} of {len(verdicts)} passed"
    return passed + (f", {missing} not measured" if missing else "")


def _is_comparable(results: Results) -> bool:
    return results.protocol.get("profile") in _PROFILES and results.protocol["frame set"] == "all samples"


def _latencies(speeds: Sequence[Speed], size: str) -> Iterator[tuple[Speed, SpeedRow, list[SpeedRow]]]:
    """Yield, for each speed file, this project's first model at this size and twice the frame rate, and all rows there."""
    for speed in speeds:
        rows = [row for row in speed.rows if (row.size, row.factor) == (size, 2)]
        if ours := [row for row in rows if row.path is not None]:
            yield speed, ours[0], rows


def _no_latency(speeds: Sequence[Speed], size: str, otherwise: str, how: str) -> Outcome:
    full = [ours.model for _, ours, _ in _latencies(speeds, size) if ours.out_of_memory]
    return (False, f"{full[0]}: {OUT_OF_MEMORY}") if full else (None, f"{otherwise}: {how}")
