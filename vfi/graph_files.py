"""How does a traced network become a file that runs without this project? PyTorch's .pt2, or ONNX.

    run = WRITERS["onnx"](folder, trace(traceable(network)))     # writes folder/model.onnx
    imgt = run(img0, img1, timestep)                             # what the file gives

Both have the inputs img0, img1 `[B, 3, H, W]` and timestep `[B]`, all float32, and the output imgt, with any B, H and W.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vfi.comparison import Run
from vfi.errors import JobError
from vfi.traceable import open_sizes

FILES = {"torch_export": "model.pt2", "onnx": "model.onnx"}
_OPSET = 20  # the first in which GridSample has the modes that warping needs
_TALKATIVE = ("torch._export.serde.serialize", "torch.onnx._internal.exporter._registration")
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
USE = {
    "torch_export": """```python
import torch
run = torch.export.load("model.pt2").module()
imgt = run(img0, img1, timestep)
```
""",
    "onnx": """```python
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
imgt, = session.run(None, {"img0": img0, "img1": img1, "timestep": timestep})
```
""",
}


def refuse_missing(kind: str) -> None:
    """JobError where a package is missing that this kind of file needs."""
    missing = [name for name in _NEEDED if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise JobError(f"--format onnx needs {', '.join(missing)}: pip install -e '.[onnx]'")


def write_torch_export(folder: Path, program: torch.export.ExportedProgram) -> Run:
    """model.pt2, and what it computes once it is read back."""
    path = folder / FILES["torch_export"]
    torch.export.save(program, path)
    with open_sizes(), _quiet():
        run: Run = torch.export.load(path).module()
    return run


def write_onnx(folder: Path, program: torch.export.ExportedProgram) -> Run:
    """model.onnx, and what ONNX Runtime makes of it on a CPU."""
    import onnxruntime

    path = folder / FILES["onnx"]
    with open_sizes(), _quiet():
        converted = torch.onnx.export(
            program, dynamo=True, opset_version=_OPSET, input_names=["img0", "img1", "timestep"], output_names=["imgt"],
            verbose=False,
        )  # fmt: skip
    assert converted is not None  # so it is with dynamo=True
    converted.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(img0: Tensor, img1: Tensor, timestep: Tensor) -> Tensor:
        given = {"img0": img0.numpy(), "img1": img1.numpy(), "timestep": timestep.numpy()}
        return torch.from_numpy(session.run(None, given)[0])

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the packages have to say to each other: what a later version will change, what is not installed."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


WRITERS: dict[str, Callable[[Path, torch.export.ExportedProgram], Run]] = {
    "torch_export": write_torch_export,
    "onnx": write_onnx,
}
