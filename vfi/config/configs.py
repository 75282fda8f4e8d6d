"""What can be set? One tree of frozen dataclasses; every field is a flag of the command line, flattened.

    python -m vfi.train --preset small --data_path SHARDS --batch_size 16 --no-use_ecab

The accelerate YAML owns processes and precision; this file owns the mathematics and the run. Rules that cross fields live
in `validate`, and a flag whose feature does not exist yet is refused there by name.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

SequenceKind = Literal["middle", "random_time", "random_gap"]
SCALES = (1.0, 0.5, 0.25)
UNTRAINED = "untrained"  # a --matvlm_donor
KNOWN_STEPS = 20  # fewer give no median to judge a loss or a gradient by (vfi/training/gradient_monitor.py)


class ConfigError(ValueError):
    """A setting, or a combination of settings, is not usable; the message names the fields and the fix."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. Two checkpoints with equal values here hold the same parameters."""

    phase: Literal[1, 2, 3] = 1
    """1: backbone only; 2: with flow; 3: high resolution (the parameters of phase 2)."""
    width: int = 16
    """F: channels at level 0; level l has F * 2^l (16 = small, 32 = base)."""
    depths: tuple[int, int] = (3, 3)
    """LGS blocks at stride 8 and at stride 16."""
    backbone_mode: Literal["hybrid", "mamba2_only", "gated_attn_only"] = "hybrid"
    """Branches of an LGS block: both, only the scan, or only the window attention."""
    ssm: Literal["mamba2", "mamba1"] = "mamba2"
    """State-space model of branch A."""
    scan: Literal["interleaved", "flip"] = "interleaved"
    """Token order of branch A: both frames alternating, or each frame alone."""
    d_state: int = 64
    """State size S of the scan."""
    expand: int = 2
    """Inner width of the scan = expand * channels."""
    head_dim: int = 32
    """Channels of a head, in the scan and in the attention."""
    ssd_groups: Literal["shared", "per_head"] = "shared"
    """B and C of Mamba-2: one pair for all heads, or one a head as attention has them (MaTVLM plans B and C)."""
    xb_share: int = 1
    """Heads that share one x and one B, the d_xb of MaTVLM plan C; needs --ssd_groups per_head."""
    ssd_precision: Literal["auto", "fp32", "tf32", "input"] = "auto"
    """Products in the scan's core: fp32, TF32, or of the type that its input has under autocast. auto: bf16 of bf16 input in
    the fused kernels, or else fp32. Sums, decays and states are fp32 in any case. mamba_ssm's kernels multiply fp32 as TF32."""
    ssd_backend: Literal["auto", "reference", "mamba_ssm", "fused"] = "auto"
    """auto takes the fused kernels on a GPU, or else mamba_ssm's, and says what it took and why."""
    window_size: Literal[7, 8, 14] = 8
    """Side of an attention window in tokens."""
    gate: Literal["headwise", "elementwise", "off"] = "headwise"
    """Gate on the attention's output: one a head and token, one a channel and token, or none."""
    attention_backend: Literal["auto", "sdpa", "flash_attn", "fused"] = "auto"
    """auto takes the fused kernels on a GPU, or else PyTorch's SDPA; flash_attn needs that package and half precision."""
    pointwise_backend: Literal["auto", "torch", "fused"] = "auto"
    """Bias and PReLU, warps, layer norms, what lies side by side: auto takes fused kernels on a GPU, or else PyTorch's."""
    use_ecab: bool = True
    """Fusion by efficient channel attention (ECAB); --no-use_ecab takes CAB (squeeze and excite)."""
    mixing: Literal["none", "hc", "mhc", "mhc_lite"] = "none"
    """Residual streams of an LGS block: one, or several with hyper-connections. --use_mhc is --mixing mhc."""
    mixing_streams: Literal[2, 4] = 4
    """Residual streams n."""
    mixing_coefficients: Literal["token", "pooled"] = "token"
    """Mixing coefficients for every token, or one set a frame from its mean state."""
    sinkhorn_iterations: int = 20
    """Row and column normalisations of mhc."""
    warp: Literal["feature", "image", "flow_only"] = "feature"
    """What flow moves: features and frames, only frames, or frames without RefineNet (phases 2 and 3)."""
    teacher: bool = False
    """A further flow stage that sees the true frame while training, and teaches the others (phases 2 and 3)."""
    scale: float = 1.0
    """Flow is estimated at this fraction of the frame's size: 1, 0.5 or 0.25 (phases 2 and 3)."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where batches come from and what is done to them."""

    data_path: tuple[str, ...] = ()
    """Shard folder to train on (what a `python -m shards.…` job wrote) or its URL (https://, s3://, gs:// …), or several, to be
    mixed by --mixed_ratio."""
    val_path: str = ""
    """Shard folder to validate on, or its URL; without it nothing is validated."""
    batch_size: int = 16
    """Samples a device works on at once."""
    global_batch: int | None = None
    """Samples an optimiser step sees, over all devices; default: batch_size * processes. Accumulation follows from it."""
    crop: int = 256
    """Side of the square training crop in pixels."""
    num_workers: int = 4
    """Loader processes of each device; the order of samples does not depend on it. 0 loads in the training process."""
    shuffle_shards: int = 8
    """Samples of this many shards are shuffled among each other (the shards are shuffled, too)."""
    lane_bundle: int = 8
    """Places of the global batch that read on together: a batch mixes global batch / lane_bundle parts of the shuffled shards,
    and a process keeps about batch_size / lane_bundle * shuffle_shards shards open."""
    remainder: Literal["drop", "pad"] = "drop"
    """Samples left of an epoch that don't fill a global batch: leave them out, or fill up with samples of the epoch's start."""
    augment_prob: float = 0.5
    """Probability of each of: channel reversal, vertical flip, horizontal flip, time reversal."""
    rotate: bool = True
    """Rotate by a random multiple of 90 degrees."""
    max_fault_rate: float = 0.01
    """Part of the samples read that may be unusable (they are skipped, counted and named) before training stops."""
    cache_dir: str = ""
    """Folder in which shards of a remote --data_path or --val_path are kept, on a local disk; default: ~/.cache/vfi/shards."""
    cache_gb: float = 50.0
    """Largest size of that folder in GB (10^9 bytes), for all processes of a machine together."""
    val_samples: int | None = None
    """Validate on this many samples of val_path, evenly spaced; default: all."""
    mixed_ratio: str | None = None
    """Samples of each folder of --data_path among those of a few hundred lanes, such as 2:1. An epoch is the first one once."""
    sequence: tuple[SequenceKind, ...] = ("middle",)
    """What of a sample of N frames is used, for all folders or one each. middle: the first, middle and last frame; random_time:
    first and last and a random one between; random_gap: a, a + g, a + 2g at random, scaled by 1, 1/2 or 1/4 before the crop."""
    curriculum: bool = False
    """Let the crop grow during training, in place of --crop (phase 3)."""
    curriculum_T: int = 50  # noqa: N815 (the flag's published name)
    """Epochs over which the crop grows: each of --curriculum_crops holds for an equal part, the last one from then on."""
    curriculum_crops: tuple[int, int, int] = (256, 384, 512)
    """Crops of the curriculum."""

    @property
    def largest_crop(self) -> int:
        """Of the whole run."""
        return max(self.curriculum_crops) if self.curriculum else self.crop


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer with linear warm-up and cosine decay, and the loss."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for matrices and convolutions with AdamW for the rest (one process or DDP)."""
    lr: float = 2e-4
    """Peak learning rate."""
    lr_min: float = 2e-5
    """Learning rate at the last step."""
    weight_decay: float = 1e-4
    """Of matrices and convolutions; norms, biases, A_log, D and dt_bias have none."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    clip_norm: float = 0.1
    """Largest norm of the gradient, about what this loss gives once training runs smoothly; 0 switches clipping off."""
    vgg_weight: float = 0.0
    """Weight of a perceptual loss beside the Laplacian pyramid loss."""
    loss_backend: Literal["auto", "torch", "fused"] = "auto"
    """What makes the Laplacian pyramids: kernels of our own (fused) or PyTorch; auto takes the kernels where they can run."""
    merge_weight: float = 0.5
    """Weight of the loss of each flow stage's own merge of the warped frames (phases 2 and 3)."""
    teacher_weight: float = 0.01
    """Weight of the distance to the flow of the --teacher."""
    distill_weight: float = 0.0
    """Weight of the distance to flow that is stored beside the samples (phases 2 and 3)."""
    mhc_anneal: float = 0.0
    """Part of the steps, at the end, over which the mixing's annealing factor rises from 0 (as learnt) to 1 (identity)."""
    freeze_backbone: int = 0
    """Epochs at the start during which the backbone does not train (phases 2 and 3)."""
    ema: float = 0.0
    """Decay of a running mean of the weights, such as 0.999, which validation and later jobs then use; 0: none. It is lower in
    the first steps: (1 + n) / (10 + n) in the n-th."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What watches over the gradient, and what it does before weights are lost: see vfi/training/gradient_monitor.py."""

    guard: bool = True
    """Watch the gradient norm of each layer group and react in stages; without it, a loss that is no number ends the run."""
    guard_factor: float = 5.0
    """A norm is unusual when it is above its running median by more than this factor, and by more than so many spreads (of its
    logarithm)."""
    guard_window: int = 200
    """Steps that the running medians look back, and among which skipped steps are counted."""
    guard_skips: int = 3
    """Steps of the window that may be skipped; with one more the run goes back to the last good state."""
    guard_roll_backs: int = 2
    """Times that a run may go back; then it stops."""
    guard_rate_factor: float = 0.5
    """The learning rate is multiplied by this each time a run goes back."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how often, and where to."""

    preset: str = "small"
    """Named set of defaults, see vfi/config/presets.py."""
    exp_name: str = ""
    """Name of the run; its folder is output_dir/exp_name. Default: preset_phaseN."""
    output_dir: str = "runs"
    """Folder of all runs."""
    steps: int | None = None
    """Optimiser steps to train; or give --epochs."""
    epochs: int | None = None
    """Epochs to train; default without --steps: 300 in phase 1."""
    seed: int = 0
    """Of the initial weights, the order of samples and the augmentation."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    save_every: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    val_every: int = 1000
    """Steps between two validations; the last step is always validated."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints of the highest PSNR that are kept, too: of those steps that are validated and saved."""
    resume: str = ""
    """auto: go on with this run, if it has a checkpoint; NAME or PATH: start from the weights of another run."""
    start_from: str = ""
    """Run or checkpoint (NAME or PATH), folder of `vfi export`, `shipped` (the model that comes with the package), or model on
    the Hugging Face hub (ORG/NAME), whose weights are the first ones. With --resume auto only as long as this run has no
    checkpoint, so that the same command starts a run and goes on with it."""
    matvlm_plan: Literal["off", "A", "B", "C"] = "off"
    """Start the scan from the attention of --matvlm_donor (MaTVLM): see vfi/model/matvlm_init.py for the plans."""
    matvlm_donor: str = ""
    """Run or checkpoint with the attention (NAME or PATH), or `untrained`: random attention, the control arm."""
    timeout_minutes: float = 20.0
    """When no process has moved for so long, the one that hangs is named and the run ends."""
    profile: int = 0
    """Steps of which a profile is written after a few others, into profile/ of the run folder: a trace and, on a CUDA GPU, a
    snapshot of its memory; 0: none."""
    dry_run: bool = False
    """A few steps of everything, with validation and saving, in a folder that is removed afterwards."""


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the same mathematics is computed: what it costs, not what is learnt. Processes and precision are the launcher's."""

    compile: bool = False
    """Compile the network (torch.compile): minutes before the first step, less time and memory in each."""
    checkpointing: bool = False
    """Keep no activations of the LGS blocks and of RefineNet for the backward pass but compute them anew: less memory, more
    time."""
    cuda_graphs: bool = False
    """Record the network's passes once and replay them: seconds before the first step, and of the others what Python takes to
    launch them. On a GPU, one a process or DDP."""
    tf32: bool = False
    """Let products and convolutions of fp32 numbers round their factors to 10 bits on a GPU: faster where training is fp32."""
    deterministic: bool = False
    """The same bits every time on the same hardware; operators that can't do it are refused. Slower on a GPU."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run; runs/NAME/config.json holds one."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    guard: GuardConfig = GuardConfig()
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()


def folder_ratio(data: DataConfig) -> tuple[int, ...]:
    """The parts of --mixed_ratio, (1,) without it; ConfigError when it is none."""
    parts = (data.mixed_ratio or "1").split(":")
    if not all(part.isdecimal() and 1 <= int(part) <= 100 for part in parts) or (data.mixed_ratio and len(parts) < 2):
        raise ConfigError(f"--mixed_ratio is {data.mixed_ratio!r}; it must be numbers from 1 to 100 such as 2:1, one a folder")
    return tuple(map(int, parts))


def accumulation(config: Config, processes: int) -> int:
    """Forward passes of a device in one optimiser step = global batch / (device batch * processes); a remainder is refused."""
    at_once = config.data.batch_size * processes
    total = config.data.global_batch or at_once
    if total % at_once:
        raise ConfigError(
            f"--global_batch {total} is not a multiple of --batch_size {config.data.batch_size} * {processes} processes = "
            f"{at_once}: take --global_batch {max(1, total // at_once) * at_once} or another --batch_size"
        )
    return total // at_once
