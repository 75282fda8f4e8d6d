"""Load trained models and run them outside of training: device, precision, weights, and one call from two frames to one.

device = pick_device("auto")                       # vfi.runtime.device
loaded = load("runs/tiny_phase1", device)
imgt = loaded.predict(img0, img1, timestep, pick_precision("auto", device))
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from vfi.checkpoint.pretrained_folder import Origin, data_name, fetch, is_hub_id, is_model_folder, read_model
from vfi.checkpoint.store import EMA, MODEL, find, read_step
from vfi.checkpoint.weights import best_weights, load_model
from vfi.config.configs import SCALES, Config, RunConfig
from vfi.errors import CheckpointError, JobError
from vfi.model.interpolator import FrameInterpolator, Prediction
from vfi.ops.triton.precompile import compiling_ahead
from vfi.runtime.cuda_graphs import Graphs
from vfi.runtime.device import autocast_to
from vfi.runtime.logging import logger
from vfi.shipped import SHIPPED, is_shipped, shipped_model


class Fp16OverflowError(JobError):
    """Raised for frames whose prediction needs values that fp16 can't hold."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and its origin: `path` as it was given, the run's folder (or that of the saved model), the step of
    the checkpoint.
    """

    model: nn.Module
    config: Config
    name: str
    path: Path
    run_folder: Path
    step: int
    origin: Origin
    graphs: Graphs = dataclasses.field(default_factory=Graphs, repr=False, compare=False)

    def predict(
        self, img0: Tensor, img1: Tensor, timestep: Tensor, precision: torch.dtype, scale: float | None = None
    ) -> Tensor:
        """Call `predict`, through CUDA graphs where that is faster."""
        return predict(self.model, img0, img1, timestep, precision, scale, self.graphs)

    def predict_several(
        self, img0: Tensor, img1: Tensor, timesteps: Tensor, precision: torch.dtype, scale: float | None = None
    ) -> Tensor:
        """Return the frames of B pairs `[B, 3, H, W]` at N timesteps `[N]` as `[N * B, 3, H, W]`, grouped by timestep.

        Each frame is what `predict` returns, but features are computed once for all timesteps; through CUDA graphs where that
        is faster.
        """
        network = cast(FrameInterpolator, self.model)

        def forward(img0: Tensor, img1: Tensor, timesteps: Tensor) -> Tensor:
            with autocast_to(img0.device, precision):
                encoded = network.encode(img0, img1, scale)
                times = (one.expand(img0.shape[0]) for one in timesteps.split(1))
                return torch.cat([_frame(network.decode(encoded, time), precision) for time in times])

        with torch.inference_mode():
            return _checked(self.graphs(forward, img0, img1, timesteps, kind=("several", precision, scale)), precision)

    def compile_ahead(self, predict: Callable[[], object]) -> None:
        """Compile the fused Triton kernels that `predict` needs in parallel; does nothing where the network has none.

        `predict` is called to find these kernels; its output is meaningless.
        """
        if cast(FrameInterpolator, self.model).all_fused:
            with compiling_ahead(next(self.model.parameters()).device), contextlib.suppress(Fp16OverflowError):
                predict()

    def flow(self, img0: Tensor, img1: Tensor, timestep: Tensor, precision: torch.dtype, scale: float | None = None) -> Tensor:
        """Return the flow from the timestep to the first frame, `[B, 2, H, W]` in pixels, for a model that has flow."""
        with torch.inference_mode(), autocast_to(img0.device, precision):
            flow: Tensor = self.model(img0, img1, timestep, scale=scale).flow_t0
        return flow

    @property
    def has_flow(self) -> bool:
        """Return whether the model warps pixels instead of only blending them."""
        return self.config.model.phase > 1

    @property
    def parameters(self) -> int:
        """Return the number of trained values."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fingerprint(self) -> str:
        """Return the sha256 of all weights with their names."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def predict(
    model: nn.Module,
    img0: Tensor,
    img1: Tensor,
    timestep: Tensor,
    precision: torch.dtype,
    scale: float | None = None,
    graphs: Graphs | None = None,
) -> Tensor:
    """Predict the frame at `timestep`: two `[B, 3, H, W]` in [0, 1] and `[B]` -> `[B, 3, H, W]` in float32, clamped to [0, 1].

    `scale`: flow is estimated at this fraction of the frame size; None for the model's own setting. `graphs`: the CUDA graphs
    of this model.
    """

    def forward(img0: Tensor, img1: Tensor, timestep: Tensor) -> Tensor:
        with autocast_to(img0.device, precision):
            return _frame(model(img0, img1, timestep, scale=scale), precision)

    with torch.inference_mode():
        inputs = img0, img1, timestep
        imgt = forward(*inputs) if graphs is None else graphs(forward, *inputs, kind=(precision, scale))
        return _checked(imgt, precision)


def _frame(prediction: Prediction, precision: torch.dtype) -> Tensor:
    """Return the frame of a prediction, `[B, 3, H, W]` in [0, 1]: all NaN where fp16 overflowed in the frame or its parts."""
    imgt = prediction.imgt.float()
    if precision == torch.float16:
        parts = (imgt, prediction.mask_logit, prediction.residual, prediction.flow_t0, prediction.flow_t1)
        is_finite = torch.stack([part.isfinite().all() for part in parts if part is not None]).all()
        imgt = torch.where(is_finite, imgt, torch.nan)  # infinity would become a colour when it is clamped
    return imgt.clamp(0, 1)


def _checked(frames: Tensor, precision: torch.dtype) -> Tensor:
    """Return the frames; Fp16OverflowError where that overflowed, for which it waits for the device."""
    if precision == torch.float16 and frames.isnan().any():
        raise Fp16OverflowError("this model and these frames need values above fp16's largest, 65,504: use --precision fp32")
    return frames


def check_scale(scale: float | None, models: Iterable[LoadedModel]) -> None:
    """Raise JobError for a --scale that a model does not support."""
    if scale is not None and scale not in SCALES:
        raise JobError(f"--scale {scale}: choose from {', '.join(map(str, SCALES))}")
    for model in models:
        if scale not in (None, 1.0) and not model.has_flow:
            raise JobError(f"--scale {scale}: {model.path} is of phase 1, without flow: leave it out")


def load(path: str | Path, device: torch.device, revision: str | None = None) -> LoadedModel:
    """Load weights onto `device`, in eval mode: EMA weights where there are some, unless a file is named.

    `path` is a run (its newest checkpoint is loaded), a checkpoint folder, a weights file, a folder of `vfi export`, a model on
    the hub (ORG/NAME, at `revision`), or `shipped`, which names the model that comes with the package; a note on stderr says
    which one that is.

    Raises CheckpointError for unusable weights and for a path that leads to none; it then names the runs next to the path.
    """
    from_hub = is_hub_id(path)
    if revision is not None and not from_hub:
        raise CheckpointError(f"revision {revision!r} is for a model on the hub (ORG/NAME), and {path} is here: leave it out")
    if is_shipped(path):
        return _load_shipped(device)
    path = Path(path)
    folder = path.parent if path.name == MODEL and path.is_file() else path
    if from_hub or is_model_folder(folder):
        folder = fetch(str(path), revision) if from_hub else folder
        return _load_folder(folder, path, str(path) if from_hub else folder.resolve().name, device)
    checkpoint = find(path, path.parent) if path.parent.name else find(path)
    model, config = load_model(checkpoint / path.name if path.suffix == ".safetensors" else checkpoint, device)
    run_folder = checkpoint.parent.parent
    taken = path.name if path.suffix == ".safetensors" else best_weights(checkpoint)
    name, step = run_folder.resolve().name, read_step(checkpoint)
    trained_on = tuple(map(data_name, config.data.data_path))
    origin = Origin(name, config.run.preset, step, taken == EMA, trained_on)
    return LoadedModel(model, config, name, path, run_folder, step, origin)


def _load_folder(folder: Path, path: Path, name: str, device: torch.device) -> LoadedModel:
    """Return the model of a folder of `vfi export`, which was given as `path`."""
    network, described = read_model(folder, device)
    config = Config(run=RunConfig(preset=described.origin.preset), model=described.model)
    return LoadedModel(network, config, name, path, folder, described.origin.step, described.origin)


def _load_shipped(device: torch.device) -> LoadedModel:
    """Return the model that comes with the package, and describe it on stderr."""
    folder = shipped_model()
    loaded = _load_folder(folder, Path(SHIPPED), f"{SHIPPED}-{folder.name}", device)
    origin, phase = loaded.origin, loaded.config.model.phase
    size = f"{loaded.parameters / 1e6:.1f} M parameters, {(folder / MODEL).stat().st_size / 1e6:.1f} MB"
    shown, more = origin.trained_on[:3], len(origin.trained_on[3:])
    data = ", ".join(shown + ((f"{more} more",) if more else ())) or "data that it does not name"
    logger.warning(
        f"the shipped model is used: {folder.name}, phase {phase} ({size}), licence {origin.licence or 'unknown'}, trained on "
        f"{data}; to use a model of yours, name it, such as runs/NAME"
    )
    return loaded
