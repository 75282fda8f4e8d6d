"""Start accelerate's processes, device and precision as the launcher requests them, and check that it did.

accelerate and its launcher sometimes start something other than what was requested, silently. Every case that is known is
refused here, with advice on what to do instead.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import signal
import sys
from datetime import timedelta
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from vfi.config.configs import Config, ConfigError, accumulation

Sharding = Literal["none", "zero", "fsdp2"]
Precision = Literal["no", "bf16", "fp16"]
_PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def start_accelerator(config: Config) -> Accelerator:
    """Return an Accelerator with the processes, device and precision that the launcher requests.

    ConfigError where the launcher did something else, or where the request can't be met.
    """
    _end_with_launcher()
    world, sharding = int(os.environ.get("WORLD_SIZE", "1")), asked_sharding()
    _refuse_traps(world)
    if sharding == "zero":
        _refuse_zero()
    if sharding == "fsdp2":
        _refuse_fsdp()
    _refuse_precision(sharding)
    accelerator = Accelerator(
        gradient_accumulation_steps=accumulation(config, world),
        # with shards vfi/distributed/strategy.py sets autocast: DeepSpeed, and FSDP by accelerate, would also keep the weights
        # in half precision
        mixed_precision=asked_precision() if sharding == "none" else "no",
        kwargs_handlers=[_process_group(config, sharding)],
    )
    atexit.register(_destroy_gloo)
    _refuse_differences(accelerator, sharding, world, accumulation(config, world))
    return accelerator


def asked_sharding() -> Sharding:
    """Return the requested sharding: none (one process, or DDP), ZeRO or FSDP2."""
    return "zero" if _is_set("ACCELERATE_USE_DEEPSPEED") else "fsdp2" if _is_set("ACCELERATE_USE_FSDP") else "none"


def asked_precision() -> Precision:
    """Return the requested precision; by default bf16 autocast on a GPU that supports it, and fp32 ("no") elsewhere."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if asked is None:
        return "bf16" if _on_gpu() and _gpu_has_bf16() else "no"
    for precision in _PRECISIONS:
        if asked == precision:
            return precision
    raise ConfigError(f"mixed precision {asked!r} is not supported; use {', '.join(_PRECISIONS)} in the accelerate config")


