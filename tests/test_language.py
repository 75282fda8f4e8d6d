"""Wording that the project has replaced by plain terms does not come back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPLACED = {
    r"\banew\b": "recomputed, again, from scratch",
    r"without a word": "silently, without an exit code",
    r"kernels? of (our|its) own|our own kernels": "fused Triton kernels",
    r"is no number|no numbers? any more": "non-finite, not a number",
    r"goes? on with (this|a|the) run|goes on from there": "resumes",
    r"\bwhoever\b": "the rank, the process",
    r"is dealt\b|are dealt\b": "is assigned",
    r"nothing is heard of": "did not report",
    r"it is a part of the .* and must lie": "must be a fraction between 0 and 1",
    r"more than 0, and a number": "must be positive and finite",
    r"leave it out, or add that": "remove it or add",
    r"\b(untrained_donor|transplant|Transplant)": "matvlm_init, random_source",
    r"\b(between_for|Fsdp2\(|Ledger|Contender|shard_bench|TransplantReport)\b": "the names of docs and code today",
    r"\b(give_pointwise|choose_pointwise|let_segments_grow|record_passes|rehearse|fit_batch)\b": "their verbs today",
    r"\b(on_its_way|refusals_explained|fused_obstacle|takes_fused|stack_channels)\b": "their verbs today",
    r"unittest import mock|import mock": "vfi.runtime.attributes.replaced",
}
"""Pattern -> what to write in its place."""
LISTED = subprocess.run(
    ["git", "ls-files", "vfi", "launch", "shards", "recipes", "docs", "README.md", "CONTRIBUTING.md"],
    cwd=ROOT, capture_output=True, text=True, check=False,
).stdout.split()  # fmt: skip
TEXTS = [name for name in LISTED if name.endswith((".py", ".md", ".sh")) and name != "docs/experiments.md"]


@pytest.mark.skipif(not LISTED, reason="not a git checkout")
@pytest.mark.parametrize("pattern", REPLACED)
def test_replaced_wording_is_gone(pattern):
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in TEXTS
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"write {REPLACED[pattern]}"
