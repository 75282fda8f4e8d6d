"""Folder of a pretrained model: weights, settings and a card, on disk or as the same three files on the Hugging Face hub.

    model.safetensors   weights, in fp32 or fp16
    config.json         the architecture, where the weights come from, and which version of the project wrote it
    README.md           the card (vfi/release/model_card.py)

Reading executes no code from the folder: settings are checked field by field, weights are safetensors; from the hub no other
file is even fetched. Hub, cache, revisions, HF_TOKEN and HF_HUB_OFFLINE are those of the library huggingface_hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from vfi.checkpoint.store import CONFIG, MODEL, STATE
from vfi.checkpoint.weights import read_weights, refuse_differences
from vfi.config.configs import Config, ConfigError, ModelConfig
from vfi.config.validation import validate
from vfi.errors import CheckpointError, JobError
from vfi.io.dataclass_json import RecordError, from_object
from vfi.io.verified_folder import MANIFEST
from vfi.model.interpolator import FrameInterpolator
from vfi.runtime.logging import logger
from vfi.runtime.versions import PROJECT, project_version
from vfi.shipped import is_shipped, shipped_model

SCHEMA, VERSION = "vfi-model", 1
CARD = "README.md"
Dtype = Literal["fp32", "fp16"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of weights."""

    name: str
    """Name of the run."""
    preset: str
    step: int
    averaged: bool
    """Whether the weights are an exponential moving average (--ema)."""
    trained_on: tuple[str, ...] = ()
    """Names of the data sets."""
    licence: str = ""
    """Licence of the weights; empty where none was stated."""


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of config.json."""

    model: ModelConfig
    origin: Origin
    dtype: Dtype = "fp32"
    """Type in which the weights are stored; they are used in fp32."""
    written_by: str = ""
    schema: str = SCHEMA
    version: int = VERSION


def data_name(path: str) -> str:
    """Return the name of a folder or URL of shards: its last part, with the one before it where the last is only the split."""
    parts = Path(path).parts
    return " ".join(parts[-2:] if parts[-1:] in (("train",), ("val",), ("test",)) else parts[-1:])


def this_version() -> str:
    """Return the name and version of the project."""
    return f"{PROJECT} {project_version()}"


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `out` to write into; it is renamed to `out` in the end, or removed after an error.

    JobError where `out` already exists, other than as an empty folder, or can't be written.
    """
    check_out(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except OSError as error:
        raise JobError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: Path) -> None:
    """Raise JobError unless a folder can be created at `out`."""
    if out.is_dir() and any(out.iterdir()):
        raise JobError(f"{out} already exists and is not empty: give another folder, nothing is overwritten")
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise JobError(f"{out} cannot be a folder: {path} is a file")


def write_model(folder: Path, network: FrameInterpolator, origin: Origin, dtype: Dtype = "fp32") -> Description:
    """Write weights and config.json into `folder`, without parts for training. JobError for values beyond fp16's range."""
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("flow.teacher.")}
    described = describe(network.config, origin, dtype)
    # not save_file, whose file is readable by its owner only
    (folder / MODEL).write_bytes(save(_stored(weights, dtype), {"format": "pt"}))
    write_description(folder, described)
    return described


def write_description(folder: Path, described: Description) -> None:
    """Write config.json into `folder`."""
    fields = dataclasses.asdict(described)
    head = {name: fields.pop(name) for name in ("schema", "version", "written_by")}
    (folder / CONFIG).write_text(json.dumps(head | fields, indent=1) + "\n", encoding="utf-8")


def describe(config: ModelConfig, origin: Origin, dtype: Dtype = "fp32") -> Description:
    """Return the description of a network that this program writes."""
    return Description(portable(config), origin, dtype, this_version())


def portable(config: ModelConfig) -> ModelConfig:
    """Return the config of the same network for any machine: fast paths are selected there, and the teacher is left out."""
    return dataclasses.replace(config, ssd_backend="auto", attention_backend="auto", teacher=False)


