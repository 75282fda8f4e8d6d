"""Validation of a configuration: which settings fit together."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path

from vfi.config.configs import (
    KNOWN_STEPS,
    SCALES,
    UNTRAINED,
    Config,
    ConfigError,
    DataConfig,
    GuardConfig,
    ModelConfig,
    Needs,
    folder_ratio,
)


def validate(config: Config) -> None:
    """Check all rules; ConfigError names the setting, its value and what to do."""
    run, data, optim, model = config.run, config.data, config.optim, config.model
    if run.steps is not None and run.epochs is not None:
        raise ConfigError(f"--steps {run.steps} and --epochs {run.epochs} were both given: give one of them")
    counts = {
        "--steps": run.steps, "--epochs": run.epochs, "--batch_size": data.batch_size, "--global_batch": data.global_batch,
        "--val_samples": data.val_samples, "--log_every": run.log_every, "--save_every": run.save_every,
        "--val_every": run.val_every, "--keep_last": run.keep_last, "--shuffle_shards": data.shuffle_shards,
        "--lane_bundle": data.lane_bundle,
        "--width": model.width, "--d_state": model.d_state, "--expand": model.expand, "--head_dim": model.head_dim,
        "--xb_share": model.xb_share, "--sinkhorn_iterations": model.sinkhorn_iterations, "--curriculum_T": data.curriculum_T,
    }  # fmt: skip
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}; it must be at least 1")
    for flag, value in (("--num_workers", data.num_workers), ("--warmup_steps", optim.warmup_steps), ("--seed", run.seed),
                        ("--freeze_backbone", optim.freeze_backbone), ("--keep_best", run.keep_best),
                        ("--profile", run.profile)):  # fmt: skip
        if value < 0:
            raise ConfigError(f"{flag} is {value}; it must not be negative")
    for flag, crop in (("--crop", data.crop), *(("--curriculum_crops", crop) for crop in data.curriculum_crops)):
        if crop < 64 or crop % 16:
            raise ConfigError(f"{flag} is {crop}; it must be a multiple of 16 and at least 64 (the loss has five levels)")
    if not 0 <= data.max_bad_sample_rate <= 1:
        raise ConfigError(f"--max_bad_sample_rate is {data.max_bad_sample_rate}; it must be a fraction between 0 and 1")
    if not 0 < run.timeout_minutes < math.inf:
        raise ConfigError(f"--timeout_minutes is {run.timeout_minutes}; it must be positive and finite")
    if not 0 < data.cache_gb < math.inf:
        raise ConfigError(f"--cache_gb is {data.cache_gb}; it must be positive and finite")
    if not 0 <= data.augment_prob <= 1:
        raise ConfigError(f"--augment_prob is {data.augment_prob}; it must be between 0 and 1")
    if not 0 <= optim.lr_min <= optim.lr:
        raise ConfigError(f"--lr_min {optim.lr_min} must lie between 0 and --lr {optim.lr}")
    if optim.weight_decay < 0 or optim.clip_norm < 0:
        raise ConfigError(f"--weight_decay {optim.weight_decay} and --clip_norm {optim.clip_norm} must not be negative")
    if not 0 <= optim.mhc_anneal <= 1:
        raise ConfigError(f"--mhc_anneal is {optim.mhc_anneal}; it must be a fraction between 0 and 1")
    if not 0 <= optim.ema < 1:
        raise ConfigError(f"--ema is {optim.ema}; it is a decay such as 0.999 and must be at least 0 and below 1")
    for name in ("merge_weight", "teacher_weight", "distill_weight", "vgg_weight", "style_weight"):
        if getattr(optim, name) < 0:
            raise ConfigError(f"--{name} is {getattr(optim, name)}; it must not be negative")
    if data.curriculum and list(data.curriculum_crops) != sorted(data.curriculum_crops):
        raise ConfigError(f"--curriculum_crops {data.curriculum_crops} must increase")
    if run.exp_name and (Path(run.exp_name).name != run.exp_name or run.exp_name.startswith(".")):
        raise ConfigError(f"--exp_name {run.exp_name!r} must be a plain folder name; --output_dir sets its parent")
    if run.matvlm_plan != "off" and not run.matvlm_donor:
        raise ConfigError(f"--matvlm_plan {run.matvlm_plan} needs --matvlm_donor: a run with attention, or {UNTRAINED}")
    first = {"--matvlm_plan": run.matvlm_plan, "--resume": run.resume, "--start_from": run.start_from}
    given = [f"{flag} {value}" for flag, value in first.items() if value not in ("", "auto", "off")]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both give the initial weights: remove one")
    _validate_folders(data)
    _validate_compute(config)
    _validate_guard(config.guard)
    _validate_model(model)
    _refuse_without_effect(config)


def _validate_folders(data: DataConfig) -> None:
    """Check that there are as many parts of the ratio, and kinds of sequences, as folders; a preset may name no folder yet."""
    folders, ratio = len(data.data_path), folder_ratio(data)
    if folders and len(ratio) != folders:
        given = f"--mixed_ratio {data.mixed_ratio}" if data.mixed_ratio else "no --mixed_ratio"
        one_each = ":".join(["1"] * folders)
        advice = f"give one number for each folder, such as --mixed_ratio {one_each}" if folders > 1 else "remove it"
        raise ConfigError(f"--data_path has {folders} folder{'s' * (folders > 1)} and there is {given}: {advice}")
    for flag, entries in (("--sequence", len(data.sequence)), ("--small_frames", len(data.small_frames))):
        if folders and entries not in (1, folders):
            raise ConfigError(f"{flag} has {entries} entries and --data_path {folders}: give one, or one for each")


def _validate_compute(config: Config) -> None:
    """Refuse what CUDA graphs can't capture."""
    compute, mixing = config.compute, config.model.mixing
    others = {"--compile": compute.compile, "--checkpointing": compute.checkpointing, f"--mixing {mixing}": mixing != "none"}
    given = [flag for flag, is_given in others.items() if is_given]
    if compute.cuda_graphs and given:
        raise ConfigError(f"--cuda_graphs can't capture a network with {' and '.join(given)}: remove one of them")


