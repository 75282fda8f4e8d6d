"""Tuned configurations: kernels use the stored ones for their GPU and shape class, and search for the others."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from vfi import tune_kernels
from vfi.config import presets
from vfi.errors import JobError
from vfi.ops.ssm import ssd
from vfi.ops.triton import launch_config, tuned_configs
from vfi.profiling.kernel_search import Found
from vfi.training.synthetic_step import TrainingStep

triton = pytest.importorskip("triton", reason="triton is not installed: kernels that it tunes can't be made")
FAST = {"kwargs": {"BLOCK": 64}, "num_warps": 2, "num_stages": 4}
KEY = [16, True, "torch.float32", "torch.bfloat16"]


class Kernel:
    """In place of a compiled kernel: keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    @staticmethod
    def fn(x, y, width, causal, BLOCK):
        """Whose arguments these are."""

    def run(self, *args, **kwargs):
        self.calls.append(kwargs)


@pytest.fixture
def tuner(monkeypatch):
    """A kernel of two configurations, in a module of the package; how often it was measured is `measured`."""
    module = types.ModuleType("mamba_ssm.ops.triton.made")
    configs = [triton.Config({"BLOCK": block}, num_warps=2, num_stages=4, pre_hook=lambda given: None) for block in (32, 64)]
    made = triton.runtime.Autotuner(Kernel(), ["x", "y", "width", "causal"], configs, ["width", "causal"], None, None)
    monkeypatch.setattr(made.base_fn, "__module__", module.__name__)
    made.measured = []
    monkeypatch.setattr(
        made, "_bench", lambda *args, config, **rest: made.measured.append(config) or [config.kwargs["BLOCK"]] * 3
    )
    module.kernel = made
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def call(tuner, width: int = 16) -> dict[str, object]:
    tuner.run(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16), width, True)
    return tuner.fn.calls[-1]


def test_what_was_kept_is_taken_without_measuring(tuner):
    assert tuned_configs.fill(tuned_configs.tuners(), {"fn": [{"key": KEY, "config": FAST}]}) == 1
    assert call(tuner)["BLOCK"] == 64
    assert tuner.best_config.pre_hook is not None  # it is the kernel's own configuration, with all that belongs to it
    assert not tuner.measured
    call(tuner, width=32)
    assert len(tuner.measured) == 2  # another shape class


def test_what_was_found_can_be_kept(tuner):
    assert call(tuner)["BLOCK"] == 32  # by the times above
    (known,) = tuned_configs.found(tuned_configs.tuners())["fn"]
    assert known == {"key": KEY, "config": FAST | {"kwargs": {"BLOCK": 32}}}
    assert json.loads(json.dumps(known)) == known


def test_a_configuration_that_the_kernel_does_not_have_is_left_out(tuner):
    for wrong in ({"kwargs": {"BLOCK": 128}}, {"num_warps": 4}, {"num_stages": 3}):
        assert tuned_configs.fill(tuned_configs.tuners(), {"fn": [{"key": KEY, "config": FAST | wrong}]}) == 0
    assert tuned_configs.fill(tuned_configs.tuners(), {"another": [{"key": KEY, "config": FAST}]}) == 0
    call(tuner)
    assert len(tuner.measured) == 2


def test_the_file_goes_by_generation_and_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuned_configs.importlib.metadata, "version", lambda name: "3.6.1")
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"sm_80, triton 3.6": {"kernels": {"a": []}}}))
    tune_kernels.write(path, "sm_90, triton 3.6", {"device": "H100", "kernels": {"b": []}})
    assert tuned_configs.entry(torch.device("cuda"), path) == {"b": []}
    monkeypatch.setattr(tuned_configs.importlib.metadata, "version", lambda name: "3.7.0")
    assert tuned_configs.entry(torch.device("cuda"), path) == {}
    assert set(json.loads(path.read_text())) == {"sm_80, triton 3.6", "sm_90, triton 3.6"}


def test_kernels_that_were_not_tuned_stay_in_the_file(tmp_path):
    path, card = tmp_path / "kernels.json", "sm_90, triton 3.6"
    kernels, ours = ({name: [{"key": [16], "config": {"num_warps": 2}}]} for name in ("theirs", "scan"))
    tune_kernels.write(path, card, {"device": "H100", "kernels": kernels})
    tune_kernels.write(path, card, {"device": "H100", "triton": "3.6.0", "fused": ours})
    assert json.loads(path.read_text()) == {card: {"device": "H100", "triton": "3.6.0", "kernels": kernels, "fused": ours}}
    tune_kernels.write(path, card, {"device": "H100", "fused": {}})
    assert json.loads(path.read_text())[card]["fused"] == {}


def test_what_was_found_first_stays():
    known, new = ({"a": [{"key": [1], "config": name}]} for name in ("old", "new"))
    new["a"].append({"key": [0], "config": "other"})
    new["b"] = []
    assert tune_kernels.merge(known, new) == {"a": [{"key": [0], "config": "other"}, {"key": [1], "config": "old"}], "b": []}


def test_the_file_in_the_tree_can_be_read():
    for card, content in json.loads(tuned_configs.FILE.read_text()).items():
        assert card.startswith("sm_")
        assert content["device"]
        for known in content["kernels"].values():
            assert all(one.keys() == {"key", "config"} and one["config"].keys() == FAST.keys() for one in known)
        for kernel, known in content.get("fused", {}).items():
            warps = "PIXELS" if kernel in ("stack_maps", "unstack_maps") else "num_warps"  # the former follow from the pixels
            assert all(one.keys() == {"key", "config"} and warps in one["config"] for one in known)
            assert all(isinstance(value, int) and value > 0 for one in known for value in one["config"].values())


