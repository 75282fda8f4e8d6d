"""Validation during training: PSNR on the validation shards, next to the frame average's, and pictures of the first sample."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from vfi.config.configs import ConfigError, DataConfig
from vfi.data.evaluation_loader import evaluation_batches, evenly_spaced
from vfi.data.shard_cache import cache_at, shard_folder
from vfi.data.shared_memory import evaluation_bytes
from vfi.distributed.watchdog import Watchdog
from vfi.metrics.flow_color import flow_picture
from vfi.metrics.image_quality import psnr
from vfi.model.interpolator import MIN_SIZE, FrameInterpolator, Prediction
from vfi.tracking.tracker import Tracker


class Score(NamedTuple):
    """PSNR in dB at a step."""

    step: int
    psnr: float
    average_psnr: float
    """PSNR of the frame average."""

    def __str__(self) -> str:
        step, psnr, average = self
        return f"step {step}: PSNR {psnr:.2f} dB, frame average {average:.2f} dB, {psnr - average:+.2f} dB"


class Validation:
    """The validation shards of a run, checked at once, since a failure later would interrupt training."""

    def __init__(self, config: DataConfig) -> None:
        self.folder = shard_folder(config.val_path, cache_at(config.cache_dir, config.cache_gb))
        self.workers = config.num_workers
        index = self.folder.read_index()
        height, width = index.min_size
        if min(height, width) < MIN_SIZE:
            raise ConfigError(
                f"--val_path {self.folder} has frames as small as {height}x{width}: each side must be at least {MIN_SIZE}"
            )
        next(evaluation_batches(self.folder, torch.device("cpu")))
        self.numbers = evenly_spaced(index.samples, config.val_samples)
        self.shared_bytes = evaluation_bytes(index.max_size, self.workers)
        """Shared memory that the loader processes of a rank take."""

    def run(
        self,
        network: FrameInterpolator,
        accelerator: Accelerator,
        tracker: Tracker,
        watch: Watchdog,
        step: int,
        forward_is_collective: bool,
    ) -> Score | None:
        """Measure `network`, which is left in eval mode, on all processes together, and log the score.

        Returns None on all processes where one was told to stop meanwhile: nothing is measured then. `forward_is_collective`:
        the network is in shards, which only all processes together can use, so each process takes the same number of samples.
        """
        watch.at(f"validation after step {step}")
        sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        network.eval()
        mine = self.numbers[accelerator.process_index :: accelerator.num_processes]
        missing = math.ceil(len(self.numbers) / accelerator.num_processes) - len(mine) if forward_is_collective else 0
        numbers = [*mine, *self.numbers[:missing]]
        batches = evaluation_batches(self.folder, accelerator.device, numbers=numbers, workers=self.workers)
        for number, batch in enumerate(batches):
            stopping = not watch.should_continue()
            if watch.stop(at_once=True) if forward_is_collective else stopping:
                sums[3] = 1
                break
            with torch.no_grad(), accelerator.autocast():
                prediction = network(batch.img0, batch.img1, batch.timestep)
            if number >= len(mine):  # a repeated sample, only to keep in step with the others
                break
            imgt = prediction.imgt.float().clamp(0, 1)
            scores = psnr(imgt, batch.imgt), psnr((batch.img0 + batch.img1) / 2, batch.imgt)
            sums[:3] += torch.stack([score.double().sum() for score in scores] + [sums.new_tensor(len(batch.keys))])
            if number == 0:
                error = (imgt - batch.imgt).abs() * 5
                pictures = {"img0": batch.img0, "prediction": imgt, "truth": batch.imgt, "img1": batch.img1, "error_x5": error}
                tracker.pictures(step, "val", {name: picture[0] for name, picture in pictures.items()})
                if prediction.flow_t0 is not None:
                    tracker.pictures(step, "val_flow", flow_pictures(prediction))
        watch.at(f"the end of validation after step {step}")
        model, average, count, broken_off = accelerator.reduce(sums, reduction="sum").tolist()
        if broken_off:
            return None
        model, average = model / count, average / count
        tracker.log(step, "val", psnr=model, average_psnr=average, gain=model - average, samples=count)
        return Score(step, model, average)


def flow_pictures(prediction: Prediction) -> dict[str, Tensor]:
    """Return both flows of the first sample on one color scale, and the mask."""
    assert prediction.flow_t0 is not None
    assert prediction.flow_t1 is not None
    flows = {"flow_t0": prediction.flow_t0[0], "flow_t1": prediction.flow_t1[0]}
    longest = max(flow.norm(dim=0).max().item() for flow in flows.values())
    mask = prediction.mask_logit[0].sigmoid().expand(3, -1, -1)
    pictures = {name: flow_picture(flow.float().cpu().numpy(), longest) for name, flow in flows.items()}
    return {name: torch.from_numpy(picture).permute(2, 0, 1) / 255 for name, picture in pictures.items()} | {"mask": mask}