def _end_with_launcher() -> None:
    """Have the kernel kill this rank once torchrun is gone, which ends its ranks itself unless it is killed.

    Ranks that torchrun started are in sessions of their own, which no signal to its group reaches. The other ranks would train
    on, and one that is stopped (SIGSTOP) would keep its GPU for ever.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _destroy_gloo() -> None:
    """Destroy a process group of Gloo before the process exits.

    Left to the end of the process, its threads sometimes abort a process that has done all its work (torch 2.14.1, every fourth
    run of two processes that only reduce a number); the launcher of another machine then waits 300 s for the one that failed.
    A group of NCCL ends with its process, and destroying it could wait for a rank that has failed.
    """
    if dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        dist.destroy_process_group()


def idle_gpus() -> int:
    """Return the number of GPUs of this machine that the run can see but does not use."""
    return torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _on_gpu() else 0


def _process_group(config: Config, sharding: Sharding) -> InitProcessGroupKwargs:
    # this time-out only matters if the run's watchdog fails, which knows better what hangs (vfi/distributed/watchdog.py)
    patience = timedelta(minutes=config.run.timeout_minutes + 1)
    if sharding == "zero" and not _on_gpu():  # the default is NCCL, or no process group at all
        return InitProcessGroupKwargs(backend="gloo", timeout=patience)
    return InitProcessGroupKwargs(timeout=patience)


def _refuse_traps(world: int) -> None:
    """Refuse what the launcher would do silently, whatever the sharding."""
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        on_cpu = "on a CPU: use ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m vfi.train …"
        with_one = "with a config for one process: use accelerate_configs/ddp.yaml"
        raise ConfigError(
            f"accelerate launch was asked for several processes but started one, as it does "
            f"{on_cpu if _uses_cpu() else with_one}, or --num_processes 1"
        )
    if (asked := _asked_processes()) not in (None, world):
        raise ConfigError(
            f"accelerate launch was asked for {asked} processes and started {world}: --num_processes counts those of all "
            f"machines, and must be a multiple of --num_machines"
        )
    if world > 1 and not torch.cuda.is_available() and not _uses_cpu() and asked_sharding() != "zero":
        raise ConfigError(
            f"{world} processes were started and no GPU is visible: accelerate would train {world} times on its own. "
            f"On a CPU use ACCELERATE_USE_CPU=true torchrun --nproc_per_node {world} -m vfi.train …"
        )
    if _on_gpu() and idle_gpus() < 0:
        raise ConfigError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes were started on a machine with {torch.cuda.device_count()} visible "
            f"GPUs: accelerate would let some share a GPU. Use --num_processes (of all machines) to match, see "
            f"CUDA_VISIBLE_DEVICES"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise ConfigError("the accelerate config has a dynamo_backend: leave it out, and compile by --compile")


def _asked_processes() -> int | None:
    """Return --num_processes of the `accelerate launch` that started this process; None without such a launcher or flag.

    accelerate rounds the number down to the same one on each machine, and does not pass on the original.
    """
    words = (psutil.Process().parent() or psutil.Process()).cmdline()
    if not any("accelerate" in word for word in words):
        return None
    for (flag, _, value), following in zip((word.partition("=") for word in words), [*words[1:], ""], strict=True):
        if flag.replace("-", "_") == "__num_processes" and (value or following).isdecimal():
            return int(value or following)
    return None


def _refuse_zero() -> None:
    """Refuse settings that DeepSpeed through accelerate would not follow."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("ZeRO needs DeepSpeed, which is not installed: pip install -e '.[deepspeed]'")
    if _uses_cpu():
        raise ConfigError(
            "with ACCELERATE_USE_CPU accelerate trains by DDP where ZeRO was asked for: unset it (without a GPU ZeRO finds the "
            "CPU by itself), and leave use_cpu and --cpu out"
        )
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError("ZeRO needs a launcher: accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml …")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise ConfigError(
            "deepspeed_config_file is not supported: batch size, accumulation, clipping and precision are those of the run. "
            "Give zero_stage alone, as accelerate_configs/deepspeed_zero2.yaml does"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") not in ("1", "2", "3"):
        raise ConfigError(f"zero_stage is {os.environ['ACCELERATE_DEEPSPEED_ZERO_STAGE']}; it must be 1, 2 or 3")
    _refuse_set("ACCELERATE_GRADIENT_CLIPPING", "auto", "gradient_clipping (use --clip_norm)")
    _refuse_set("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "offload_optimizer_device")
    _refuse_set("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "offload_param_device")


def _refuse_fsdp() -> None:
    """Refuse FSDP settings that would have no effect: vfi/distributed/fsdp.py makes the shards, not accelerate."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP is supported in its version 2: set fsdp_version: 2, as accelerate_configs/fsdp2.yaml does")
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError("FSDP2 needs a launcher: accelerate launch --config_file accelerate_configs/fsdp2.yaml …")
    _refuse_set("FSDP_RESHARD_AFTER_FORWARD", "true", "fsdp_reshard_after_forward")
    _refuse_set("FSDP_OFFLOAD_PARAMS", "false", "fsdp_offload_params")
    _refuse_set("FSDP_ACTIVATION_CHECKPOINTING", "false", "fsdp_activation_checkpointing (use --checkpointing)")
    _refuse_set("FSDP_AUTO_WRAP_POLICY", "", "fsdp_auto_wrap_policy (each LGS block, flow stage and RefineNet is one unit)")
    _refuse_set("FSDP_IGNORED_MODULES", "", "fsdp_ignored_modules")


def _refuse_set(variable: str, harmless: str, name: str) -> None:
    if (value := os.environ.get(variable, harmless).lower()) != harmless:
        raise ConfigError(f"the accelerate config sets {name} to {value}, which is not supported: leave it out")


def _refuse_precision(sharding: Sharding) -> None:
    """Refuse fp16 and bf16 where they would mean something else, or fail during training."""
    precision = asked_precision()
    if precision == "fp16" and not _on_gpu():
        raise ConfigError("mixed precision fp16 needs a GPU (accelerate trains in fp32 on a CPU): use no, or bf16, there")
    if precision == "fp16" and sharding != "none":
        raise ConfigError("mixed precision fp16 is supported on one process and with DDP: use bf16 with ZeRO and FSDP2")
    if precision == "bf16" and _on_gpu() and not _gpu_has_bf16():
        raise ConfigError(f"{torch.cuda.get_device_name()} has no bf16: use mixed_precision: fp16 in the accelerate config")


def _refuse_differences(accelerator: Accelerator, sharding: Sharding, world: int, accumulated: int) -> None:
    """Check that what was started is what was requested."""
    if accelerator.num_processes != world:
        raise ConfigError(f"the launcher started {world} processes, accelerate sees {accelerator.num_processes}")
    kinds = {"none": _WHOLE, "zero": (DistributedType.DEEPSPEED,), "fsdp2": (DistributedType.FSDP, *_WHOLE)}[sharding]
    if accelerator.distributed_type not in kinds:
        asked = " or ".join(kind.value for kind in kinds)
        raise ConfigError(
            f"accelerate runs by {accelerator.distributed_type.value} where {asked} was asked for: use a config of "
            f"accelerate_configs/"
        )
    if accelerator.gradient_accumulation_steps != accumulated:
        raise ConfigError(
            f"the accelerate config asks for {accelerator.gradient_accumulation_steps} accumulated batches, the run for "
            f"{accumulated}: leave gradient_accumulation_steps out, it follows from --global_batch"
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on", "y", "t")  # as accelerate reads it


def _uses_cpu() -> bool:
    return _is_set("ACCELERATE_USE_CPU")


def _on_gpu() -> bool:
    return torch.cuda.is_available() and not _uses_cpu()


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
