"""A wheel and a source archive hold every module and every file that modules read, and a model is used from there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("launch", "shards", "vfi")
SHIPPED = "vfi/shipped/small"
SHIPPED_FILES = ("README.md", "config.json", "model.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a package is built from, with a shipped model of a few bytes."""
    root = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "small"))
    model = root / SHIPPED
    model.mkdir()
    sums = []
    for name in SHIPPED_FILES:
        (model / name).write_text(f"in place of {name}")
        sums.append(f"{hashlib.sha256((model / name).read_bytes()).hexdigest()}  {name}\n")
    (model / "SHA256SUMS").write_text("".join(sums))
    return root


def build(source: Path, kind: str) -> Path:
    """The only file that a build of this kind makes, without a network."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist_{kind}')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300)
    (archive,) = (source / f"dist_{kind}").iterdir()
    return archive


def files_of(source: Path) -> set[str]:
    """What a checkout has in its packages."""
    built = [path for package in PACKAGES for path in (source / package).rglob("*") if path.is_file()]
    return {str(path.relative_to(source)) for path in built if "__pycache__" not in path.parts}


def test_a_wheel_holds_all_and_its_model_is_found(source, tmp_path) -> None:
    expected = files_of(source)
    assert {f"{SHIPPED}/{name}" for name in (*SHIPPED_FILES, "SHA256SUMS")} < expected
    with zipfile.ZipFile(build(source, "wheel")) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
        wheel.extractall(tmp_path)
    code = "import vfi.shipped; print(vfi.shipped.shipped_model())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == str(tmp_path / SHIPPED)


def test_a_source_archive_holds_all(source) -> None:
    expected = files_of(source)
    with tarfile.open(build(source, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_an_editable_install_is_found_beside_a_clone(source, tmp_path) -> None:
    """A folder `vfi` without __init__.py, such as a clone of the repository, would be a namespace package of that name."""
    clone, venv = tmp_path / "vfi", tmp_path / "venv"
    shutil.copytree(source, clone)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (packages,) = venv.glob("lib/python*/site-packages")
    with zipfile.ZipFile(build(clone, "editable")) as wheel:
        wheel.extractall(packages)
    needed = [path for path in sys.path if path.endswith("site-packages")]  # without its .pth files
    (packages / "needed.pth").write_text("\n".join(needed))
    code = "from vfi import FrameInterpolator; import launch, shards, vfi; print(*(p.__file__ for p in (vfi, launch, shards)))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [venv / "bin" / "python", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == [str(clone / package / "__init__.py") for package in ("vfi", "launch", "shards")], done.stderr
