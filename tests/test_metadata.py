"""The files that describe the project for other programs agree with setup.cfg."""

from __future__ import annotations

import configparser
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def settings() -> configparser.ConfigParser:
    """Return setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read_string((ROOT / "setup.cfg").read_text())
    return parser


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)  # what the format requires
    metadata = settings()["metadata"]
    assert citation["version"] == metadata["version"]
    assert citation["license"] == metadata["license"]


def test_hooks_take_the_ruff_of_the_linters():
    needed = [line for line in settings()["options.extras_require"]["dev"].splitlines() if line.startswith("ruff")]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"].split()[:2] for hook in repository["hooks"]] == [["ruff", "check"], ["ruff", "format"]]
    assert all(hook["additional_dependencies"] == needed for hook in repository["hooks"])
