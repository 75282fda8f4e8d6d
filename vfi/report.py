"""What did the benchmarks find? Results files -> a Markdown table and one self-contained page.

    vfi report results.json --out report
    vfi report a.json b.json --out report
    vfi report *.json --out report --gate phase1     and is it good enough? exit code 1 if not
    vfi report --ablation phase1                     the runs of an ablation by their validation, printed

Writes report.md and report.html: tables, training curves, pictures with a before/after slider, and how it was measured.
Rows stand in one table only if they were measured on the same samples; every other set gets a table of its own.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from vfi import gates
from vfi.ablation import ablation_table
from vfi.errors import JobError, clear_errors
from vfi.presets import AblationName
from vfi.published import published_cells
from vfi.records import write_text
from vfi.report_page import better_on, page, short_number
from vfi.results import FRAME_AVERAGE, Group, ResultError, group_by_data, read_results


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the job."""

    results: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files that `vfi benchmark` wrote; one or more."""
    out: Path | None = None
    """Folder for report.md and report.html."""
    ablation: AblationName | None = None
    """Print the table of the experiments Exp-1…, Exp-2… or Exp-3… instead."""
    output_dir: Path = Path("runs")
    """Folder of the runs of --ablation."""
    gate: gates.GateName | None = None
    """Also check the thresholds of a phase (vfi/gates.py); exit code 1 when one is not passed."""


@clear_errors(ResultError)
def main(argv: Sequence[str] | None = None) -> None:
    """The job: read the results, write both files, say where they are."""
    options = tyro.cli(Options, prog="vfi report", description=__doc__, args=argv)
    if options.ablation:
        if options.results or options.out or options.gate:
            raise JobError("--ablation prints a table of runs: leave results files, --out and --gate out")
        print(ablation_table(options.output_dir, options.ablation))
        return
    if options.output_dir != Path("runs"):
        raise JobError("--output_dir has no effect without --ablation: leave it out")
    if options.out is None:
        raise JobError("--out is missing: give a folder for report.md and report.html")
    for path in report(options.results, options.out):
        print(path)
    if options.gate:
        verdicts = gates.check(options.gate, [read_results(path) for path in options.results])
        print("\n".join(gates.lines(options.gate, verdicts)))
        if not all(verdict.passed for verdict in verdicts):
            sys.exit(1)


def report(results: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Write report.md and report.html into `out` and return their paths. Raises ResultError or JobError."""
    if not results:
        raise JobError("no results file was given: `vfi benchmark` writes one, then `vfi report results.json --out report`")
    if out.exists() and not out.is_dir():
        raise JobError(f"--out {out} is a file: give a folder")
    groups = group_by_data({path: read_results(path) for path in dict.fromkeys(results)})
    texts = {out / "report.md": markdown(groups), out / "report.html": page(groups)}
    out.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_text(path, text)
    return out / "report.md", out / "report.html"


def markdown(groups: Sequence[Group]) -> str:
    """Tables and facts of all groups."""
    return "\n".join(["# Video frame interpolation: results", *(line for group in groups for line in _section(group)), ""])


def _section(group: Group) -> list[str]:
    average = group.average
    rows = [
        (
            FRAME_AVERAGE,
            "",
            "",
            f"{average.psnr:.2f}",
            f"{average.ssim:.4f}",
            f"{average.ie:.2f}",
            "",
            "",
            str(group.samples),
            group.data,
        )
    ]
    for entry in group.entries:
        row = entry.row
        rows.append(
            (
                entry.label,
                short_number(row.parameters),
                "" if row.step is None else str(row.step),
                f"{row.psnr:.2f}",
                f"{row.ssim:.4f}",
                f"{row.ie:.2f}",
                f"{row.psnr - average.psnr:+.2f}",
                better_on(entry, group),
                str(group.samples),
                group.data,
            )
        )
    lines = ["", f"## {_escape(group.data)}", ""]
    lines.append(
        "| model | parameters | step | PSNR dB | SSIM | IE | gain over frame average dB | better on | samples | data |"
    )
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    lines += ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows]
    if published := published_cells(group.files[0][1].protocol.get("protocol", "")):
        lines += [
            "",
            "Published, not measured here:",
            "",
            "| model | PSNR dB | SSIM | IE | |",
            "| --- | ---: | ---: | ---: | --- |",
        ]
        lines += ["| " + " | ".join(map(_escape, row)) + " |" for row in published]
    for path, results in group.files:
        facts = {"index sha256": results.index_sha256} | results.protocol | results.environment
        lines += ["", f"How `{_escape(str(path))}` was measured:", ""]
        lines += [f"- {_escape(name)}: {_escape(value)}" for name, value in facts.items()]
    return lines


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, also in a cell of a table."""
    for sign in "\\`*_<>|[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


if __name__ == "__main__":
    main()
