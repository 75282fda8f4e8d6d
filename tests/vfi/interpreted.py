"""How a process begins in which Triton kernels are interpreted: by a name of its own, for there are two files `conftest`."""

from __future__ import annotations

import os

import torch


def in_an_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
