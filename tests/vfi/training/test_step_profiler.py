"""The profile of training steps: what the files hold, which steps they are of, and that training takes the same steps."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from unittest.mock import Mock, create_autospec

import pytest
import torch
from torch.cuda import memory

from vfi import train
from vfi.training.step_profiler import WARM_UP_STEPS, StepProfiler

FLAGS = [
    "--preset",
    "tiny",
    "--crop",
    "64",
    "--batch_size",
    "2",
    "--num_workers",
    "0",
    "--log_every",
    "1",
    "--warmup_steps",
    "2",
]


def profile_products(folder: Path, steps: int, taken: int, device: str = "cpu") -> None:
    """Take steps of one product each, the first of which is step 101."""
    with StepProfiler(folder, steps, torch.device(device)) as profiler:
        for number in range(101, 101 + taken):
            with profiler.step(number):
                torch.ones(16, 16, device=device) @ torch.ones(16, 16, device=device)


def events(path: Path) -> list[dict]:
    """Return the events of a trace."""
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def steps_of(path: Path) -> list[str]:
    """Return the names of the steps in a trace, in the order in which they began."""
    # on a GPU the trace holds each step once more, as the GPU saw it, in another category
    found = [event for event in events(path) if event["name"].startswith("step ") and event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


def test_trace_holds_the_steps_after_the_warm_up(tmp_path, messages):
    profile_products(tmp_path / "profile", steps=3, taken=WARM_UP_STEPS + 6)
    first = 101 + WARM_UP_STEPS
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == f"steps_{first}_to_{first + 2}.trace.json.gz"
    assert steps_of(trace) == [f"step {number}" for number in range(first, first + 3)]
    assert [event["name"] for event in events(trace)].count("aten::mm") == 3
    assert messages == [f"profile of steps {first} to {first + 2}: {tmp_path / 'profile'}"]


def test_trace_of_a_run_that_ends_early_holds_the_steps_so_far(tmp_path):
    profile_products(tmp_path, steps=3, taken=WARM_UP_STEPS + 2)
    first = 101 + WARM_UP_STEPS
    assert steps_of(tmp_path / f"steps_{first}_to_{first + 1}.trace.json.gz") == [f"step {first}", f"step {first + 1}"]


def test_trace_is_written_when_a_step_fails(tmp_path):
    first = 101 + WARM_UP_STEPS

    def fail_at(failing: int) -> None:
        with StepProfiler(tmp_path, 5, torch.device("cpu")) as profiler:
            for number in range(101, failing + 1):
                with profiler.step(number):
                    if number == failing:
                        raise RuntimeError("as a step may")

    with pytest.raises(RuntimeError, match="as a step may"):
        fail_at(first + 1)
    (trace,) = tmp_path.iterdir()
    assert trace.name == f"steps_{first}_to_{first}.trace.json.gz"
    assert f"step {first}" in steps_of(trace)


@pytest.mark.parametrize("taken", [1, WARM_UP_STEPS])
def test_without_a_step_after_the_warm_up_nothing_is_written(tmp_path, taken, messages):
    profile_products(tmp_path / "profile", steps=3, taken=taken)
    assert not (tmp_path / "profile").exists()
    assert messages == [f"--profile 3 recorded nothing: it begins after {WARM_UP_STEPS} steps, and there were fewer"]


def test_no_steps_are_profiled_unless_asked_for(tmp_path, messages):
    profile_products(tmp_path / "profile", steps=0, taken=WARM_UP_STEPS + 2)
    assert not messages
    assert not (tmp_path / "profile").exists()


@pytest.mark.usefixtures("one_thread")
def test_a_profiled_run_trains_to_the_bit_like_another(tmp_path, train_shards):
    flags = [*FLAGS, "--data_path", str(train_shards), "--output_dir", str(tmp_path), "--steps", str(WARM_UP_STEPS + 3)]
    losses = {}
    for name, more in (("plain", []), ("profiled", ["--profile", "2"])):
        train.main([*flags, "--exp_name", name, *more])
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows if row["event"] == "train"]
    assert losses["profiled"] == losses["plain"]
    assert not (tmp_path / "plain" / "profile").exists()
    first = WARM_UP_STEPS + 1
    trace = tmp_path / "profiled" / "profile" / f"steps_{first}_to_{first + 1}.trace.json.gz"
    assert steps_of(trace) == [f"step {first}", f"step {first + 1}"]
    assert {"aten::convolution", "aten::convolution_backward"} <= {event["name"] for event in events(trace)}


def test_memory_is_recorded_around_the_profiled_steps(tmp_path, monkeypatch):
    calls = Mock()
    for name in ("_record_memory_history", "_dump_snapshot"):
        calls.attach_mock(create_autospec(getattr(memory, name)), name)  # refuses arguments that this torch does not have
        monkeypatch.setattr(memory, name, getattr(calls, name))
    with StepProfiler(tmp_path, 2, torch.device("cuda")) as profiler:
        for number in range(1, WARM_UP_STEPS + 4):
            with profiler.step(number):
                calls.step(number)
    made = [name if name.startswith("_") else given[0] for name, given, _ in calls.mock_calls]
    steps = [*range(1, WARM_UP_STEPS + 1), "_record_memory_history", WARM_UP_STEPS + 1, WARM_UP_STEPS + 2]
    assert made == [*steps, "_dump_snapshot", "_record_memory_history", WARM_UP_STEPS + 3]
    start, stop = calls._record_memory_history.call_args_list
    assert (start.kwargs["enabled"], stop.kwargs["enabled"]) == ("all", None)
    path = tmp_path / f"steps_{WARM_UP_STEPS + 1}_to_{WARM_UP_STEPS + 2}.memory.pickle"
    calls._dump_snapshot.assert_called_once_with(str(path))


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_allocations_are_recorded(tmp_path):
    profile_products(tmp_path, steps=2, taken=WARM_UP_STEPS + 3, device="cuda")
    name = f"steps_{101 + WARM_UP_STEPS}_to_{102 + WARM_UP_STEPS}"
    assert "kernel" in {event.get("cat") for event in events(tmp_path / f"{name}.trace.json.gz")}
    snapshot = pickle.loads((tmp_path / f"{name}.memory.pickle").read_bytes())
    allocations = [entry for trace in snapshot["device_traces"] for entry in trace if entry["action"] == "alloc"]
    assert len(allocations) >= 2 * 3  # two factors and their product in each step
