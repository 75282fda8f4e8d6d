"""Versions where the project is installed, and where it only lies on PYTHONPATH."""

from __future__ import annotations

from importlib import metadata

import numpy
import pytest

from vfi.checkpoint import pretrained_folder
from vfi.config import presets
from vfi.runtime import versions
from vfi.tracking import environment


def test_installed_packages_have_the_version_that_they_state():
    assert versions.package_version("numpy") == numpy.__version__
    assert versions.package_version("no-such-package") is None
    assert versions.project_version() == metadata.version("vfi-training-stack")


@pytest.fixture
def not_installed(monkeypatch):
    """A checkout on PYTHONPATH: other packages have metadata, the project has none."""
    version = metadata.version

    def without_project(package):
        if package == versions.PROJECT:
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_project)


def test_a_checkout_that_is_not_installed_says_unknown(not_installed):
    assert versions.project_version() == "unknown"
    assert pretrained_folder.this_version() == "vfi-training-stack unknown"
    assert environment.versions()["project"] == "unknown"
    origin = pretrained_folder.Origin("run", "tiny", 1, averaged=False)
    description = pretrained_folder.describe(presets.tiny().model, origin, "fp16")
    assert description.written_by == "vfi-training-stack unknown"
