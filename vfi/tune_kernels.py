"""Tune the launch configurations of all Triton kernels for this GPU, and store the fastest.

    vfi tune-kernels                                   base, small and tiny; adds this GPU to vfi/ops/triton/tuned_kernels.json
    vfi tune-kernels --presets base --batch_size 32 --precisions bf16 --out mine.json

Without it, this project's fused Triton kernels (vfi/profiling/kernel_search.py) use what was fastest on an H100; those of
mamba-ssm, if it is installed, are tuned by Triton in the first step, each time that a command starts on a machine without
Triton's cache. Commit the file: others with the same GPU and the same minor version of Triton then need not tune again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from shards.cli import parse_flags
from vfi.config import presets
from vfi.config.configs import Config
from vfi.errors import JobError, clear_errors
from vfi.io.dataclass_json import write_text
from vfi.ops.ssm.ssd import import_kernel, kernel_obstacle
from vfi.ops.triton import launch_config, tuned_configs
from vfi.ops.triton.availability import why_unavailable
from vfi.profiling.kernel_search import Found, as_entries, search_step
from vfi.runtime.memory import free_memory
from vfi.tracking.environment import environment
from vfi.training.synthetic_step import PRECISIONS, TrainingStep

_SHOWN = ("torch", "triton", "mamba-ssm")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi tune-kernels`; each field is a flag."""

    presets: tuple[str, ...] = ("base", "small", "tiny")
    """Presets or ablations whose kernels are tuned, by a training step of phase 2 or 3 in each precision. Shared kernels are
    tuned with the first of them: name the largest first.
    """
    precisions: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    """Precisions of the forward pass; each takes minutes."""
    batch_size: int = 8
    """Pairs of frames per step, preferably that of training; configurations do not depend on it."""
    crop: int = 256
    """Side of the square frames in pixels."""
    out: Path = tuned_configs.FILE
    """File to which the GPU is added. Its entries for kernels that are not tuned now are kept."""


@clear_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: tune, report the results, and write them."""
    options = parse_flags(Options, "vfi tune-kernels", __doc__, argv)
    for line in tune(options):
        print(line, flush=True)


def tune(options: Options) -> Iterator[str]:
    """Tune and write, and yield a line for each fused kernel and each preset.

    Raises JobError without a GPU that has kernels to be tuned.
    """
    if not torch.cuda.is_available():
        raise JobError("there is no CUDA GPU here: kernels are tuned on the card that they run on")
    device = torch.device("cuda", torch.cuda.current_device())
    ours, theirs = why_unavailable(device), kernel_obstacle(device)
    if ours and theirs:
        raise JobError(f"there is nothing to be tuned: {ours}; {theirs}")
    packages = environment(device)["packages"]
    content: dict[str, Any] = {"device": torch.cuda.get_device_name(device)}
    content |= {name: packages[name] for name in _SHOWN if name in packages}
    found: list[Found] = []
    kernels: tuned_configs.Kernels = {}
    earlier = tuned_configs.entry(device, options.out, "fused") if options.out.exists() else {}
    if not theirs:
        # read when the kernels are imported: disables the lookup of earlier results
        os.environ["TRITON_CACHE_AUTOTUNING"] = "0"
        import_kernel()
    for preset in options.presets:
        config = presets.get(preset)
        phase = max(2, config.model.phase)  # so that optical flow is included
        config = presets.override(config, phase=phase, batch_size=options.batch_size, crop=options.crop)
        for precision in (PRECISIONS[name] for name in options.precisions):
            if not ours:
                for one in search_step(TrainingStep(config, device, precision), {one.key for one in found}):
                    found.append(one)
                    content["fused"] = with_earlier(found, earlier)
                    write(options.out, tuned_configs.card(device), content)  # each time, so an interrupted run keeps results
                    yield str(one)
                free_memory()
            if not theirs:
                kernels = merge(kernels, _tune_mamba_ssm(config, device, precision))
                content["kernels"] = kernels
                write(options.out, tuned_configs.card(device), content)
        faster = sum(one.options != one.default for one in found)
        yield (
            f"{preset}: so far {faster} of {len(found)} configurations of the fused Triton kernels are changed, and "
            f"{sum(map(len, kernels.values()))} of {len(kernels)} kernels of mamba-ssm are known"
        )
    yield f"added to {options.out}: {tuned_configs.card(device)}"


def _tune_mamba_ssm(config: Config, device: torch.device, precision: torch.dtype) -> tuned_configs.Kernels:
    """Tune mamba-ssm's kernels by a training step, in which Triton tunes them."""
    step = TrainingStep(presets.override(config, ssd_backend="mamba_ssm"), device, precision)
    for tuner in tuned_configs.tuners():
        tuner.cache.clear()
    step(step.make_frames())
    del step
    free_memory()
    return tuned_configs.found(tuned_configs.tuners())


def merge(known: tuned_configs.Kernels, new: tuned_configs.Kernels) -> tuned_configs.Kernels:
    """Return both; an earlier result takes precedence."""
    merged = {}
    for name in sorted({**known, **new}):
        entries = [*known.get(name, ()), *new.get(name, ())]
        first = {json.dumps(one["key"]): one for one in reversed(entries)}
        merged[name] = [first[key] for key in sorted(first)]
    return merged


def with_earlier(found: Sequence[Found], earlier: tuned_configs.Kernels) -> tuned_configs.Kernels:
    """Return the new results, and the earlier ones of shape classes that were not searched."""
    searched = [(one.kernel, launch_config.written(one.shape_class)) for one in found]
    rest = {name: [one for one in entries if (name, one["key"]) not in searched] for name, entries in earlier.items()}
    return merge(as_entries(found), {name: entries for name, entries in rest.items() if entries})


def write(path: Path, card: str, content: dict[str, Any]) -> None:
    """Store a GPU's entry in the file, replacing its previous one; kernels of a kind that `content` lacks are kept."""
    cards = json.loads(path.read_text()) if path.exists() else {}
    entry = cards.get(card, {}) | content
    cards[card] = entry | {whose: entry.get(whose, {}) for whose in ("kernels", "fused")}
    write_text(path, json.dumps(dict(sorted(cards.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
