"""Numerical settings of the libraries below: TF32, cuDNN's choice of algorithms, determinism. Set only here.

Defaults: products of fp32 matrices and fp32 convolutions in fp32, so that the fp32 parts of a half-precision network are what
they are called (`--tf32` trades that for speed where training is fp32), and the fastest convolutions by measurement.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from vfi.config.configs import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # for large tensors of a CPU, read by torch when it makes the first: half the page faults
_REPEATABLE = (":4096:8", ":16:8")  # the workspaces under which cuBLAS gives the same sums every time
_COMPLAINT = "does not have a deterministic implementation"  # so torch begins to say which operator it is


def set_numerics(tf32: bool = False, deterministic: bool = False) -> None:
    """Set everything that affects numerical results; to be called before the first product on a GPU.

    Deterministic: the same program on the same kind of machine gives the same bits. Raises ConfigError where the environment
    rules that out; an operator without a deterministic form raises when it is used, see `explain_determinism_errors`.
    """
    if deterministic and os.environ.setdefault(_WORKSPACE, _REPEATABLE[0]) not in _REPEATABLE:
        raise ConfigError(
            f"--deterministic needs {_WORKSPACE} to be one of {', '.join(_REPEATABLE)}, and the environment sets it to "
            f"{os.environ[_WORKSPACE]!r}: unset it"
        )
    os.environ.setdefault(_HUGE_PAGES, "1")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic  # what is fastest by measurement is not the same every time
    torch.backends.cudnn.deterministic = deterministic
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # to set it imports torch's compiler, for seconds
        torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def tf32_convolutions() -> Iterator[None]:
    """Let fp32 convolutions on a GPU round their factors to 10 bits within the context, whatever --tf32 says."""
    former, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = former


def numerics() -> dict[str, bool | str | None]:
    """Return the settings, for environment.json."""
    return {
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cublas_workspace": os.environ.get(_WORKSPACE),
    }


@contextlib.contextmanager
def explain_determinism_errors() -> Iterator[None]:
    """Raise ConfigError in place of torch's RuntimeError where an operator has no deterministic form."""
    try:
        yield
    except RuntimeError as error:
        operator, found, _ = str(error).partition(_COMPLAINT)
        if not found:
            raise
        raise ConfigError(
            f"--deterministic is impossible with these settings on this device: {operator.strip()} has no deterministic form. "
            f"Leave --deterministic out, or train without that operator (--phase 1 has no warps)"
        ) from error
