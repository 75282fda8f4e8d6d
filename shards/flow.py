"""Store optical flow beside the samples of a shard folder, for training that distils it: `vfi train --distill_weight`.

    python -m shards.flow --shards data/vimeo/train --model raft_large --out data/vimeo_flow/train
    python -m shards.flow --shards data/mine --model MODULE:FACTORY --out data/mine_flow --device cpu

Writes a copy of the folder whose samples also hold flow_t0.npy and flow_t1.npy: from the middle frame to the first and to the
last, as (dx, dy, weight), in pixels. The weight is 1 where the flow and the flow back agree, 0 elsewhere: where they cancel up
to 0.01 times the sum of their squared lengths plus 0.5 square pixels (Sundaram, Brox, Keutzer, ECCV 2010), inside of the frame.

raft_large and raft_small are torchvision's (Teed and Deng, arXiv 2003.12039); it downloads their weights once, or --weights
names the file. FACTORY(device) of a module of your own returns a function: frames, frames `[B, 3, H, W]` in [0, 1] -> flow
`[B, 2, H, W]` from the first to the second, in pixels, for FlowFormer++ and others. A killed job resumes with the first
unfinished shard.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards import codecs, writer
from shards.cli import run_job
from shards.factories import call_factory, is_factory
from shards.sample_rules import MemberError, count_problem, decode_meta, open_shard, read_member, samples_in
from shards.schema import Index, ShardEntry, ShardError, frame_members, read_index
from shards.tar_index import TarError
from shards.torch_files import explain_load_error

Estimate = Callable[[Tensor, Tensor], Tensor]
"""frames, frames `[B, 3, H, W]` in [0, 1] -> flow `[B, 2, H, W]` in pixels: frame0(x) = frame1(x + flow)."""
_MODELS = ("raft_large", "raft_small")
_LEAST = 128  # pixels a side: RAFT halves features at an eighth of the size three times
_RELATIVE, _ABSOLUTE = 0.01, 0.5


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `make`; each field is a flag of the command."""

    shards: Path
    """Shard folder to read; samples need an odd number of frames."""
    out: Path
    """Shard folder to write."""
    model: str = "raft_large"
    """raft_large or raft_small of torchvision, or MODULE:FACTORY."""
    weights: Path | None = None
    """File of torchvision's weights of that model; default: torchvision downloads it once."""
    iterations: int = 12
    """Refinements of RAFT."""
    batch_size: int = 8
    """Samples whose flow is estimated at once; each takes four estimates."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto selects a GPU if there is one."""


