#!/usr/bin/env bash
# torch 2.14.1: torch.optim.swa_utils.AveragedModel cannot average a model that fully_shard (FSDP2) has split.
# Behaviour:  AveragedModel copies the model by copy.deepcopy; fully_shard replaces __deepcopy__ of the model by one that raises.
#             Neither's documentation mentions the other.
# Output seen: AssertionError: FSDP does not support deepcopy. Please use state dict for serialization.
#             Averaging the parameters, which are DTensors, by torch._foreach_lerp_ works and gives the value by hand.
# Expected:   torch's way to average weights works with torch's way to split them, or says so in its documentation.
# Exit code 1 if the behaviour changes. One process on the CPU, through Gloo.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
venv=${FINDING_VENV:-$tmp/venv}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch==2.14.1 numpy
"$venv/bin/python" - <<'P'
import os
import socket

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
dist.init_process_group("gloo")
model = torch.nn.Linear(4, 4, bias=False)
torch.nn.init.ones_(model.weight)
AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # of the whole model it works
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
try:
    AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
except AssertionError as error:
    print(f"AssertionError: {error}")
else:
    raise SystemExit("changed: AveragedModel takes a model of fully_shard")

average = [parameter.detach().clone() for parameter in model.parameters()]
with torch.no_grad():
    model.weight.zero_()
torch._foreach_lerp_(average, [parameter.detach() for parameter in model.parameters()], 0.1)
value = average[0].full_tensor()
print(f"by hand: {type(average[0]).__name__} {value.unique().tolist()}")
assert torch.allclose(value, torch.full((4, 4), 0.9))
dist.destroy_process_group()
print("as described")
P
