"""Test what a run keeps of the checkout: code alone, with git and without."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import snapshot

ROOT = Path(__file__).parents[2]
TRACKED = ["vfi/__init__.py", "vfi/shipped/small/model.safetensors", "shards/vimeo90k.py", "launch/submit.py",
           "accelerate_configs/ddp.yaml", "vfi/reporting/logo.png", "vfi/ops/__init__.py",
           "vfi/ops/ssm/empty.py"]  # fmt: skip
NEW = ["vfi/mine.py", "vfi/new/a.py", "vfi/new/a.json", "accelerate_configs/mine.yaml"]
DATA = ["shards/vimeo90k/train/index.json", "shards/vimeo90k/train/shard-000000.tar", "vfi/clip.mp4", "vfi/new/weights/1.json",
        "launch/huge.json", "vfi/__pycache__/a.cpython-311.pyc", "vfi/.cache.py"]  # fmt: skip
LEFT_OUT = ["launch/huge.json", "shards/vimeo90k/", "vfi/away", "vfi/clip.mp4", "vfi/new/weights/", "vfi/outside/"]


def copied(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """Return a checkout whose packages hold changed and new code, and data."""
    root = tmp_path / "checkout"
    for name in (*TRACKED, *NEW, *DATA):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "launch/huge.json").write_text("1" * (1 << 20 | 1))
    (root / "vfi/outside").symlink_to(tmp_path)
    (root / "vfi/away").symlink_to("nowhere")
    monkeypatch.setattr(snapshot, "ROOT", root)
    return root


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, timeout=30)


def test_what_git_tracks_and_new_code_is_copied_and_the_rest_named(checkout, tmp_path) -> None:
    git(checkout, "init")
    git(checkout, "add", *TRACKED)
    git(checkout, "commit", "-m", "first")
    (checkout / "vfi/__init__.py").write_text("changed")
    (checkout / "vfi/ops/ssm/empty.py").unlink()
    code, left_out = snapshot.copy_code(tmp_path / "run")
    assert copied(code) == sorted({*TRACKED, *NEW} - {"vfi/ops/ssm/empty.py"})
    assert (code / "vfi/__init__.py").read_text() == "changed"
    assert left_out == LEFT_OUT
    snapshot.describe(tmp_path / "run", ["a"], left_out)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["left_out"] == left_out
    assert "+changed" in (tmp_path / "run" / "changes.patch").read_text()


def test_without_git_source_files_and_the_shipped_model_are_copied(checkout, tmp_path) -> None:
    code, left_out = snapshot.copy_code(tmp_path / "run")
    assert copied(code) == sorted({*TRACKED, *NEW} - {"vfi/reporting/logo.png"})
    assert left_out == sorted([*LEFT_OUT, "vfi/reporting/"])


def test_the_copy_of_this_checkout_is_complete(tmp_path) -> None:
    listed = ["git", "ls-files", *snapshot.PACKAGES]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    code, _ = snapshot.copy_code(tmp_path)
    assert {name for name in names if (ROOT / name).exists()} <= set(copied(code))
    found = "from vfi import shipped; from launch.node import agent, rank; print(shipped.shipped_model())"
    command, environment = [sys.executable, "-c", found], {"PYTHONPATH": str(code)}
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == str(code / "vfi/shipped/small")


def test_examples_keep_data_out_of_the_packages() -> None:
    code = [path for name in snapshot.PACKAGES for path in (ROOT / name).rglob("*.py")]
    texts = [*code, *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    shown = re.compile(r"--[a-z_]+[ =](?:vfi|shards|launch)/(?!shipped|\w+\.py)")
    assert not [f"{path}: {line}" for path in texts for line in path.read_text().splitlines() if shown.search(line)]
    assert "/data/" in (ROOT / ".gitignore").read_text().splitlines()
