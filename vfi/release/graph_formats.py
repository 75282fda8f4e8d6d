"""Export of a traced network to files that run without this project: PyTorch's .pt2, and ONNX.

    run = WRITERS["onnx"](folder, trace(traceable(network)))     # writes folder/model.onnx; vfi.release.traceable
    imgt = run(img0, img1, timestep)                             # computed by the file that was written

Both have the inputs img0, img1 `[B, 3, H, W]` and timestep `[B]`, all float32, and the output imgt, for any B, H and W.
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

from shards.synthetic_scene import scene
from vfi.errors import JobError
from vfi.release.model_card import Difference
from vfi.release.traceable import open_sizes

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
CASES = ((1, 64, 96), (2, 75, 113), (1, 32, 200), (1, 288, 512))
"""Batch, height and width: odd sides, the smallest side, and more tokens at stride 8 than a chunk of chunks has (4096)."""
_MAX_MOTION = 12.0
FILES = {"torch_export": "model.pt2", "onnx": "model.onnx"}
_OPSET = 20  # the first version whose GridSample has the modes that warping needs
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
    """Raise JobError where a package is missing that this format needs."""
    missing = [name for name in _NEEDED if kind == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise JobError(f"--format onnx needs {', '.join(missing)}: pip install -e '.[onnx]'")


def write_torch_export(folder: Path, program: torch.export.ExportedProgram) -> Run:
    """Write model.pt2, and return a function that runs the file."""
    path = folder / FILES["torch_export"]
    torch.export.save(program, path)
    with open_sizes(), _quiet():
        run: Run = torch.export.load(path).module()
    return run


def write_onnx(folder: Path, program: torch.export.ExportedProgram) -> Run:
    """Write model.onnx, and return a function that runs the file in ONNX Runtime on a CPU."""
    import onnxruntime

    path = folder / FILES["onnx"]
    with open_sizes(), _quiet():
        converted = torch.onnx.export(
            program, dynamo=True, opset_version=_OPSET, input_names=["img0", "img1", "timestep"], output_names=["imgt"],
            verbose=False,
        )  # fmt: skip
    assert converted is not None  # always set with dynamo=True
    converted.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(img0: Tensor, img1: Tensor, timestep: Tensor) -> Tensor:
        given = {"img0": img0.numpy(), "img1": img1.numpy(), "timestep": timestep.numpy()}
        return torch.from_numpy(session.run(None, given)[0])

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages that concern the packages alone: future deprecations and optional packages that are not installed."""
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


def compare(original: Run, exported: Run) -> Iterator[Difference]:
    """Compare two functions `(img0, img1, timestep) -> imgt` on the same frames, on a CPU, for each of CASES."""
    for batch, height, width in CASES:
        img0, img1 = moving_photographs(batch, height, width)
        timestep = torch.linspace(0.25, 0.5, batch)
        with torch.no_grad():
            away = (original(img0, img1, timestep) - exported(img0, img1, timestep)).abs()
        yield Difference(f"{batch} of {width}x{height}", away.max().item(), away.mean().item())


def moving_photographs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return first and last frame of synthetic scenes, [batch, 3, height, width] each."""
    scenes = [scene(0, "val", number, height, width, _MAX_MOTION) for number in range(batch)]
    img0, img1 = (torch.stack([torch.from_numpy(one.render(t)) for one in scenes]) for t in (0.0, 1.0))
    return img0.permute(0, 3, 1, 2) / 255, img1.permute(0, 3, 1, 2) / 255
