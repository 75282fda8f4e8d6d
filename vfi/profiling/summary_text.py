"""Model summary as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vfi.io.text_table import aligned
from vfi.profiling.summary_schema import OUT_OF_MEMORY, Level, Summary, TrainingSummary

_LEVELS_NOTE = " (every other block shifts its windows by half; a scan sees all of its tokens)"
_TOTAL = "total"
_SHOWN = ("torch", "triton", "mamba-ssm")  # versions that are shown with a time


def text(summary: Summary) -> str:
    """Format the whole summary as aligned tables."""
    sizes, macs = summary.sizes, [size.macs for size in summary.sizes]
    head = ["", *(size.size for size in sizes)]
    parts = _in_order(summary.parameters, *macs)
    costs = [["", "parameters", *head[1:]]]
    for part in parts:
        costs.append([part, f"{summary.parameters.get(part, 0):,}", *(_giga(one.get(part, 0)) for one in macs)])
    costs.append(["total", f"{sum(summary.parameters.values()):,}", *(_giga(sum(one.values())) for one in macs)])
    for kind in _in_order(*(size.macs_by_kind for size in sizes)):
        costs.append([f"  of which {kind}", "", *(_giga(size.macs_by_kind.get(kind, 0)) for size in sizes)])
    sections = [
        describe(summary),
        f"Parameters, and GMACs of a forward pass at batch {summary.batch}:\n" + aligned(costs),
        *(f"Levels at {size.size}{_LEVELS_NOTE}:\n" + aligned(_level_rows(size.levels)) for size in sizes),
        f"Time and memory of a forward pass at batch {summary.batch}:\n" + aligned([head, *_run_rows(summary)]),
    ]
    timed = [
        _Column(size.size, size.parts_ms, size.floors_ms or {}, size.plain_parts_ms or {}, {}, {})
        for size in sizes
        if size.parts_ms
    ]
    if timed:
        sections.append(f"Where the time of a forward pass goes, in ms{_rates_note(summary)}:\n" + _parts_table(summary, timed))
    if full := [size.size for size in sizes if size.plain_out_of_memory]:
        sections.append(f"By PyTorch's operators at {', '.join(full)}: {OUT_OF_MEMORY}")
    if summary.training:
        sections.append(_training_line(summary.training))
    if summary.training and summary.training.parts:
        table = _parts_table(summary, [_training_column(summary.training)])
        sections.append("Where that of a training step goes, forward and backward, part by part:\n" + table)
    if summary.training and summary.training.plain_out_of_memory:
        sections.append(f"A training step by PyTorch's operators: {OUT_OF_MEMORY}")
    return "\n\n".join(sections)


def describe(summary: Summary) -> str:
    """Describe the model and the environment of the measurement."""
    told = summary.environment
    versions = ", ".join(f"{name} {version}" for name, version in told["packages"].items() if name in _SHOWN)
    line = (
        f"{summary.name}: {'measured' if told['measured'] else 'estimated'} on {told['device']}, {told['precision']}, TF32 "
        f"{_on(told['tf32_matmul'])} (matmul) {_on(told['tf32_cudnn'])} (cuDNN), cuDNN benchmark "
        f"{_on(told['cudnn_benchmark'])}, {told['threads']} threads, {versions}"
    )
    return "\n".join([line, *told.get("choices", ())])


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _in_order(*numbers: dict[str, Any]) -> list[str]:
    """Return the names with a non-zero number in any of the dicts."""
    return [name for name in dict.fromkeys(name for one in numbers for name in one) if any(one.get(name) for one in numbers)]


def _giga(macs: int) -> str:
    return f"{macs / 1e9:,.2f}" if macs else "-"


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**30:.2f}"


class _Column(NamedTuple):
    """Columns of a table by part: milliseconds, and bytes if they are known."""

    title: str
    ms: dict[str, float]
    floors: dict[str, float]
    plain: dict[str, float]
    nbytes: dict[str, int]
    plain_nbytes: dict[str, int]

    def head(self) -> list[str]:
        plain = ["plain", ""] if self.plain else []
        memory = ["MiB", *(["plain MiB"] if self.plain else [])] if self.nbytes else []
        return [self.title, "", *(["floor", ""] if self.floors else []), *plain, *memory]

    def row(self, part: str) -> list[str]:
        """Return time, share, roofline bound, ratio to it, the time with PyTorch's operators, and the speedup over that."""
        total = sum(self.ms.values())
        ms, floor, plain = (sum(one.values()) if part == _TOTAL else one.get(part, 0.0) for one in self[1:4])
        cells = [f"{ms:.2f}", f"{100 * ms / total:3.0f} %"]
        if self.floors:
            cells += [f"{floor:.3f}", f"{ms / floor:.1f}x"] if floor else ["", ""]
        if self.plain:
            cells += [f"{plain:.2f}", f"{plain / ms:.1f}x"] if ms else [f"{plain:.2f}", ""]
        memory = [self.nbytes, *([self.plain_nbytes] if self.plain else [])] if self.nbytes else []
        return cells + [f"{one[part] / 2**20:,.0f}" if part in one else "" for one in memory]


