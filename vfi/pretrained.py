"""Python interface to trained models: load one, pass two frames, get frames back.

    from vfi import FrameInterpolator
    model = FrameInterpolator.from_pretrained()                         # the model that comes with the package
    model = FrameInterpolator.from_pretrained("runs/first")             # or a saved folder, or ORG/NAME on the hub
    middle = model(img0, img1)                                          # arrays [H, W, 3] or tensors [3, H, W], or batches
    quarters = model(img0, img1, timestep=[0.25, 0.5, 0.75])            # a list of three; features are computed once
    model.save_pretrained("first", licence="cc-by-4.0")                 # a folder that can be uploaded to the hub unchanged

Outputs have the container, dtype and device of the inputs. The network itself is `model.network`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast, get_args, overload

import numpy as np
import torch
from torch import Tensor

from vfi.checkpoint import pretrained_folder
from vfi.config.configs import SCALES
from vfi.errors import JobError
from vfi.inference.array_io import Frames, read_pair
from vfi.inference.loading import LoadedModel, load
from vfi.model.interpolator import FrameInterpolator as Network
from vfi.release.model_card import card
from vfi.runtime.device import DeviceName, PrecisionName, describe_precision, pick_device, pick_precision
from vfi.shipped import SHIPPED

Times = Sequence[float] | np.ndarray | Tensor


class FrameInterpolator:
    """A trained model on a device, for inference. Created by `from_pretrained`."""

    def __init__(self, loaded: LoadedModel, device: torch.device, precision: torch.dtype) -> None:
        self._loaded, self.device, self._precision = loaded, device, precision

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = SHIPPED,
        *,
        revision: str | None = None,
        device: DeviceName = "auto",
        precision: PrecisionName = "auto",
    ) -> Self:
        """Load a saved folder, a run, a checkpoint or, as ORG/NAME, a model of the Hugging Face hub.

        By default it is the model that comes with the package, which a note on stderr describes. `revision`: branch, tag or
        commit on the hub. `device`: auto (the GPU if there is one), cpu or cuda. `precision`: auto (bf16 on a GPU that supports
        it, else fp32), fp32, bf16 or fp16. Nothing that is read can execute code.

        Raises CheckpointError for a model that can't be found or used, JobError for a device that does not exist.
        """
        check_choice("device", device, get_args(DeviceName))
        check_choice("precision", precision, get_args(PrecisionName))
        place = pick_device(device)
        return cls(load(path, place, revision), place, pick_precision(precision, place))

    @overload
    def __call__(self, img0: Frames, img1: Frames, timestep: float = ..., *, scale: float | None = ...) -> Frames: ...

    @overload
    def __call__(self, img0: Frames, img1: Frames, timestep: Times, *, scale: float | None = ...) -> list[Frames]: ...

    def __call__(self, img0: Any, img1: Any, timestep: float | Times = 0.5, *, scale: float | None = None) -> Any:
        """Return the frame at `timestep` between two frames, or a list of frames at several timesteps, each like `img0`.

        Frames are arrays [H, W, 3] or tensors [3, H, W], or batches of them (vfi/inference/array_io.py has types and ranges).
        Timesteps lie above 0 (img0) and below 1 (img1). `scale`: flow is estimated at this fraction of the frame size, 0.5 for
        2K, 0.25 for 4K; by default as trained. Raises JobError, which says what is wrong, allowed and to be done.
        """
        times = _times(timestep)
        self._check_scale(scale)
        first, last, kind = read_pair(img0, img1, self.device)
        asked = torch.tensor(times, device=self.device)
        made = self._loaded.predict_several(first, last, asked, self._precision, scale)
        frames = [kind.to_output(one) for one in made.split(first.shape[0])]
        return frames if _is_several(timestep) else frames[0]

    def save_pretrained(self, path: str | Path, *, licence: str = "", results: Sequence[str | Path] = ()) -> None:
        """Write a folder that `from_pretrained` reads, here or on the hub: weights, settings and a card.

        `licence`: that of the weights, such as cc-by-4.0. `results`: files of `vfi benchmark` for the card. Raises JobError
        where `path` is neither new nor an empty folder, or a results file has no row of this model.
        """
        about = card(self._loaded, licence, [Path(file) for file in results])
        with pretrained_folder.new_folder(Path(path)) as folder:
            described = pretrained_folder.write_model(folder, self.network, about.origin)
            (folder / pretrained_folder.CARD).write_text(about.text(described), encoding="utf-8")

    @property
    def network(self) -> Network:
        """Return the torch module, in eval mode: img0, img1, timestep `[B]` -> Prediction."""
        return cast(Network, self._loaded.model)

    def __repr__(self) -> str:
        size = f"{self._loaded.parameters / 1e6:.1f} M parameters"
        return (
            f"FrameInterpolator({str(self._loaded.path)!r}, step {self._loaded.step}, {size}, {self.device.type}, "
            f"{describe_precision(self._precision)})"
        )

    def _check_scale(self, scale: float | None) -> None:
        if scale is not None and scale not in SCALES:
            raise JobError(f"scale is {scale}; choose from {', '.join(map(str, SCALES))}")
        if scale not in (None, 1.0) and not self._loaded.has_flow:
            raise JobError(f"scale is {scale}, but {self._loaded.path} is of phase 1, without flow: leave it out")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise JobError for an argument that is none of those allowed."""
    if value not in allowed:
        raise JobError(f"{name} is {value!r}; choose from {', '.join(allowed)}")


def _is_several(timestep: object) -> bool:
    """Return whether `timestep` is a sequence, of any length; arrays and tensors without dimensions are a single timestep."""
    if isinstance(timestep, np.ndarray | Tensor):
        return timestep.ndim > 0
    return isinstance(timestep, Sequence) and not isinstance(timestep, str)


def _times(timestep: Any) -> list[float]:
    """Return all given timesteps, checked."""
    given = list(timestep) if _is_several(timestep) else [timestep]
    found = [one.item() if isinstance(one, np.ndarray | np.generic | Tensor) and one.ndim == 0 else one for one in given]
    if not found:
        raise JobError("timestep is an empty list: give one number between 0 and 1, or several")
    for one in found:
        if not isinstance(one, int | float) or isinstance(one, bool) or not 0 < one < 1:
            raise JobError(
                f"timestep is {one!r}; it must be a number above 0 (img0) and below 1 (img1), or a list of such numbers"
            )
    return [float(one) for one in found]
