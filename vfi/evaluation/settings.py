"""Settings of a benchmark."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from vfi.data.shard_cache import ShardFolder, cache_at, shard_folder
from vfi.errors import JobError
from vfi.evaluation.protocols import ProfileName
from vfi.model.interpolator import MIN_SIZE
from vfi.runtime.device import DeviceName, PrecisionName


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured, on what, and how; each field is a flag of `vfi benchmark`."""

    model: tuple[str, ...]
    """Run folders, checkpoint folders, .safetensors files, `shipped` (the model that comes with the package), or MODULE:FACTORY
    for a model of another repository (see vfi/evaluation/external_models.py); one or more."""
    out: Path
    """Results file to write, a .json; with --protocol all a folder for one file per set."""
    data: str = ""
    """Shard folder to measure on, or its URL: http(s)://, s3://, gs:// …; with --protocol also the set's published folder."""
    device: DeviceName = "auto"
    """auto selects a GPU if there is one."""
    precision: PrecisionName = "auto"
    """auto is bf16 autocast on a GPU that supports it, otherwise fp32. Metrics are always computed in fp32 or better."""
    protocol: str = ""
    """Published benchmark: a name of vfi/evaluation/protocols.py, such as vimeo90k or snu_film_hard, or all."""
    profile: ProfileName = "vfimamba"
    """Repository family whose rules a protocol follows: padding, flow scale, rounding, kind of SSIM."""
    tta: bool = False
    """Test-time augmentation: average with the prediction for the frames rotated by 180 degrees; takes twice the time.
    Published numbers of full-size EMA-VFI and VFIMamba include it."""
    allow_partial: bool = False
    """Accept another number or size of frames than published for a protocol; the results state it."""
    scale: float | None = None
    """Estimate flow at this fraction of the frame size: 1, 0.5 or 0.25; default: each model's own setting, and with --protocol
    that of the protocol."""
    limit: int | None = None
    """Measure only the first samples, up to this number."""
    motion: bool = True
    """Estimate motion (vfi/metrics/motion.py), for PSNR by motion and of moving pixels; takes up to half a second per
    sample."""
    lpips: Path | None = None
    """File of AlexNet's published weights, or its folder (see vfi/metrics/lpips.py); LPIPS is not measured without it."""
    pictures: int = 6
    """Samples that are saved as pictures, spread evenly from the worst to the best gain."""
    workers: int = 2
    """Loader processes, and threads that estimate motion; 0 does everything in the main process."""
    cache_dir: str = ""
    """Folder on a local disk to cache shards behind a URL; default: ~/.cache/vfi/shards."""
    cache_gb: float = 50.0
    """Largest size of that folder in GB (10^9 bytes)."""

    @property
    def folder(self) -> ShardFolder:
        """Return the shard folder that `data` names."""
        return shard_folder(self.data, cache_at(self.cache_dir, self.cache_gb))


def parse_size(size: str) -> tuple[int, int]:
    """Parse 'HxW' -> (height, width); JobError for anything else, and for sides that the network does not support."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match:
        raise JobError(f"--sizes {size!r} is not HEIGHTxWIDTH, such as 736x1280")
    height, width = int(match[1]), int(match[2])
    if min(height, width) < MIN_SIZE:
        raise JobError(f"--sizes {size}: each side must be at least {MIN_SIZE}")
    return height, width