def _training_column(training: TrainingSummary) -> _Column:
    parts, plain = training.parts or {}, training.plain_parts or {}
    times, nbytes = [
        [
            {part: getattr(one, what) for part, one in found.items() if getattr(one, what) is not None}
            for found in (parts, plain)
        ]
        for what in ("ms", "allocated")
    ]
    floors = {part: floor for part, floor in (training.floors_ms or {}).items() if part in parts}
    return _Column(f"{training.batch} x {training.crop}²", times[0], floors, times[1], *nbytes)


def _parts_table(summary: Summary, columns: Sequence[_Column]) -> str:
    rows = [["", *(cell for column in columns for cell in column.head())]]
    for part in [*_in_order(summary.parameters, *(column.ms for column in columns)), _TOTAL]:
        rows.append([part, *(cell for column in columns for cell in column.row(part))])
    return aligned(rows)


def _rates_note(summary: Summary) -> str:
    rates = summary.environment["rates"]
    return f"; floor: at {rates['tflops']:.3g} TFLOP/s or {rates['gbs']:,.0f} GB/s" if rates else ""


def _level_rows(found: Iterable[Level]) -> list[list[str]]:
    rows = [["level", "stride", "channels", "tokens", "conv field px", "blocks", "window px", "scan tokens", "scan GMACs"]]
    for one in found:
        numbers = (one.stride, one.channels, one.tokens, one.conv_field, one.blocks, one.window, one.scan_tokens)
        rows.append([str(one.level), *(f"{n:,}" if n else "-" for n in numbers), _giga(one.scan_macs or 0)])
    return rows


def _run_rows(summary: Summary) -> list[list[str]]:
    """Return measured figures if available, and always the estimate, each labelled."""
    rows = []
    sizes = summary.sizes
    if summary.environment["measured"]:
        rows.append(["ms", *(f"{s.measured.ms:.2f}" if s.measured else OUT_OF_MEMORY for s in sizes)])
        if any(s.graph_ms for s in sizes):
            rows.append(["ms by a CUDA graph", *(f"{s.graph_ms:.2f}" if s.graph_ms else "-" for s in sizes)])
        if any(s.measured and s.measured.allocated for s in sizes):
            rows.append(["GiB allocated", *(_gib(s.measured.allocated if s.measured else None) for s in sizes)])
            rows.append(["GiB reserved", *(_gib(s.measured.reserved if s.measured else None) for s in sizes)])
    if any(s.estimated_bytes for s in sizes):
        rows.append(["estimate: GiB alive at once in plain torch", *(_gib(s.estimated_bytes) for s in sizes)])
    if any(s.estimated_ms for s in sizes):
        rows.append([f"estimate: ms{_assumed(summary)}", *(f"{s.estimated_ms:.2f}" for s in sizes)])
    return rows


def _assumed(summary: Summary) -> str:
    """Return the rates behind an estimate of the time, if there is one."""
    tflops, gbs = (summary.environment[f"assumed_{rate}"] for rate in ("tflops", "gbs"))
    return f", each operator alone at {tflops:g} TFLOP/s or {gbs:g} GB/s" if tflops else ""


def _training_line(training: TrainingSummary) -> str:
    what = f"Training, batch {training.batch}, crop {training.crop}, with AdamW:"
    if training.measured is None:
        return f"{what} {OUT_OF_MEMORY}"
    measured = training.measured
    memory = f", {_gib(measured.allocated)} GiB allocated, {_gib(measured.reserved)} reserved" if measured.allocated else ""
    return f"{what} {training.samples_per_s:.1f} samples/s, {measured.ms:.1f} ms a step{memory}"


def markdown(summary: Summary) -> str:
    """Return time and memory as a Markdown table: the model is its row, the sizes are its columns."""
    measured = summary.environment["measured"]
    cells = []
    for size in summary.sizes:
        if size.measured:
            memory = f" · {_gib(size.measured.allocated)} / {_gib(size.measured.reserved)}" if size.measured.allocated else ""
            graph = f" ({size.graph_ms:.1f})" if size.graph_ms else ""
            cells.append(f"{size.measured.ms:.1f}{graph}{memory}")
        else:
            time = f"{size.estimated_ms:.1f} · " if size.estimated_ms else ""
            cells.append(OUT_OF_MEMORY if size.out_of_memory else f"{time}{_gib(size.estimated_bytes)}")
    estimated = f"ms{_assumed(summary)} · " if _assumed(summary) else ""
    measures = "ms (by a CUDA graph) · GiB allocated / reserved"
    unit = measures if measured else f"estimate: {estimated}GiB alive at once in plain torch"
    head = [unit, "params", *(size.size for size in summary.sizes)]
    row = [summary.name, f"{sum(summary.parameters.values()) / 1e6:.1f} M", *cells]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), row))
    return "\n\n".join([describe(summary), lines, *([_training_line(summary.training)] if summary.training else [])])
