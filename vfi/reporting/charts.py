"""Charts of the report's page: PSNR image by image, curves over training, and quality against latency."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vfi.evaluation.latency_results import Speed, SpeedRow
from vfi.evaluation.results import FRAME_AVERAGE, Entry, Group
from vfi.reporting.svg import Series, labelled_chart, line_chart, scatter_chart, thin

PREFERRED_SIZE = "736x1280"
"""Frame size whose latency is plotted against quality, if it was measured."""


def charts(group: Group, speeds: Mapping[Path, Speed]) -> str:
    """Draw all figures of a group."""
    against = (speed_chart(group, path, speed) for path, speed in speeds.items())
    return "".join([_scatter(group), *_curves(group), *against])


def run_folder(entry: Entry) -> Path | None:
    """Return the folder of a model's run, if it exists."""
    folder = entry.file.parent / entry.row.run if entry.row.run else None
    return folder if folder and folder.is_dir() else None


def speed_chart(group: Group, path: Path, speed: Speed) -> str:
    """Plot the time of a frame against PSNR, for the models that have both; nothing if there are none."""
    found = {entry.label: timed for entry in group.entries if (timed := _timed(entry, speed))}
    sizes = [size for of_model in found.values() for size in of_model]
    if not sizes:
        return ""
    size = max(sizes, key=lambda size: (sizes.count(size), size == PREFERRED_SIZE, _area(size)))
    series = []
    for entry in group.entries:  # every model keeps its colour, also next to one without a time
        row = found.get(entry.label, {}).get(size)
        text = f"{entry.label}: {row.ms:.4g} ms, {entry.row.psnr:.2f} dB" if row else ""
        series.append(Series(entry.label, [(row.ms, entry.row.psnr, text)] if row and row.ms else []))
    svg = labelled_chart("Speed against quality", series, "ms for one frame", "PSNR dB")
    device = speed.environment.get("device", "a device that is not named")
    return _figure(
        "Speed against quality", svg,
        f"Up and to the left is better. Time of one frame between two of {size} on {device} ({path}); PSNR is that of this "
        f"section, whatever the size of its frames.",
    )  # fmt: skip


def _timed(entry: Entry, speed: Speed) -> dict[str, SpeedRow]:
    """Return size -> the fastest row of this model at twice the frame rate, matched by path, or else by name."""
    rows = [row for row in speed.rows if row.factor == 2 and row.ms is not None]
    of_model = [row for row in rows if row.path is not None and row.path == entry.row.path]
    of_model = of_model or [row for row in rows if row.model == entry.label]
    return {row.size: row for row in sorted(of_model, key=lambda row: -(row.ms or 0))}


def _area(size: str) -> int:
    height, _, width = size.partition("x")
    return int(height) * int(width) if height.isdigit() and width.isdigit() else 0


def _figure(caption: str, svg: str, note: str = "") -> str:
    below = f"<small>{escape(note)}</small>" if note else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}{below}</figure>"


def _scatter(group: Group) -> str:
    """Plot the PSNR of each model against that of the frame average."""
    average = {image.key: image.psnr for image in group.average.images}
    series = [
        Series(
            entry.label,
            [
                (average[i.key], i.psnr, f"{i.key}: {i.psnr:.2f} dB, frame average {average[i.key]:.2f} dB ({entry.label})")
                for i in entry.row.images[:: math.ceil(len(entry.row.images) / 2000)]
            ],
        )
        for entry in group.entries
    ]
    svg = scatter_chart("PSNR of each image", series, "frame average, PSNR dB", "model, PSNR dB")
    return _figure("PSNR of each image", svg, "Above the dashed line the model is better than the average.")


def _curves(group: Group) -> list[str]:
    """Plot loss and validation over the training steps of every model whose run folder exists."""
    rows = {entry.label: _metrics(run / "metrics.jsonl") for entry in group.entries if (run := run_folder(entry))}
    names = [entry.label for entry in group.entries]  # every model keeps its colour, also next to one without curves
    loss = [Series(name, thin(_points(rows.get(name, ()), "train", "loss"))) for name in names]
    val = [Series(name, thin(_points(rows.get(name, ()), "val", "psnr"))) for name in names]
    loss = [Series(name, [point for point in points if point[1] > 0]) for name, points in loss]
    figures = []
    if any(points for _, points in loss):
        figures.append(_figure("Training loss", line_chart("Training loss", loss, "step", "loss", log=True)))
    if any(points for _, points in val):
        averages = {y for events in rows.values() for _, y, _ in _points(events, "val", "average_psnr")}
        rules = [(FRAME_AVERAGE, y) for y in sorted(averages)] if len(averages) == 1 else []
        figures.append(_figure("Validation", line_chart("Validation PSNR", val, "step", "PSNR dB", rules=rules)))
    return figures


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; a truncated last line is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _points(rows: Sequence[dict[str, Any]], event: str, name: str) -> list[tuple[float, float, str]]:
    """Return (step, value, label) of one metric, by step; non-finite values are dropped."""
    found = {row["step"]: row[name] for row in rows if row.get("event") == event and row.get(name) is not None}
    return [(step, y, f"step {step}: {y:.4g}") for step, y in sorted(found.items()) if math.isfinite(y)]
