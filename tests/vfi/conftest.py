"""Fixtures: logged messages, a browser for pages, and for Triton kernels an interpreter and GPUs to compile for."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from interpreted import in_an_interpreter

from vfi.runtime.logging import logger

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path("/usr/bin/chromium")
INSTALL = Path(__file__).parents[1] / "apt_install.sh"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """The messages that the project logs, as a list that grows."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


@pytest.fixture(scope="module")  # and not longer: Playwright keeps an event loop running, which other tests can't have
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright  # other tests here must do without it

    if not CHROMIUM.exists():
        _install_chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


def _install_chromium() -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"{CHROMIUM} is not there, and only root can install it, with apt-get")
    try:
        subprocess.run(["bash", str(INSTALL), "chromium"], capture_output=True, text=True, check=True, timeout=450)
    except (OSError, subprocess.SubprocessError) as error:
        said = [error, *(getattr(error, "stderr", None) or "").splitlines()]
        pytest.skip(f"{CHROMIUM} can't be installed here: {said[-1]}")


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which nobody has imported Triton yet, which decides at its import whether kernels are interpreted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), in_an_interpreter) as pool:
        yield pool


@pytest.fixture
def compile_for(monkeypatch, tmp_path) -> Callable[[int], Path]:
    """Let Triton compile for a GPU of an architecture, such as 90, that is not there: gives Triton's cache."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from vfi.ops.triton.precompile import Answers

    def choose(architecture: int) -> Path:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(driver, "_active", Answers(architecture, GPUTarget("cuda", architecture, 32)))
        return tmp_path

    return choose
