"""Report on benchmarks: results and speed files -> Markdown tables and one self-contained page.

    vfi report results.json --out report
    vfi report a.json b.json speed.json --out report
    vfi report *.json --out report --gate phase1       also check the gates of a phase; exit code 1 if one is not passed
    vfi report *.json --out report --ablation phase1   also list the runs of an ablation by their validation
    vfi report --ablation phase1                       print these runs alone

Writes report.md and report.html: tables, training curves, latency against quality, pictures with a before/after slider, and how
it was measured. Rows share a table only if they were measured on the same samples; other sets get tables of their own.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from shards.cli import parse_flags
from vfi.config.presets import AblationName
from vfi.errors import JobError, clear_errors
from vfi.evaluation.results import Group, ResultError, group_by_data
from vfi.io.dataclass_json import write_text
from vfi.reporting import acceptance
from vfi.reporting.ablation import ablation_table
from vfi.reporting.files import read_files
from vfi.reporting.html_page import TITLE, Content, about, fact, page
from vfi.reporting.tables import (
    Table,
    clip_table,
    from_markdown,
    gate_table,
    motion_table,
    published_table,
    results_table,
    speed_table,
)

RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi report`; each field is a command-line flag."""

    results: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files that `vfi benchmark` wrote, with or without --speed; one or more."""
    out: Path | None = None
    """Folder for report.md and report.html."""
    ablation: AblationName | None = None
    """Add the table of the experiments Exp-1…, Exp-2… or Exp-3…; without any files it is printed."""
    output_dir: Path = RUNS
    """Folder of the runs, for --ablation and --gate."""
    gate: acceptance.GateName | None = None
    """Also check the thresholds of a phase (vfi/reporting/acceptance.py); exit code 1 when one is not passed."""


@clear_errors(ResultError)
def main(argv: Sequence[str] | None = None) -> None:
    """Read the files, write the report, and print its path and the outcome of the gates."""
    options = parse_flags(Options, "vfi report", __doc__, argv)
    if options.output_dir != RUNS and not (options.ablation or options.gate):
        raise JobError("--output_dir has no effect without --ablation or --gate: leave it out")
    if options.ablation and not options.results:
        if options.out or options.gate:
            raise JobError("--ablation prints a table of runs: leave --out and --gate out, or give files to report beside it")
        print(ablation_table(options.output_dir, options.ablation))
        return
    if options.out is None:
        raise JobError("--out is missing: give a folder for report.md and report.html")
    results, speeds = read_files(options.results)
    found = list(results.values()), list(speeds.values()), options.output_dir
    verdicts = acceptance.check(options.gate, *found) if options.gate else []
    content = Content(
        group_by_data(results),
        speeds,
        gate_table(options.gate, verdicts) if options.gate else None,
        _ablation(options.output_dir, options.ablation) if options.ablation else None,
    )
    for path in write(content, options.out):
        print(path)
    if options.gate:
        print("\n".join(acceptance.lines(options.gate, verdicts)))
        if not all(verdict.passed for verdict in verdicts):
            sys.exit(1)


def report(files: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Write report.md and report.html into `out` and return their paths. Raises ResultError or JobError."""
    results, speeds = read_files(files)
    return write(Content(group_by_data(results), speeds), out)


def write(content: Content, out: Path) -> tuple[Path, Path]:
    """Write report.md and report.html, or neither."""
    if out.exists() and not out.is_dir():
        raise JobError(f"--out {out} is a file: give a folder")
    texts = {out / "report.md": markdown(content), out / "report.html": page(content)}
    out.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_text(path, text)
    return out / "report.md", out / "report.html"


def markdown(content: Content) -> str:
    """Render tables and facts of everything in Markdown."""
    lines = [f"# {TITLE}"]
    lines += _section(content.gate) if content.gate else []
    for group in content.groups:
        lines += _group(group)
    for number, (path, speed) in enumerate(content.speeds.items()):
        lines += _section(speed_table(speed)) if not number else _table(speed_table(speed))
        lines += _facts(path, speed.settings | speed.environment)
    lines += _section(content.ablation) if content.ablation else []
    return "\n".join([*lines, ""])


def _ablation(output_dir: Path, ablation: AblationName) -> Table:
    return from_markdown(f"Ablation {ablation}", ablation_table(output_dir, ablation))


def _group(group: Group) -> list[str]:
    """Render everything that was measured on the same samples."""
    lines = ["", f"## {_escape(group.data)}", "", _escape(about(group)), *_table(results_table(group))]
    for title, table in (
        ("Published, not measured here:", published_table(group)),
        ("PSNR by how far things move:", motion_table(group)),
        ("PSNR by clip:", clip_table(group)),
    ):
        lines += ["", title, *_table(table)] if table else []
    for path, results in group.files:
        lines += _facts(path, {"index sha256": results.index_sha256} | results.protocol | results.environment)
    return lines


def _section(table: Table) -> list[str]:
    return ["", f"## {_escape(table.label)}", *_table(table)]


def _table(table: Table) -> list[str]:
    rules = ["---" if words else "---:" for words in table.words]
    rows = [[_escape(cell.text) for cell in row] for row in table.rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in ([_escape(head) for head in table.head], rules, *rows)]
    return ["", *lines, *(["", _escape(" ".join(table.notes))] if table.notes else [])]


def _facts(path: Path, facts: Mapping[str, Any]) -> list[str]:
    lines = [f"- {_escape(name)}: {_escape(fact(value))}" for name, value in facts.items()]
    return ["", f"How `{_escape(str(path))}` was measured:", "", *lines]


def _escape(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, also in a cell of a table."""
    for sign in "\\`*_<>|[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


if __name__ == "__main__":
    main()