def make(options: Options) -> Index:
    """Write the folder and return its index.

    Raises ShardError for unusable options and sources, and for an output folder that holds something else.
    """
    index = read_index(options.shards)
    _check(options, index)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    arguments = {"shards": str(options.shards.resolve()), "model": options.model, "device": device.type}
    if not is_factory(options.model):
        arguments |= {"iterations": str(options.iterations), "weights": str(options.weights or "torchvision's")}
    source = writer.source_of("shards.flow", arguments) | {"shards": index.source}
    source["versions"]["torch"] = importlib.metadata.version("torch")
    mark = writer.fingerprint(source | {"content": [entry.sha256 for entry in index.shards]})
    done = writer.check_output(options.out, mark)
    if done is not None:
        print(f"{options.out} is complete already, nothing to do", file=sys.stderr)
        return done
    estimate = _load(options, device)
    tasks = tuple(
        writer.ShardTask(
            f"{options.shards / entry.name}",
            entry.samples,
            functools.partial(_samples, options, index, entry, estimate, device),
        )
        for entry in index.shards
    )
    plan = writer.Plan(index.split, index.codec, index.frames, True, source, index.clips, tasks, index.filtered, index.skipped)
    return writer.write(options.out, plan, mark, workers=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: parse flags, write the folder and print a summary. Returns the exit code."""
    return run_job(Options, _job, "shards.flow", __doc__, argv)


def _job(options: Options) -> int:
    print(writer.describe(options.out, make(options)))
    return 0


def _check(options: Options, index: Index) -> None:
    for name in ("iterations", "batch_size"):
        if getattr(options, name) < 1:
            raise ShardError(f"{name} {getattr(options, name)} is too small: give 1 or more")
    if options.model not in _MODELS and not is_factory(options.model):
        raise ShardError(f"unknown model {options.model!r}: choose {', '.join(_MODELS)}, or MODULE:FACTORY")
    if options.weights and options.model not in _MODELS:
        raise ShardError(f"weights {options.weights} is for {' and '.join(_MODELS)}: {options.model} loads its own")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ShardError("device cuda: no CUDA GPU is usable here; use auto or cpu")
    if index.frames < 3 or index.frames % 2 == 0:
        raise ShardError(f"{options.shards} has {index.frames} frames a sample: flow needs an odd number of 3 or more")
    if options.out.resolve() == options.shards.resolve():
        raise ShardError(f"output {options.out} is the source: give another folder, shards are not changed")


def _load(options: Options, device: torch.device) -> Estimate:
    if is_factory(options.model):
        return call_factory(options.model, "model", device)
    try:
        from torchvision.models import optical_flow
    except ImportError as error:
        raise ShardError(f"{options.model} needs torchvision: pip install -e '.[perceptual]'") from error
    large = options.model == "raft_large"
    weights = optical_flow.Raft_Large_Weights.DEFAULT if large else optical_flow.Raft_Small_Weights.DEFAULT
    network = getattr(optical_flow, options.model)()
    try:
        if options.weights:
            state = torch.load(options.weights, map_location="cpu", weights_only=True)
        else:
            state = weights.get_state_dict(check_hash=True)
        network.load_state_dict(state)
    except (OSError, RuntimeError, ValueError, EOFError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        where = options.weights or weights.url
        raise ShardError(
            f"the weights of {options.model} can't be used: {where}: {explain_load_error(error)}; fetch {weights.url} and "
            f"give the file by --weights"
        ) from error
    return functools.partial(_raft, network.eval().to(device), options.iterations)


def _raft(network: torch.nn.Module, iterations: int, frame0: Tensor, frame1: Tensor) -> Tensor:
    """Estimate flow by RAFT, which takes sides of at least 128 that are multiples of 8: edges are repeated."""
    height, width = frame0.shape[2:]
    down, across = (max(_LEAST, -(-side // 8) * 8) - side for side in (height, width))
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    frames = [F.pad(2 * frame - 1, margins, mode="replicate") for frame in (frame0, frame1)]
    flow: Tensor = network(*frames, num_flow_updates=iterations)[-1]
    return flow[:, :, down // 2 : down // 2 + height, across // 2 : across // 2 + width]


def _samples(
    options: Options, index: Index, entry: ShardEntry, estimate: Estimate, device: torch.device
) -> Iterator[writer.Sample]:
    """Yield the samples of a shard with their flow, in their order."""
    batch: list[writer.Sample] = []
    for sample in _read(options.shards / entry.name, index, entry):
        if batch and (len(batch) == options.batch_size or _size(sample) != _size(batch[0])):
            yield from _with_flow(batch, index, estimate, device)
            batch = []
        batch.append(sample)
    yield from _with_flow(batch, index, estimate, device)


def _read(path: Path, index: Index, entry: ShardEntry) -> Iterator[writer.Sample]:
    """Yield the samples of a tar without their flow."""
    names = frame_members(index.frames, index.codec)
    passed_over: list[str] = []
    count = 0
    try:
        with open_shard(path) as file:
            for sample in samples_in(file, index, entry, passed_over, {"json", *names}):
                count += 1
                contents = {name: read_member(file, sample.members[name], name, index) for name in ("json", *names)}
                yield writer.Sample(sample.key, decode_meta(contents["json"]), tuple(contents[name] for name in names))
    except (TarError, MemberError, OSError, KeyError) as error:
        raise ShardError(f"{path} cannot be read ({error!r}): run `python -m shards.verify {path.parent}`") from error
    if problem := count_problem(count, entry, passed_over):
        raise ShardError(f"{path} {problem}: run `python -m shards.verify {path.parent}`")


def _size(sample: writer.Sample) -> tuple[int, int]:
    return sample.meta.height, sample.meta.width


def _with_flow(
    batch: Sequence[writer.Sample], index: Index, estimate: Estimate, device: torch.device
) -> Iterator[writer.Sample]:
    extension = frame_members(index.frames, index.codec)[0].rpartition(".")[2]
    first, middle, last = (
        torch.stack([_frame(sample.frames[place], extension, sample) for sample in batch]).to(device).float() / 255
        for place in (0, index.frames // 2, index.frames - 1)
    )
    flows = [weighted_flow(estimate, middle, other).permute(0, 2, 3, 1).cpu().numpy() for other in (first, last)]
    for sample, flow_t0, flow_t1 in zip(batch, *flows, strict=True):
        yield dataclasses.replace(sample, flow_t0=flow_t0, flow_t1=flow_t1)


def _frame(data: bytes, extension: str, sample: writer.Sample) -> Tensor:
    frame = codecs.decode(data, extension, name=f"sample {sample.key}", size=_size(sample))
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)


@torch.inference_mode()
def weighted_flow(estimate: Estimate, frame0: Tensor, frame1: Tensor) -> Tensor:
    """Return the flow from `frame0` to `frame1` and its weight, `[B, 3, H, W]` float32: dx, dy, and 0 or 1.

    Raises ShardError where the estimate has another shape or non-finite values.
    """
    there, back = (_checked(estimate(*pair), frame0) for pair in ((frame0, frame1), (frame1, frame0)))
    height, width = frame0.shape[2:]
    rows, columns = (torch.arange(side, device=there.device, dtype=torch.float32) for side in (height, width))
    x, y = columns + there[:, 0], rows.unsqueeze(1) + there[:, 1]
    grid = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=3)
    returned = F.grid_sample(back, grid, mode="bilinear", padding_mode="border", align_corners=True)
    length = there.square().sum(1) + returned.square().sum(1)
    agrees = (there + returned).square().sum(1) <= _RELATIVE * length + _ABSOLUTE
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return torch.cat((there, (agrees & inside).unsqueeze(1).float()), dim=1)


def _checked(flow: Any, frame: Tensor) -> Tensor:
    expected = (frame.shape[0], 2, *frame.shape[2:])
    if not isinstance(flow, Tensor) or flow.shape != expected:
        given = tuple(flow.shape) if isinstance(flow, Tensor) else type(flow).__name__
        raise ShardError(f"the model gave {given} for frames {tuple(frame.shape)}; expected a tensor {expected}")
    if not flow.isfinite().all():
        raise ShardError("the model gave flow with values that are not finite")
    return flow.float()


if __name__ == "__main__":
    sys.exit(main())