def _validate_guard(guard: GuardConfig) -> None:
    """Check the ranges of the gradient monitor's settings."""
    if not 1 < guard.guard_factor < math.inf:
        raise ConfigError(f"--guard_factor is {guard.guard_factor}; it must be finite and greater than 1")
    if guard.guard_window < 2 * KNOWN_STEPS:
        raise ConfigError(f"--guard_window is {guard.guard_window}; it must be at least {2 * KNOWN_STEPS}")
    for flag, value in (("--guard_skips", guard.guard_skips), ("--max_rollbacks", guard.max_rollbacks)):
        if value < 0:
            raise ConfigError(f"{flag} is {value}; it must not be negative")
    if not 0 < guard.guard_rate_factor <= 1:
        raise ConfigError(f"--guard_rate_factor is {guard.guard_rate_factor}; it must be greater than 0 and at most 1")


def _validate_model(model: ModelConfig) -> None:
    """Check the settings of the network."""
    if (8 * model.width) % model.head_dim:
        raise ConfigError(
            f"--head_dim {model.head_dim} must divide 8 * --width = {8 * model.width}, the channels at stride 8: "
            f"take another --head_dim (8, 16, 32) or --width"
        )
    if min(model.depths) < 1:
        raise ConfigError(f"--depths {model.depths[0]} {model.depths[1]}: each stage needs at least one block")
    if model.scale not in SCALES:
        raise ConfigError(f"--scale is {model.scale}; choose from {', '.join(map(str, SCALES))}")
    heads = model.expand * 8 * model.width // model.head_dim  # at stride 8; twice as many at stride 16
    if heads % model.xb_share:
        raise ConfigError(f"--xb_share {model.xb_share} must divide the {heads} heads of the scan at stride 8")
    if model.xb_share > 1 and model.ssd_groups != "per_head":
        raise ConfigError(f"--xb_share {model.xb_share} needs --ssd_groups per_head")


def _refuse_without_effect(config: Config) -> None:
    """Refuse settings that others leave without effect (see Needs): they would be flags that do nothing."""
    for group in dataclasses.fields(config):
        given = getattr(config, group.name)
        hints = typing.get_type_hints(type(given), include_extras=True)
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            for needs in typing.get_args(hints[field.name])[1:] if value != field.default else ():
                if isinstance(needs, Needs) and not needs.is_met(config):
                    raise ConfigError(f"--{field.name} {value} has no effect without {needs.words}: remove it or add that")
