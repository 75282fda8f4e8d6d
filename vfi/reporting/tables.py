"""Tables of a report: cells of results, latency and verdicts, the same in Markdown and on the page.

A column without a value in any row is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from vfi.evaluation.latency_results import OUT_OF_MEMORY, OWN_PRECISION, Speed
from vfi.evaluation.published import published_cells
from vfi.evaluation.results import BASELINES, QUARTERS, Entry, Group, Row, by_clip, by_motion
from vfi.reporting.acceptance import Verdict, summary

_LONG = 30  # characters


class Cell(NamedTuple):
    """Text of a cell, and how the page shows it."""

    text: str
    kind: str = ""
    """A class of the page's style: best, gain, loss or muted numbers, words, long words (which wrap), or empty."""


class Table(NamedTuple):
    """A table, and the notes that explain it."""

    label: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    baselines: int = 0
    """Number of rows at the top that are baselines."""

    @property
    def words(self) -> tuple[bool, ...]:
        """Return which columns hold text: like the first column they are aligned left, numbers are aligned right."""
        kinds = [{row[number].kind for row in self.rows} for number in range(len(self.head))]
        return tuple(number == 0 or bool(found & {"words", "long"}) for number, found in enumerate(kinds))


class _Column(NamedTuple):
    """A column, which is dropped later if it has no values; `note` explains its header."""

    head: str
    cells: Sequence[Cell]
    note: str = ""


def results_table(group: Group) -> Table:
    """Return both baselines and the models of a group, with all measures."""
    rows = _rows(group)
    gains = [Cell(""), *(gain_cell(row.psnr - group.average.psnr) for row in rows[1:])]
    better = ["", *(_better_on(row, group) for row in rows[1:])]
    columns = [
        _Column("Model", _plain(_names(group))),
        _measure("PSNR dB", rows, lambda row: row.psnr, 2),
        _Column("Gain dB", gains, "Gain: PSNR above that of the frame average."),
        _measure("SSIM", rows, lambda row: row.ssim, 4),
        _measure("IE ↓", rows, lambda row: row.ie, 2, lower=True, note="IE: interpolation error, 0 … 255; lower is better."),
        _measure("LPIPS ↓", rows, lambda row: row.lpips, 4, lower=True, note="LPIPS: lower is better."),
        _measure("PSNR moving", rows, lambda row: row.psnr_moving, 2, note="PSNR moving: of the pixels that move, in dB."),
        _measure(
            "PSNR of changes", rows, lambda row: row.psnr_of_changes, 2,
            note="PSNR of changes: of what changes from frame to frame, in dB.",
        ),
        _Column("Better on", _plain(better), "Better on: images with a higher PSNR than the frame average."),
        _Column("Parameters", _plain(short_number(row.parameters) for row in rows)),
        _Column("MACs", _plain(short_number(row.macs) for row in rows), "MACs: of one frame of the first sample's size."),
        _Column("Step", _plain("" if row.step is None else f"{row.step:,}" for row in rows)),
        _Column("Precision", _plain(["", "", *map(_precision, group.entries)])),
    ]  # fmt: skip
    return _table("Results", columns, baselines=len(BASELINES))


def motion_table(group: Group) -> Table | None:
    """Return PSNR by quarters of the images, by motion; None where motion was not estimated, or on few images."""
    motion = next((results.motion for _, results in group.files if results.motion), ())
    quarters = [by_motion(row, motion) for row in _rows(group)]
    if not quarters[0]:
        return None
    columns = [_Column("Model", _plain(_names(group)))]
    for number, name in enumerate(QUARTERS):
        values = [of_row[number][1] for of_row in quarters]
        columns.append(_Column(f"{name}: up to {quarters[0][number][0]:.3g} px", _values(values, 2, lower=False)))
    note = "PSNR in dB of the images, in quarters by how far their things move on average from one input to the other."
    return _table("PSNR by motion", columns, notes=(note,), baselines=len(BASELINES))


def clip_table(group: Group) -> Table | None:
    """Return the PSNR of each clip and of each folder of clips; None where the keys do not name several clips."""
    rows = _rows(group)
    groups = by_clip(group.average.images)
    if not groups:
        return None
    means = [[statistics.mean(row.images[number].psnr for number in numbers) for numbers in groups.values()] for row in rows]
    columns = [
        _Column("Clip", _plain(groups)),
        _Column("Samples", _plain(f"{len(numbers):,}" for numbers in groups.values())),
        *(
            _Column(name, _plain(_number(mean, 2) for mean in of_row))
            for name, of_row in zip(_names(group), means, strict=True)
        ),
    ]
    note = "PSNR in dB, the mean over the samples of a clip; NAME__* are all clips of the folder NAME."
    return _table("PSNR by clip", columns, notes=(note,))


def published_table(group: Group) -> Table | None:
    """Return published numbers for the same protocol."""
    rows = published_cells(group.files[0][1].protocol.get("protocol", ""))
    if not rows:
        return None
    *numbers, notes = zip(*rows, strict=True)
    columns = [_Column(head, _plain(cells)) for head, cells in zip(("Model", "PSNR dB", "SSIM", "IE ↓"), numbers, strict=True)]
    return _table("Published results", [*columns, _Column("Note", _words(notes))])