def test_without_a_gpu_there_is_nothing_to_tune(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as stop:
        tune_kernels.main([])
    assert stop.value.code == 2
    assert "there is no CUDA GPU here" in capsys.readouterr().err


@pytest.fixture
def without_mamba_ssm(monkeypatch):
    """A GPU, as far as the job asks for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(tuned_configs, "card", lambda device: "sm_90, triton 3.6")
    monkeypatch.setattr(tune_kernels, "environment", lambda device: {"packages": {"torch": "2.11.0", "rich": "14.0.0"}})
    monkeypatch.setattr(tune_kernels, "free_memory", lambda: None)
    monkeypatch.setattr(tune_kernels, "why_unavailable", lambda device: None)
    monkeypatch.setattr(tune_kernels, "kernel_obstacle", lambda device: "mamba_ssm is not installed")


def test_without_mamba_ssm_ours_are_tuned(without_mamba_ssm, monkeypatch, tmp_path):
    asked, plain, fast = [], {"num_warps": 4}, {"num_warps": 2}

    def search_step(step, known):
        asked.append((step, known))
        kernels = {1: "scan", 2: "convolve", 3: "scan", 4: "gated_norm"}
        return [Found(kernels[len(asked)], (len(asked),), plain, fast if len(asked) < 4 else plain, 2, 1, 3, 0)]

    monkeypatch.setattr(tune_kernels, "TrainingStep", lambda config, device, precision: (config.run.preset, precision))
    monkeypatch.setattr(tune_kernels, "search_step", search_step)
    path = tmp_path / "kernels.json"
    lines = list(tune_kernels.tune(tune_kernels.Options(presets=("tiny", "base"), out=path)))
    both = torch.bfloat16, torch.float32
    assert [step for step, _ in asked] == [(preset, precision) for preset in ("tiny", "base") for precision in both]
    assert asked[-1][1] == {("scan", (1,)), ("convolve", (2,)), ("scan", (3,))}
    assert len(lines) == 4 + 2 + 1
    assert lines[-2].startswith("base: so far 3 of 4 configurations of the fused Triton kernels are changed")
    assert json.loads(path.read_text()) == {
        "sm_90, triton 3.6": {
            "device": "H100",
            "torch": "2.11.0",
            "kernels": {},
            "fused": {
                "convolve": [{"key": [2], "config": fast}],
                "scan": [{"key": [1], "config": fast}, {"key": [3], "config": fast}],
            },
        }
    }


def test_what_is_not_tuned_now_stays(without_mamba_ssm, monkeypatch, tmp_path):
    """One precision: a class that it has found again, one that turns out as fast as the code has it, and two of other calls."""

    def entry(key: list[object], warps: int) -> dict[str, object]:
        return {"key": key, "config": {"num_warps": warps}}

    path, asked, half, full = tmp_path / "kernels.json", [], (torch.bfloat16, 32), (torch.float32, 32)

    def search_step(precision, known):
        asked.append(precision)
        yield Found("scan", half, {"num_warps": 4}, {"num_warps": 2}, 2, 1, 3, 0)
        yield Found("convolve", half, {"num_warps": 4}, {"num_warps": 4}, 2, 2, 3, 0)

    both, other = [entry(["torch.bfloat16", 32], 8), entry(["torch.float32", 32], 8)], [entry([], 1)]
    tune_kernels.write(
        path, "sm_90, triton 3.6", {"device": "H100", "fused": {"scan": both, "convolve": both[:1], "carry_states": other}}
    )
    monkeypatch.setattr(tune_kernels, "TrainingStep", lambda config, device, precision: precision)
    monkeypatch.setattr(tune_kernels, "search_step", search_step)
    list(tune_kernels.tune(tune_kernels.Options(presets=("base",), precisions=("bf16",), out=path)))
    assert asked == [torch.bfloat16]
    fused = json.loads(path.read_text())["sm_90, triton 3.6"]["fused"]
    assert fused == {"carry_states": other, "scan": [entry(["torch.bfloat16", 32], 2), both[1]]}
    assert launch_config.written(full) == both[1]["key"]


def test_without_any_kernels_there_is_nothing_to_tune(without_mamba_ssm, monkeypatch):
    monkeypatch.setattr(tune_kernels, "why_unavailable", lambda device: "too old for ours")
    with pytest.raises(JobError, match="nothing to be tuned: too old for ours; mamba_ssm is not installed"):
        list(tune_kernels.tune(tune_kernels.Options()))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_on_a_card_that_is_known_nothing_is_measured(preset, monkeypatch):
    device = torch.device("cuda")
    if not tuned_configs.entry(device):
        pytest.skip(f"{tuned_configs.card(device)} is not in {tuned_configs.FILE.name}")
    if reason := ssd.kernel_obstacle(device):
        pytest.skip(reason)
    ssd.import_kernel.cache_clear()
    ssd.import_kernel()
    measured = []
    monkeypatch.setattr(triton.runtime.Autotuner, "_bench", lambda self, *args, **rest: measured.append(self) or [1.0] * 3)
    config = presets.override(presets.get(preset), batch_size=2, crop=128, ssd_backend="mamba_ssm")
    step = TrainingStep(config, device, torch.bfloat16)
    step(step.make_frames())
    assert not measured
