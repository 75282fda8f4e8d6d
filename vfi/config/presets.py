"""Presets: named functions that return a Config, which the command line modifies.

A preset is a full Config; a flag changes one field of it: `--preset small --lr 1e-4`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from vfi.config.configs import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig


def tiny() -> Config:
    """Return a preset that learns something on two CPU cores within minutes: for the demo and the tests."""
    return Config(
        run=RunConfig(preset="tiny", log_every=10, save_every=200, val_every=200),
        data=DataConfig(batch_size=8, crop=64, num_workers=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=100),
        model=ModelConfig(width=8, depths=(1, 1), d_state=16, head_dim=16),
    )


def small() -> Config:
    """Return the preset with F = 16, the size of the small models of the field."""
    return Config(run=RunConfig(preset="small"), data=DataConfig(batch_size=32), model=ModelConfig(width=16))


def base() -> Config:
    """Return the preset with F = 32, the full model."""
    return Config(run=RunConfig(preset="base"), data=DataConfig(batch_size=32), model=ModelConfig(width=32))


# The ablations, as differences from `small`. What an experiment is compared with is its neighbour: 1a, 1b, 1d … 1i with 1c,
# 2b … 2e with 2c, 3b … 3d with 3a. They differ in nothing else.
_MOTION = {"phase": 2, "freeze_backbone": 50}  # from the checkpoint of a phase-1 run: --resume NAME
_MIXED = {"phase": 3, "mixed_ratio": "2:1", "sequence": ("middle", "random_gap")}  # --data_path VIMEO90K X4K1000FPS
AblationName = Literal["phase1", "phase2", "phase3"]
ABLATIONS: dict[str, dict[str, Any]] = {
    "Exp-1a": {"backbone_mode": "mamba2_only"},
    "Exp-1b": {"backbone_mode": "gated_attn_only"},
    "Exp-1c": {},  # hybrid: the method as it is
    "Exp-1d": {"ssm": "mamba1"},
    "Exp-1e": {"scan": "flip"},
    "Exp-1f": {"use_ecab": False},
    "Exp-1g": {"gate": "off"},
    "Exp-1h": {"mixing": "mhc"},
    "Exp-1h-hc": {"mixing": "hc"},
    "Exp-1h-lite": {"mixing": "mhc_lite"},
    "Exp-1i-7": {"window_size": 7},
    "Exp-1i-14": {"window_size": 14},
    "Exp-2a": {},  # no flow: the model of 1c, beside those with flow
    "Exp-2b": _MOTION | {"warp": "image"},
    "Exp-2c": _MOTION | {"warp": "feature"},
    "Exp-2d": _MOTION | {"warp": "flow_only"},
    "Exp-2e": _MOTION | {"distill_weight": 0.01},
    "Exp-3a": {"phase": 2, "scale": 0.25},  # the model of 2c as it is, at 4K
    "Exp-3b": {"phase": 3, "sequence": ("random_gap",)},  # --data_path X4K1000FPS
    "Exp-3c": _MIXED,
    "Exp-3d": _MIXED | {"curriculum": True, "small_frames": ("upscale", "refuse")},  # Vimeo90K's frames don't hold crops of 384
}
PRESETS: dict[str, Callable[[], Config]] = {preset.__name__: preset for preset in (tiny, small, base)}


def experiments(ablation: AblationName) -> list[str]:
    """Return the presets of an ablation, in their order: Exp-1a, Exp-1b … of phase1."""
    return [name for name in ABLATIONS if name.startswith(f"Exp-{ablation[-1]}")]


def names() -> list[str]:
    """Return the names of all presets: sizes first, then the ablations in their order."""
    return [*PRESETS, *ABLATIONS]


def get(name: str) -> Config:
    """Return the Config of a preset, ignoring case and `-` versus `_`; ConfigError lists those that exist."""
    known = {_plain(preset): preset for preset in names()}
    if _plain(name) not in known:
        raise ConfigError(f"--preset {name!r} does not exist; choose from {', '.join(names())}")
    name = known[_plain(name)]
    return PRESETS[name]() if name in PRESETS else override(small(), preset=name, **ABLATIONS[name])


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def override(config: Config, **values: Any) -> Config:
    """Return `config` with some fields changed, anywhere in the tree: a field's name is unique in it."""
    for group in dataclasses.fields(config):
        part = getattr(config, group.name)
        own = {field.name: values.pop(field.name) for field in dataclasses.fields(part) if field.name in values}
        config = dataclasses.replace(config, **{group.name: dataclasses.replace(part, **own)})
    if values:
        raise ConfigError(f"no setting is named {', '.join(values)}")
    return config
