"""All settings of a training run: a tree of frozen dataclasses, each field of which is a flag of the command line.

    python -m vfi.train --preset small --data_path SHARDS --batch_size 16 --no-use_ecab

The accelerate YAML defines processes and precision, this file the mathematics and the run. Rules that involve several fields
are in vfi/config/validation.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

SequenceKind = Literal["middle", "random_time", "random_gap"]
SmallFrames = Literal["refuse", "upscale", "reflect"]
SCALES = (1.0, 0.5, 0.25)
UNTRAINED = "untrained"  # a --matvlm_donor
KNOWN_STEPS = 20  # with fewer, a loss or a gradient can't be compared with a median (vfi/training/gradient_monitor.py)


class ConfigError(ValueError):
    """A setting, or a combination of settings, is not usable; the message names the fields and the fix."""


class Needs(NamedTuple):
    """Condition without which a field has no effect, in the field's annotation; to set the field otherwise is an error."""

    words: str
    """What to add to the command line, after "without"."""
    is_met: Callable[[Config], bool]


_FLOW = Needs("--phase 2 or 3", lambda config: config.model.phase > 1)
_PHASE_3 = Needs("--phase 3", lambda config: config.model.phase == 3)
_TEACHER = Needs("--teacher", lambda config: config.model.teacher)
_STREAMS = Needs("--mixing hc, mhc or mhc_lite", lambda config: config.model.mixing != "none")
_SINKHORN = Needs("--mixing mhc", lambda config: config.model.mixing == "mhc")
_SCAN = Needs("a --backbone_mode with a scan", lambda config: config.model.backbone_mode != "gated_attn_only")
_ATTENTION = Needs("a --backbone_mode with attention", lambda config: config.model.backbone_mode != "mamba2_only")
_MAMBA2 = Needs("--ssm mamba2", lambda config: config.model.ssm == "mamba2")
_KERNELS = Needs("a --ssd_backend with kernels", lambda config: config.model.ssd_backend not in ("reference", "blocked"))
_GUARD = Needs("--guard", lambda config: config.guard.guard)
_ROLLBACKS = Needs("--guard that may roll back", lambda config: config.guard.guard and config.guard.max_rollbacks > 0)
_REMOTE = Needs("a URL in --data_path or --val_path", lambda config: any("://" in path for path in config.data.paths))
_VALIDATION = Needs("--val_path", lambda config: bool(config.data.val_path))
_CURRICULUM = Needs("--curriculum", lambda config: config.data.curriculum)
_MATVLM = Needs("--matvlm_plan A, B or C", lambda config: config.run.matvlm_plan != "off")
_DISTILLATION = Needs("--distill_weight", lambda config: config.optim.distill_weight > 0)
_PERCEPTUAL = Needs("--vgg_weight or --style_weight", lambda config: config.optim.is_perceptual)
_AUTO = Needs("--resume auto", lambda config: config.run.resume == "auto")
_REAL_RUN = Needs("--no-dry_run", lambda config: not config.run.dry_run)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. Checkpoints with equal values here hold the same parameters."""

    phase: Literal[1, 2, 3] = 1
    """1: backbone only; 2: with flow; 3: high resolution (the parameters of phase 2)."""
    width: int = 16
    """F: channels at level 0; level l has F * 2^l (16 = small, 32 = base)."""
    depths: tuple[int, int] = (3, 3)
    """LGS blocks at stride 8 and at stride 16."""
    backbone_mode: Literal["hybrid", "mamba2_only", "gated_attn_only"] = "hybrid"
    """Branches of an LGS block: both, only the scan, or only the window attention."""
    ssm: Annotated[Literal["mamba2", "mamba1"], _SCAN] = "mamba2"
    """State-space model of branch A."""
    scan: Annotated[Literal["interleaved", "flip"], _SCAN] = "interleaved"
    """Token order of branch A: both frames alternating, or each frame alone."""
    d_state: int = 64
    """State size S of the scan."""
    expand: int = 2
    """Inner width of the scan, as a multiple of its channels."""
    head_dim: int = 32
    """Channels of a head, in the scan and in the attention."""
    ssd_groups: Annotated[Literal["shared", "per_head"], _SCAN, _MAMBA2] = "shared"
    """B and C of Mamba-2: one pair for all heads, or one for each head, as in attention (MaTVLM plans B and C)."""
    xb_share: Annotated[int, _SCAN, _MAMBA2] = 1
    """Heads that share one x and one B, the d_xb of MaTVLM plan C; needs --ssd_groups per_head."""
    ssd_precision: Annotated[Literal["auto", "fp32", "tf32", "input"], _SCAN, _KERNELS] = "auto"
    """Precision of products in the scan's core: fp32, TF32, or that of its input under autocast. auto: bf16 for bf16 input in
    the fused kernels, otherwise fp32. Sums, decays and states are always fp32. mamba_ssm's kernels multiply fp32 as TF32."""
    ssd_backend: Annotated[Literal["auto", "reference", "mamba_ssm", "fused", "blocked"], _SCAN] = "auto"
    """Implementation of the scan. auto selects the fused Triton kernels on a GPU, otherwise mamba_ssm's, and on a CPU the form
    that works block by block in its cache; it logs why."""
    window_size: Annotated[Literal[7, 8, 14], _ATTENTION] = 8
    """Side of an attention window in tokens."""
    gate: Annotated[Literal["headwise", "elementwise", "off"], _ATTENTION] = "headwise"
    """Gate on the attention's output: one for each head and token, one for each channel and token, or none."""
    attention_backend: Annotated[Literal["auto", "sdpa", "flash_attn", "fused"], _ATTENTION] = "auto"
    """Implementation of the attention. auto selects the fused Triton kernels on a GPU, otherwise PyTorch's SDPA; flash_attn
    needs that package and half precision."""
    pointwise_backend: Literal["auto", "torch", "fused"] = "auto"
    """Implementation of bias and PReLU, warps, layer norms and concatenation. auto selects the fused Triton kernels on a GPU,
    otherwise PyTorch's."""
    use_ecab: bool = True
    """Fusion by efficient channel attention (ECAB); --no-use_ecab selects CAB (squeeze and excite)."""
    mixing: Literal["none", "hc", "mhc", "mhc_lite"] = "none"
    """Residual streams of an LGS block: one, or several with hyper-connections. --use_mhc means --mixing mhc."""
    mixing_streams: Annotated[Literal[2, 4], _STREAMS] = 4
    """Number of residual streams."""
    mixing_coefficients: Annotated[Literal["token", "pooled"], _STREAMS] = "token"
    """Mixing coefficients for every token, or one set for each frame, from its mean state."""
    sinkhorn_iterations: Annotated[int, _SINKHORN] = 20
    """Row and column normalisations of mhc."""
    warp: Annotated[Literal["feature", "image", "flow_only"], _FLOW] = "feature"
    """What is warped by the flow: features and frames, only frames, or frames without RefineNet (phases 2 and 3)."""
    teacher: bool = False
    """Add a flow stage that sees the true frame during training and teaches the others (phases 2 and 3)."""
    scale: Annotated[float, _FLOW] = 1.0
    """Fraction of the frame's size at which flow is estimated: 1, 0.5 or 0.25 (phases 2 and 3)."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of the batches, and their augmentation."""

    data_path: tuple[str, ...] = ()
    """Shard folder to train on (written by a `python -m shards.…` command) or its URL (https://, s3://, gs:// …), or several,
    mixed by --mixed_ratio; --x4k-path adds the last one."""
    val_path: str = ""
    """Shard folder to validate on, or its URL; without it nothing is validated."""
    batch_size: int = 16
    """Samples of a forward pass on each device."""
    global_batch: int | None = None
    """Samples of an optimizer step over all devices; default: batch_size * processes. Gradient accumulation follows from it."""
    crop: int = 256
    """Side of the square training crop in pixels."""
    num_workers: int = 4
    """Loader processes of each device; the order of samples does not depend on it. Each gives an equal share of every batch,
    so divisors of --batch_size are fastest. 0 loads in the training process."""
    shuffle_shards: int = 8
    """Number of shards whose samples are shuffled together (the shards are shuffled, too)."""
    lane_bundle: int = 8
    """Batch slots that read one stream of samples: a batch mixes global batch / lane_bundle streams of shuffled shards, and a
    process keeps about batch_size / lane_bundle * shuffle_shards shards open."""
    remainder: Literal["drop", "pad"] = "drop"
    """Samples at the end of an epoch that don't fill a global batch: drop them, or pad with samples of the epoch's start."""
    augment_prob: float = 0.5
    """Probability of each of: channel reversal, vertical flip, horizontal flip, time reversal."""
    rotate: bool = True
    """Rotate by a random multiple of 90 degrees."""
    max_bad_sample_rate: float = 0.01
    """Fraction of unusable samples (which are skipped, counted and named) above which training stops."""
    cache_dir: Annotated[str, _REMOTE] = ""
    """Folder on a local disk that caches the shards of a remote --data_path or --val_path; default: ~/.cache/vfi/shards."""
    cache_gb: Annotated[float, _REMOTE] = 50.0
    """Maximum size of that folder in GB (10^9 bytes), for all processes of a machine together."""
    val_samples: Annotated[int | None, _VALIDATION] = None
    """Number of samples of val_path to validate on, evenly spaced; default: all."""
    mixed_ratio: str | None = None
    """Proportion in which the folders of --data_path are mixed, such as 2:1. An epoch is one pass over the first one."""
    sequence: tuple[SequenceKind, ...] = ("middle",)
    """Triplet taken from a sample of N frames, for all folders or one each. middle: the first, middle and last frame;
    random_time: first, last and a random one in between; random_gap: random a, a + g, a + 2g, scaled by 1, 1/2 or 1/4 before
    the crop."""
    small_frames: tuple[SmallFrames, ...] = ("refuse",)
    """Frames smaller than the crop, for all folders or one each: refuse them before training, upscale them until they hold it,
    or continue them beyond their edges by reflection."""
    curriculum: Annotated[bool, _PHASE_3] = False
    """Increase the crop during training, in place of --crop (phase 3)."""
    curriculum_T: Annotated[int, _CURRICULUM] = 50  # noqa: N815 (the flag's published name)
    """Epochs over which the crop increases: each of --curriculum_crops applies to an equal part, the last one from then on."""
    curriculum_crops: Annotated[tuple[int, int, int], _CURRICULUM] = (256, 384, 512)
    """Crops of the curriculum."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All shard folders, local and remote."""
        return (*self.data_path, self.val_path)

    @property
    def largest_crop(self) -> int:
        """The largest crop of the whole run, in pixels."""
        return max(self.curriculum_crops) if self.curriculum else self.crop


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer with linear warm-up and cosine decay, and the loss."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for matrices and convolutions and AdamW for the rest (one process or DDP)."""
    lr: float = 2e-4
    """Peak learning rate."""
    lr_min: float = 2e-5
    """Learning rate at the last step."""
    weight_decay: float = 1e-4
    """Weight decay of matrices and convolutions; norms, biases, A_log, D and dt_bias have none."""
    warmup_steps: int = 2000
    """Number of steps of linear warm-up."""
    clip_norm: float = 0.1
    """Maximum norm of the gradient, about its usual norm in stable training; 0 disables clipping."""
    vgg_weight: float = 0.0
    """Weight of the content term of a perceptual loss (VGG-19, as in FILM) beside the Laplacian pyramid loss; such
    as 0.01."""
    style_weight: float = 0.0
    """Weight of its style term, between Gram matrices."""
    vgg_weights: Annotated[str, _PERCEPTUAL] = ""
    """File of torchvision's weights of VGG-19 (vgg19-dcbb9e9d.pth); default: torchvision downloads it once."""
    loss_backend: Literal["auto", "torch", "fused"] = "auto"
    """Implementation of the Laplacian pyramid loss. auto selects the fused Triton kernels on a GPU, otherwise PyTorch's."""
    merge_weight: Annotated[float, _FLOW] = 0.5
    """Weight of the loss of each flow stage's own merge of the warped frames (phases 2 and 3)."""
    teacher_weight: Annotated[float, _TEACHER] = 0.01
    """Weight of the distance to the flow of the --teacher."""
    distill_weight: Annotated[float, _FLOW] = 0.0
    """Weight of the distance to the flow stored with the samples (python -m shards.flow) or given by --flow_teacher."""
    flow_teacher: Annotated[str, _DISTILLATION] = ""
    """MODULE:FACTORY of your own, FACTORY(device) -> a function: img0, img1, timestep -> flow_t0, flow_t1 in pixels, to distil
    in place of flow stored with the samples."""
    mhc_anneal: Annotated[float, _STREAMS] = 0.0
    """Fraction of the steps, at the end, over which the mixing's annealing factor rises from 0 (as learnt) to 1 (identity)."""
    freeze_backbone: Annotated[int, _FLOW] = 0
    """Number of epochs at the start during which the backbone does not train (phases 2 and 3)."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999, which validation and later commands use; 0: none.
    In the first steps it is lower: (1 + n) / (10 + n) in step n."""

    @property
    def is_perceptual(self) -> bool:
        """Whether the loss has a perceptual term."""
        return bool(self.vgg_weight or self.style_weight)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """The gradient monitor, which acts before weights are lost: see vfi/training/gradient_monitor.py."""

    guard: bool = True
    """Monitor the gradient norm of each layer group and respond in stages; without it, a non-finite loss ends the run."""
    guard_factor: Annotated[float, _GUARD] = 5.0
    """A norm is unusual above this multiple of its running median, if it also exceeds it by as many spreads (of its
    logarithm)."""
    guard_window: Annotated[int, _GUARD] = 200
    """Number of recent steps that the running medians and the count of skipped steps cover."""
    guard_skips: Annotated[int, _GUARD] = 3
    """Maximum number of skipped steps in the window; one more, and the run rolls back to the last good state."""
    max_rollbacks: Annotated[int, _GUARD] = 2
    """Maximum number of roll-backs of a run; at the next one it stops."""
    guard_rate_factor: Annotated[float, _ROLLBACKS] = 0.5
    """Factor applied to the learning rate at each roll-back."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of the run, intervals and folders."""

    preset: str = "small"
    """Named set of defaults (vfi/config/presets.py)."""
    exp_name: str = ""
    """Name of the run; its folder is output_dir/exp_name. Default: preset_phaseN."""
    output_dir: str = "runs"
    """Folder of all runs."""
    steps: int | None = None
    """Number of optimizer steps; or give --epochs."""
    epochs: int | None = None
    """Number of epochs; default without --steps: 300 in phase 1, 200 in phase 2, 100 in phase 3."""
    seed: int = 0
    """Random seed of the initial weights, the order of samples and the augmentation."""
    log_every: int = 50
    """Steps between rows of metrics."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    val_every: int = 1000
    """Steps between validations; the last step is always validated."""
    keep_last: int = 3
    """Number of newest checkpoints to keep."""
    keep_best: Annotated[int, _VALIDATION] = 1
    """Number of checkpoints with the highest PSNR to keep in addition, among the steps that are both validated and saved."""
    resume: str = ""
    """auto: resume this run if it has a checkpoint; NAME or PATH: start from the newest weights of another run; NAME@best: from
    those with the highest PSNR."""
    schedule: Annotated[Literal["extend", "restart", "keep"] | None, _AUTO] = None
    """What becomes of the learning rate where --resume auto meets other --steps, --epochs, --lr, --lr_min or --warmup_steps.
    extend: it is as if they had held from the start; restart: a new warm-up and decay over the remaining steps; keep: the
    former schedule, then its last rate. Formulas: docs/training.md."""
    start_from: str = ""
    """Run or checkpoint (NAME, NAME@best or PATH, as in --resume), folder of `vfi export`, `shipped` (the model that comes with
    the package), or model on the Hugging Face hub (ORG/NAME) to take the initial weights from. With --resume auto only if
    this run has no checkpoint yet, so that the same command starts and resumes a run."""
    matvlm_plan: Annotated[Literal["off", "A", "B", "C"], _SCAN] = "off"
    """Initialise the scan from the attention of --matvlm_donor (MaTVLM); the plans are in vfi/model/matvlm_init.py."""
    matvlm_donor: Annotated[str, _MATVLM] = ""
    """Run or checkpoint with the source attention (NAME or PATH), or `untrained`: random attention, the control arm."""
    timeout_minutes: float = 20.0
    """Minutes without progress of any process after which the run ends and names the stalled one."""
    profile: Annotated[int, _REAL_RUN] = 0
    """Number of steps to profile after a few others; profile/ in the run folder gets a trace and, on a CUDA GPU, a snapshot of
    its memory; 0: none."""
    dry_run: bool = False
    """Take a few steps with validation and saving, in a folder that is removed afterwards."""


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the same mathematics is computed: this changes cost, not results. The launcher sets processes and precision."""

    compile: bool = False
    """Compile the network (torch.compile): costs minutes before the first step, saves time and memory in each step."""
    checkpointing: bool = False
    """Recompute the activations of the LGS blocks and of RefineNet in the backward pass: less memory, more time."""
    cuda_graphs: bool = False
    """Capture the network's passes and Muon's update as CUDA graphs: costs seconds before the first step, saves the time that
    Python needs to launch kernels. For one GPU per process, alone or with DDP."""
    tf32: bool = False
    """Allow fp32 products and convolutions on a GPU to round their factors to 10 bits: faster if training is fp32."""
    deterministic: bool = False
    """Produce identical bits every time on the same hardware; operators that can't are refused. Slower on a GPU."""


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
    """Return the parts of --mixed_ratio, (1,) without it; ConfigError when it is not a ratio."""
    parts = (data.mixed_ratio or "1").split(":")
    if not all(part.isdecimal() and 1 <= int(part) <= 100 for part in parts) or (data.mixed_ratio and len(parts) < 2):
        raise ConfigError(f"--mixed_ratio is {data.mixed_ratio!r}; it must be numbers from 1 to 100 such as 2:1, one a folder")
    return tuple(map(int, parts))


def accumulation(config: Config, processes: int) -> int:
    """Return the forward passes of a device in one optimizer step: global batch / (device batch * processes).

    Raises ConfigError where there is a remainder.
    """
    at_once = config.data.batch_size * processes
    total = config.data.global_batch or at_once
    if total % at_once:
        raise ConfigError(
            f"--global_batch {total} is not a multiple of --batch_size {config.data.batch_size} * {processes} processes = "
            f"{at_once}: use --global_batch {max(1, total // at_once) * at_once} or another --batch_size"
        )
    return total // at_once
