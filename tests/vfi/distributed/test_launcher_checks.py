"""What the launcher asks for is done, or refused by name: with its variables, and with a stand-in for accelerate."""

from __future__ import annotations

import datetime
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from vfi.config import presets
from vfi.config.configs import ConfigError
from vfi.distributed import launcher_checks

CPU = {"ACCELERATE_USE_CPU": "true"}
TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
ZERO = TWO | {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP2 = TWO | CPU | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CONFIG = presets.override(presets.get("tiny"), batch_size=2, global_batch=8)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """No variable of a launcher is set, and there is no GPU."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in (*TWO, "RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def asked(monkeypatch):
    """asked(variables) -> what accelerate is asked for; it does so, but for what is given otherwise."""

    def start(variables: dict[str, str], **otherwise: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}
        kinds = {"zero": DistributedType.DEEPSPEED, "fsdp2": DistributedType.MULTI_CPU, "none": DistributedType.MULTI_CPU}

        def accelerator(**arguments: Any) -> SimpleNamespace:
            given.update(arguments)
            does = {
                "num_processes": int(variables.get("WORLD_SIZE", "1")),
                "distributed_type": kinds[launcher_checks.asked_sharding()],
                "gradient_accumulation_steps": arguments["gradient_accumulation_steps"],
            }
            return SimpleNamespace(**does | otherwise)

        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(launcher_checks, "Accelerator", accelerator)
        launcher_checks.start_accelerator(CONFIG)
        return given

    return start


@pytest.fixture
def gpus(monkeypatch):
    """gpus(count, bf16): so many of them are visible."""

    def pretend(count: int, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU of 2018")

    return pretend


REFUSED = {
    "one process of several on a CPU": (
        CPU | {"MASTER_ADDR": "127.0.0.1"},
        "several processes but started one, as it does on a CPU: use ACCELERATE_USE_CPU=true torchrun .*, or --num_processes 1",
    ),
    "one process of several": (
        {"ACCELERATE_USE_CPU": "false", "MASTER_ADDR": "127.0.0.1"},
        "several processes but started one, as it does with a config for one process: use accelerate_configs/ddp.yaml, or",
    ),
    "processes without a GPU": (TWO, "2 processes were started and no GPU is visible: accelerate would train 2 times"),
    "FSDP2 without a GPU": (FSDP2 | {"ACCELERATE_USE_CPU": "false"}, "2 processes were started and no GPU is visible"),
    "compiled by accelerate": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "has a dynamo_backend: leave it out"),
    "ZeRO on a CPU": (ZERO | CPU, "with ACCELERATE_USE_CPU accelerate trains by DDP where ZeRO was asked for: unset it"),
    "ZeRO without a launcher": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ZeRO needs a launcher"),
    "ZeRO by a file": (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "deepspeed_config_file is not supported"),
    "ZeRO-0": (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage is 0; it must be 1, 2 or 3"),
    "ZeRO that clips": (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, r"sets gradient_clipping \(use --clip_norm\) to 1.0"),
    "optimizer elsewhere": (
        ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        "sets offload_optimizer_device to cpu, which is not supported: leave it out",
    ),
    "weights elsewhere": (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "sets offload_param_device to nvme"),
    "FSDP 1": (FSDP2 | {"FSDP_VERSION": "1"}, "FSDP is supported in its version 2: set fsdp_version: 2"),
    "FSDP without a version": (TWO | CPU | {"ACCELERATE_USE_FSDP": "true"}, "FSDP is supported in its version 2"),
    "FSDP2 without a launcher": (CPU | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2 needs a launcher"),
    "FSDP2 that keeps weights": (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "sets fsdp_reshard_after_forward to false"),
    "FSDP2 elsewhere": (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "sets fsdp_offload_params to true"),
    "FSDP2 that recomputes": (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"\(use --checkpointing\) to true"),
    "FSDP2 in other units": (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "sets fsdp_auto_wrap_policy"),
    "FSDP2 of a part": (FSDP2 | {"FSDP_IGNORED_MODULES": "refine"}, "sets fsdp_ignored_modules to refine"),
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision 'fp8' is not supported; use no, bf16, fp16"),
    "fp16 on a CPU": (CPU | {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16 needs a GPU"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_starts(name, asked):
    variables, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as error:
        asked(variables)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variables", "count", "bf16", "words"),
    [
        (TWO, 1, True, "2 processes were started on a machine with 1 visible GPUs: accelerate would let some share a GPU"),
        (ZERO | {"ACCELERATE_MIXED_PRECISION": "fp16"}, 2, True, "fp16 is supported on one process and with DDP"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 1, False, "a GPU of 2018 has no bf16: use mixed_precision: fp16"),
    ],
)
def test_refused_on_gpus(asked, gpus, variables, count, bf16, words):
    gpus(count, bf16)
    with pytest.raises(ConfigError, match=words):
        asked(variables)


def test_zero_without_deepspeed_is_refused(asked, monkeypatch):
    monkeypatch.setattr(launcher_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ZeRO needs DeepSpeed, which is not installed: pip install -e '\.\[deepspeed\]'"):
        asked(ZERO)


@pytest.mark.parametrize(
    ("variables", "precision", "passed_on"),
    [({}, "no", "no"), (CPU, "no", "no"), (TWO | CPU, "bf16", "bf16"), (ZERO, "bf16", "no"), (FSDP2, "bf16", "no")],
)
def test_precision_is_passed_on_only_without_shards(asked, variables, precision, passed_on):
    """With shards DeepSpeed, or accelerate for FSDP, would make halves of the weights, too."""
    given = asked(variables | {"ACCELERATE_MIXED_PRECISION": precision})
    assert launcher_checks.asked_precision() == precision
    assert given["mixed_precision"] == passed_on


@pytest.mark.parametrize(("variables", "accumulated"), [(CPU, 4), (TWO | CPU, 2), (ZERO, 2), (FSDP2, 2)])
def test_accumulation_follows_from_the_processes(asked, variables, accumulated):
    assert asked(variables)["gradient_accumulation_steps"] == accumulated


@pytest.mark.parametrize(("variables", "backend"), [(ZERO, "gloo"), (TWO | CPU, None), (FSDP2, None)])
def test_processes_wait_for_each_other_longer_than_the_watch(asked, variables, backend):
    """ZeRO on a CPU would ask for NCCL."""
    (group,) = asked(variables)["kwargs_handlers"]
    assert group.timeout == datetime.timedelta(minutes=CONFIG.run.timeout_minutes + 1)
    assert "backend" not in group.to_kwargs() if backend is None else group.backend == backend


def test_zero_on_gpus_keeps_their_backend(asked, gpus):
    gpus(2)
    (group,) = asked(ZERO)["kwargs_handlers"]
    assert "backend" not in group.to_kwargs()


@pytest.mark.parametrize(
    ("variables", "otherwise", "words"),
    [
        (TWO | CPU, {"num_processes": 1}, "the launcher started 2 processes, accelerate sees 1"),
        (ZERO, {"distributed_type": DistributedType.MULTI_CPU}, "accelerate runs by MULTI_CPU where DEEPSPEED was asked for"),
        (
            CPU,
            {"distributed_type": DistributedType.FSDP},
            "accelerate runs by FSDP where NO or MULTI_GPU or MULTI_CPU was",
        ),
        (FSDP2, {"distributed_type": DistributedType.DEEPSPEED}, "accelerate runs by DEEPSPEED where FSDP"),
        (ZERO, {"gradient_accumulation_steps": 8}, "asks for 8 accumulated batches, the run for 2"),
    ],
)
def test_what_accelerate_does_otherwise_is_noticed(asked, variables, otherwise, words):
    with pytest.raises(ConfigError, match=words):
        asked(variables, **otherwise)


def test_precision_without_a_word_is_the_best_that_the_device_has(monkeypatch, gpus):
    assert launcher_checks.asked_precision() == "no"
    gpus(1)
    assert launcher_checks.asked_precision() == "bf16"
    gpus(1, bf16=False)
    assert launcher_checks.asked_precision() == "no"
    gpus(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert launcher_checks.asked_precision() == "no"


def test_idle_gpus_are_those_beyond_the_processes(monkeypatch, gpus):
    assert launcher_checks.idle_gpus() == 0
    gpus(4)
    assert launcher_checks.idle_gpus() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launcher_checks.idle_gpus() == 0
