"""Read the files that a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vfi.errors import JobError
from vfi.evaluation.latency_results import Speed, is_speed, read_speed
from vfi.evaluation.results import Results, read_results


def read_files(files: Sequence[Path]) -> tuple[dict[Path, Results], dict[Path, Speed]]:
    """Read results files and speed files, each once. Raises ResultError, or JobError where none is given."""
    if not files:
        raise JobError("no results file was given: `vfi benchmark` writes one, then `vfi report results.json --out report`")
    results: dict[Path, Results] = {}
    speeds: dict[Path, Speed] = {}
    for path in dict.fromkeys(files):
        if is_speed(path):
            speeds[path] = read_speed(path)
        else:
            results[path] = read_results(path)
    return results, speeds