def speed_table(speed: Speed) -> Table:
    """Return all rows of a speed file, in its order."""
    rows = speed.rows
    times = [Cell(OUT_OF_MEMORY, "loss") if row.out_of_memory else Cell(_number(row.ms, 2)) for row in rows]
    columns = [
        _Column("Model", _plain(row.model for row in rows)),
        _Column("Size", _plain(row.size for row in rows)),
        _Column("Rate", _plain(f"×{row.factor}" for row in rows), "Rate ×N: a call makes N − 1 frames from one pair."),
        _Column("ms", times, "ms: median of one call; p90: nine of ten calls take no longer."),
        _Column("p90 ms", _plain(_number(row.ms_p90, 2) for row in rows)),
        _Column("Ratio", _plain(_number(row.ratio, 2) for row in rows), "Ratio: of ms to the first model's."),
        _Column("Frames/s", _plain(_number(row.frames_per_s, 1) for row in rows)),
        _Column("GiB allocated", _plain(_number(row.allocated, 2, 2**30) for row in rows)),
        _Column("GiB reserved", _plain(_number(row.reserved, 2, 2**30) for row in rows)),
        _Column("Precision", _plain(row.precision + (", compiled" if row.compiled else "") for row in rows)),
        _Column("Parameters", _plain(short_number(row.parameters) for row in rows)),
    ]
    return _table("Speed", columns)


def gate_table(name: str, verdicts: Sequence[Verdict]) -> Table:
    """Return the outcome of the gates of a phase."""
    kinds = {None: "muted", True: "gain", False: "loss"}
    columns = [
        _Column("Verdict", [Cell(verdict.state, kinds[verdict.passed]) for verdict in verdicts]),
        _Column("Gate", _words(str(verdict.gate) for verdict in verdicts)),
        _Column("Why", _words(verdict.why for verdict in verdicts)),
    ]
    return _table(f"Gate {name}", columns, notes=(f"{summary(verdicts)}.",))


def from_markdown(label: str, text: str) -> Table:
    """Parse a Markdown table without escaped characters, as of vfi/reporting/ablation.py; lines after it become notes."""
    lines = text.splitlines()
    head, rules, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    are_words = [number > 0 and not rule.endswith(":") for number, rule in enumerate(rules)]
    columns = [(_words if words else _plain)(cells) for words, cells in zip(are_words, zip(*rows, strict=True), strict=True)]
    notes = tuple(line for line in lines if line and not line.startswith("|"))
    return Table(label, tuple(head), tuple(zip(*columns, strict=True)), notes)


def gain_cell(gain: float) -> Cell:
    """Format a gain with its sign, and with a true minus, which is as wide as a plus; the kind depends on the rounded value."""
    kind = "gain" if gain >= 0.005 else "loss" if gain <= -0.005 else "muted"
    return Cell(f"{round(gain, 2) + 0.0:+.2f}".replace("-", "−"), kind)


def short_number(value: int | None) -> str:
    """Format 1234567 as 1.23 M, and None as nothing."""
    if value is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _table(label: str, columns: Sequence[_Column], notes: tuple[str, ...] = (), baselines: int = 0) -> Table:
    """Turn the columns that have a value into rows."""
    kept = [column for column in columns if any(cell.text for cell in column.cells)]
    rows = tuple(zip(*(column.cells for column in kept), strict=True))
    notes = (*notes, *(column.note for column in kept if column.note))
    return Table(label, tuple(column.head for column in kept), rows, notes, baselines)


def _rows(group: Group) -> list[Row]:
    return [group.average, group.nearest, *(entry.row for entry in group.entries)]


def _names(group: Group) -> list[str]:
    return [*BASELINES, *(entry.label for entry in group.entries)]


def _plain(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text) for text in texts]


def _words(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text, "long" if len(text) > _LONG else "words") for text in texts]


def _measure(
    head: str, rows: Sequence[Row], value: Callable[[Row], float | None], digits: int, lower: bool = False, note: str = ""
) -> _Column:
    return _Column(head, _values([value(row) for row in rows], digits, lower), note)


def _values(values: Sequence[float | None], digits: int, lower: bool) -> list[Cell]:
    """Format the numbers of baselines and models; the best model is marked where there are several."""
    known = [value for value in values[len(BASELINES) :] if value is not None]
    best = (min if lower else max)(known) if len(known) > 1 else math.nan
    kinds = [""] * len(BASELINES) + ["best" if value == best else "" for value in values[len(BASELINES) :]]
    return [Cell(_number(value, digits), kind) for value, kind in zip(values, kinds, strict=True)]


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _precision(entry: Entry) -> str:
    """Return the precision of a model; one of another repository chooses it itself, and has no run."""
    return entry.results.environment.get("precision", "") if entry.row.run else OWN_PRECISION


def _better_on(row: Row, group: Group) -> str:
    """Format on how many images a row beats the frame average, such as 62 / 64."""
    pairs = zip(row.images, group.average.images, strict=True)
    return f"{sum(ours.psnr > average.psnr for ours, average in pairs)} / {group.samples}"
