"""Export a trained model to a folder with weights (or a graph), settings and a card.

    vfi export runs/first --out first --licence cc-by-4.0 --results results.json --sources sources.csv
    vfi export runs/first --out first_fp16 --dtype fp16           half the bytes; loaded back into fp32 parameters
    vfi export runs/first --out first_onnx --format onnx          a graph that runs without this project, at any size

`vfi interpolate --model first`, `vfi benchmark --model first` and FrameInterpolator.from_pretrained("first") accept a folder of
weights; uploaded to the Hugging Face hub unchanged, it is loaded by its ORG/NAME. The exported model is read back and compared
with the original on moving photographs; the card states the differences. The folder gets its name when it is complete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
import tyro

from shards.cli import parse_flags
from shards.schema import ShardError
from vfi.checkpoint import pretrained_folder
from vfi.checkpoint.pretrained_folder import CARD, Description, Dtype, describe
from vfi.checkpoint.store import newest_run
from vfi.errors import CheckpointError, JobError, clear_errors
from vfi.evaluation.results import ResultError
from vfi.inference.loading import load, predict
from vfi.io.writer_lock import writer_lock
from vfi.model.interpolator import MIN_SIZE, FrameInterpolator
from vfi.release.graph_formats import FILES, USE, WRITERS, Run, compare, refuse_missing
from vfi.release.model_card import Card, Difference, card, describe_training, use_graph
from vfi.release.traceable import trace, traceable

Format = Literal["torch", "torch_export", "onnx"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `vfi export`; each field is a command-line flag."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to create; it must not exist yet, or be empty."""
    model: tyro.conf.Positional[str] = ""
    """Run folder (its newest checkpoint), checkpoint folder, weights file, a folder made by `vfi export`, ORG/NAME on the hub,
    or `shipped`; default: the run in ./runs that was trained last. EMA weights where there are some, unless a file is named."""
    format: Format = "torch"
    """torch: weights for this project; torch_export: PyTorch's .pt2; onnx: ONNX. The last two are a graph in fp32 for any
    batch, height and width."""
    dtype: Dtype = "fp32"
    """Type in which the weights are stored; fp16 halves the size, at the cost of some rounding."""
    licence: str = ""
    """Licence of the weights, such as cc-by-4.0, for the card; without it the card says that the licence is unknown."""
    results: tuple[Path, ...] = ()
    """Results files of `vfi benchmark` with this model, for the card."""
    trained_on: tuple[str, ...] = ()
    """Names of the data sets, for the card; default: the last part of the run's --data_path."""
    sources: Path | None = None
    """CSV file with the columns name, source, licence and what: a line for each source of training data, for the card."""
    recipe: str = ""
    """How the model was trained, such as the commands and the hardware; the card quotes it unchanged."""
    hours: float | None = None
    """Duration of training in hours, for the card."""


@clear_errors(CheckpointError, ResultError, ShardError)
def main(argv: Sequence[str] | None = None) -> None:
    """Check the options, write the folder, read it back, compare it with the original, and print the differences."""
    options = parse_flags(Options, "vfi export", __doc__, argv)
    for line in export(options):
        print(line)


def export(options: Options) -> Iterator[str]:
    """Create the folder; yield a line for each comparison, and one about the whole.

    Raises JobError, CheckpointError or ResultError; then there is no folder.
    """
    _check(options)
    with writer_lock(options.out, "give another --out"):
        yield from _export(options)


def _export(options: Options) -> Iterator[str]:
    training = describe_training(options.sources, options.recipe, options.hours)
    loaded = load(options.model or newest_run(), torch.device("cpu"))
    network = cast(FrameInterpolator, loaded.model)
    about = card(loaded, options.licence, options.results, options.trained_on, training)
    with pretrained_folder.new_folder(options.out) as folder:
        if options.format == "torch":
            described, run = _write_weights(folder, network, about, options.dtype)
            use = None
        else:
            described, run = _write_graph(folder, network, about, options.format)
            use = use_graph(FILES[options.format], USE[options.format], MIN_SIZE)
        differences = tuple(compare(_runs(network), run))
        (folder / CARD).write_text(about.text(described, differences, use), encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    yield from map(_line, differences)
    what = f"{about.origin.name} at step {about.origin.step}{', EMA weights' if about.origin.averaged else ''}"
    yield f"{options.out}: {what}, {options.format}, {options.dtype}, {size / 1e6:.1f} MB"


def _check(options: Options) -> None:
    """Reject what would otherwise fail only after the work."""
    pretrained_folder.check_out(options.out)
    if options.format != "torch" and options.dtype != "fp32":
        raise JobError(f"--dtype {options.dtype} is for --format torch: a graph is in fp32")
    refuse_missing(options.format)


def _write_weights(folder: Path, network: FrameInterpolator, about: Card, dtype: Dtype) -> tuple[Description, Run]:
    described = pretrained_folder.write_model(folder, network, about.origin, dtype)
    again, _ = pretrained_folder.read_model(folder, torch.device("cpu"))
    return described, _runs(again)


def _write_graph(folder: Path, network: FrameInterpolator, about: Card, kind: str) -> tuple[Description, Run]:
    described = describe(network.config, about.origin)
    pretrained_folder.write_description(folder, described)
    return described, WRITERS[kind](folder, trace(traceable(network)))


def _runs(network: FrameInterpolator) -> Run:
    return partial(predict, network, precision=torch.float32)


def _line(one: Difference) -> str:
    return f"{one.frames}: at most {255 * one.largest:.3g} of 255 from the original, {255 * one.mean:.3g} on average"


if __name__ == "__main__":
    main()
