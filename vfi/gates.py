"""Is a model good enough for the next phase? Thresholds on published benchmarks, checked on results files.

    vfi report results/*.json --out report --gate phase1          exit code 1 when one of them is not passed

A gate counts the best of the models in a file, by a profile of the VFIMamba family and on the complete set. What was not
measured is not passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from vfi.published import PUBLISHED
from vfi.results import Results, Row

GateName = Literal["phase1", "phase2", "phase3"]
_PROFILES = ("vfimamba", "ema")


class Gate(NamedTuple):
    """One threshold."""

    protocol: str
    measure: Literal["psnr", "ssim"]
    least: float
    target: float | None = None
    """What one would like to have."""

    def __str__(self) -> str:
        unit = " dB" if self.measure == "psnr" else ""
        return f"{self.protocol} {self.measure.upper()} at least {self.least:g}{unit}"


class Verdict(NamedTuple):
    """What became of a gate."""

    gate: Gate
    passed: bool
    why: str


_FLOW = (
    Gate("ucf101", "psnr", 35.0), Gate("snu_film_easy", "psnr", 39.5), Gate("snu_film_medium", "psnr", 35.0),
    Gate("snu_film_hard", "psnr", 30.0), Gate("snu_film_hard", "ssim", 0.90), Gate("snu_film_extreme", "psnr", 26.0),
    Gate("snu_film_extreme", "ssim", 0.85), Gate("vimeo90k", "psnr", 36.0), Gate("vimeo90k", "ssim", 0.978),
)  # fmt: skip
GATES: dict[GateName, tuple[Gate, ...]] = {
    "phase1": (Gate("vimeo90k", "psnr", 35.0, 35.5), Gate("vimeo90k", "ssim", 0.975), Gate("ucf101", "psnr", 34.5)),
    "phase2": _FLOW,
    "phase3": (*_FLOW, Gate("xtest_4k", "psnr", 30.0), Gate("xtest_4k", "ssim", 0.88), Gate("xtest_2k", "psnr", 33.0)),
}


def check(name: GateName, results: Sequence[Results]) -> list[Verdict]:
    """All gates of a phase, in their order."""
    return [_check(gate, [one for one in results if one.protocol.get("protocol") == gate.protocol]) for gate in GATES[name]]


def lines(name: GateName, verdicts: Sequence[Verdict]) -> list[str]:
    """What to print of them."""
    passed = sum(verdict.passed for verdict in verdicts)
    marks = [f"{'passed' if verdict.passed else 'NOT passed'}: {verdict.gate}: {verdict.why}" for verdict in verdicts]
    return [f"gate {name}: {passed} of {len(verdicts)} passed", *marks]


def _check(gate: Gate, results: Sequence[Results]) -> Verdict:
    usable = [one for one in results if one.protocol.get("profile") in _PROFILES and _is_whole(one)]
    rows = [row for one in usable for row in one.rows if row.path is not None]
    if not rows:
        why = "not measured" if not results else "measured on a part of the set, or by another profile"
        return Verdict(gate, False, why + _beyond(gate))
    best: Row = max(rows, key=lambda row: getattr(row, gate.measure))
    value = getattr(best, gate.measure)
    why = f"{best.model} has {value:.{2 if gate.measure == 'psnr' else 4}f}"
    if gate.target is not None:
        why += f" (target {gate.target:g})"
    return Verdict(gate, value >= gate.least, why + ("" if value >= gate.least else _beyond(gate)))


def _is_whole(results: Results) -> bool:
    return results.protocol["frame set"] == "all samples"


def _beyond(gate: Gate) -> str:
    """A word where no published model is known to pass."""
    known = [value for row in PUBLISHED.get(gate.protocol, ()) if (value := getattr(row, gate.measure)) is not None]
    return f"; no published model passes it (best: {max(known):g})" if known and max(known) < gate.least else ""
