"""Environment of a process in which Triton kernels are interpreted; a separate name, because there are two files `conftest`."""

from __future__ import annotations

import os

import torch


def in_an_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