def _stored(weights: dict[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    stored = {}
    for name, tensor in weights.items():
        half = dtype == "fp16" and tensor.is_floating_point()
        kept = tensor.detach().to("cpu", torch.float16 if half else tensor.dtype).contiguous()
        if half and not kept.isfinite().all():
            raise JobError(f"--dtype fp16: {name} has values up to {tensor.abs().max():g}, more than fp16 can hold: use fp32")
        stored[name] = kept
    return stored


def read_model(folder: Path, device: torch.device) -> tuple[FrameInterpolator, Description]:
    """Return the network of a folder, in eval mode on `device`, in fp32. CheckpointError says what is not usable."""
    described = read_description(folder)
    if not (folder / MODEL).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise CheckpointError(f"{folder} lacks {MODEL}, the only file that weights are read from; it holds {there}")
    weights = read_weights(folder)
    if sum(described.model.depths) > len(weights):
        raise CheckpointError(f"{folder / CONFIG} asks for more blocks than {MODEL} holds weights: {described.model.depths}")
    with torch.device("meta"):  # shapes only: settings that ask for too much are found before memory is allocated
        expected = FrameInterpolator(described.model, "meta").state_dict()
    refuse_differences(expected, weights, folder)
    network = FrameInterpolator(described.model, device)
    network.load_state_dict(weights)
    return network.eval(), described


def read_description(folder: Path) -> Description:
    """Read and check config.json; CheckpointError names what does not fit and which version wrote it."""
    path = folder / CONFIG
    content = _read_json(path)
    if content.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} does not describe a model of this project: its schema is {content.get('schema')!r}")
    writer = content.get("written_by") or "an unnamed version"
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of schema version {content.get('version')!r}, written by {writer}; {this_version()} reads version "
            f"{VERSION}: install the version of the project that wrote it"
        )
    defaulted: list[str] = []
    try:
        described: Description = from_object(Description, content, str(path), defaulted)
        validate(Config(model=described.model))
    except (RecordError, ConfigError) as error:
        raise CheckpointError(f"{error} ({path} was written by {writer}; this is {this_version()})") from error
    if defaulted:
        logger.warning(f"{path} is older than these settings, which have their defaults: {', '.join(defaulted)}")
    return described


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: without it nobody knows which network the weights belong to") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def is_model_folder(path: Path) -> bool:
    """Return whether this is a pretrained folder, complete or not, rather than a run or a checkpoint."""
    if not path.is_dir() or any((path / name).exists() for name in (STATE, MANIFEST, "checkpoints")):
        return False
    if (path / MODEL).exists():
        return True
    try:
        return _read_json(path / CONFIG).get("schema") == SCHEMA
    except CheckpointError:
        return False


def find(path: str | Path, output_dir: Path = Path("runs")) -> Path | None:
    """Return the folder that `path` means, fetched if it is ORG/NAME on the hub; None for anything else, such as a run.

    CheckpointError for a shipped model that is missing or damaged, and for what the hub doesn't have.
    """
    if is_shipped(path):
        return shipped_model()
    if is_hub_id(path, output_dir):
        return fetch(str(path))
    return Path(path) if is_model_folder(Path(path)) else None


def is_hub_id(path: str | Path, output_dir: Path = Path("runs")) -> bool:
    """Return whether this is ORG/NAME and nothing local: neither an existing path, nor below an existing folder, nor a run."""
    text = str(path)
    here = (Path(text), Path(text).parent, output_dir / text)
    return _HUB_ID.fullmatch(text) is not None and not any(place.exists() for place in here)


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """Fetch a model from the hub at a branch, tag or commit, and return its folder in the library's cache.

    CheckpointError where it can't be had.
    """
    from huggingface_hub import snapshot_download  # imported only here: it takes a while
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )  # fmt: skip

    at = f"{hub_id} at {revision or 'main'}"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[CONFIG, MODEL, CARD]))
    except GatedRepoError as error:
        why = "it is open only to who was let in: ask on its page, and set HF_TOKEN"
        raise CheckpointError(f"{at} cannot be fetched: {why}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{hub_id} has no revision {revision!r}: give a branch, a tag or a commit of it") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no run, file or folder {hub_id} here and no such model on the hub (or it is private: set HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{at} is not in the cache, and the hub can't be reached (or HF_HUB_OFFLINE is set): connect once, or give a folder"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{at} cannot be fetched: {error}") from error
