"""Options of a benchmark."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from vfi.data.shard_cache import ShardFolder, cache_at, shard_folder
from vfi.errors import JobError
from vfi.evaluation.protocols import ProfileName
from vfi.model.interpolator import MIN_SIZE
from vfi.runtime.device import DeviceName, PrecisionName

ALL, SPEED = "all", "--speed"


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the job."""

    model: tuple[str, ...]
    """Run folders, checkpoint folders, .safetensors files, `shipped` (the model that comes with the package), or MODULE:FACTORY
    for a model of another repository (see vfi/evaluation/external_models.py); one or more."""
    out: Path
    """Results file to write, a .json; with --protocol all a folder for one of each set."""
    data: str = ""
    """Shard folder to measure on, or its URL: http(s)://, s3://, gs:// …; with --protocol also the set's published folder."""
    device: DeviceName = "auto"
    """auto takes a GPU if there is one."""
    precision: PrecisionName = "auto"
    """auto is bf16 autocast on a GPU that has it, fp32 on the CPU. Metrics are fp32 at least, always."""
    protocol: str = ""
    """Published benchmark: a name of vfi/evaluation/protocols.py, such as vimeo90k or snu_film_hard, or all."""
    data_root: Path | None = None
    """Folder with the sets of --protocol all: published folders, or shards, up to two levels below it."""
    profile: ProfileName = "vfimamba"
    """Whose way of measuring it: padding, flow scale, rounding, kind of SSIM."""
    tta: bool = False
    """Take the mean with the prediction of the frames turned by 180 degrees; twice the time. Published numbers of full-size
    EMA-VFI and VFIMamba are with it."""
    allow_partial: bool = False
    """Measure a protocol on another number or size of frames than published; the results say so."""
    scale: float | None = None
    """Flow is estimated at this fraction of the frames' size: 1, 0.5 or 0.25; by default each model's own setting, and with
    --protocol what that says."""
    limit: int | None = None
    """Only the first this many samples."""
    motion: bool = True
    """Estimate how far things move (vfi/metrics/motion.py), for PSNR by motion and of what moves; up to half a second a
    sample."""
    lpips: Path | None = None
    """Folder with the two published files of LPIPS' weights (see vfi/metrics/lpips.py); without it LPIPS is not measured."""
    pictures: int = 6
    """Samples that are kept as pictures, spread evenly from the worst to the best gain."""
    workers: int = 2
    """Loader processes, and threads that estimate motion; 0 does all in this one."""
    cache_dir: str = ""
    """Folder in which shards behind a URL are kept, on a local disk; default: ~/.cache/vfi/shards."""
    cache_gb: float = 50.0
    """Largest size of that folder in GB (10^9 bytes)."""

    @property
    def folder(self) -> ShardFolder:
        """What `data` names."""
        return shard_folder(self.data, cache_at(self.cache_dir, self.cache_gb))


def parse_size(size: str) -> tuple[int, int]:
    """'HxW' -> (height, width); JobError for anything else, and for sides that the network can't take."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match:
        raise JobError(f"--sizes {size!r} is not HEIGHTxWIDTH, such as 736x1280")
    height, width = int(match[1]), int(match[2])
    if min(height, width) < MIN_SIZE:
        raise JobError(f"--sizes {size}: each side must be at least {MIN_SIZE}")
    return height, width
