"""Versions of installed packages and of the project, also where it runs from a checkout that was not installed."""

from __future__ import annotations

from importlib import metadata

PROJECT = "vfi-training-stack"


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None where no package of that name is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def project_version() -> str:
    """Return the project's version, or "unknown": a checkout on PYTHONPATH has no metadata."""
    return package_version(PROJECT) or "unknown"
