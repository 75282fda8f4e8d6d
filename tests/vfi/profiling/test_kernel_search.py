"""Search, storage and use of a kernel's fastest options: with invented times, and on a GPU with its own."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from vfi import tune_kernels
from vfi.config import presets
from vfi.model.ss2d import SS2D
from vfi.model.window_attention import GatedWindowAttention
from vfi.ops.loss.laplacian import laplacian_loss
from vfi.ops.pointwise.dispatch import set_fused_ops
from vfi.ops.triton import launch_config, tuned_configs
from vfi.profiling import kernel_search
from vfi.profiling.kernel_search import Found, Part, as_entries, candidates, fastest, parts_of, search
from vfi.training.synthetic_step import TrainingStep

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
DEFAULT = {"num_warps": 4, "num_stages": 3}
CLASS = (torch.bfloat16, 32)


class MadeUp(Part):
    """Launches one kernel, whose time and results follow from its options by functions."""

    def __init__(
        self, time: Callable[[launch_config.Options], float], results: Callable[[launch_config.Options], list[Tensor]]
    ) -> None:
        super().__init__(nn.Identity(), (torch.zeros(1),), torch.float32)
        self.time, self.results = time, results

    def __call__(self) -> list[Tensor]:
        self.options = launch_config.configuration("kernel", CLASS, DEFAULT, CPU)
        return self.results(self.options)

    def milliseconds(self, kernel: str) -> float:
        assert kernel == "kernel"
        self()
        return self.time(self.options)


def same(options: launch_config.Options) -> list[Tensor]:
    return [torch.ones(3)]


def test_the_fastest_is_found_option_by_option():
    part = MadeUp(lambda o: 5 - (o["num_warps"] == 2) - 2 * (o["num_warps"] == 2 and o["num_stages"] == 4), same)
    (found,) = search([part], known=())
    assert found == Found("kernel", CLASS, DEFAULT, {"num_warps": 2, "num_stages": 4}, 5, 2, tried=6, skipped=0)
    assert str(found) == (
        "kernel (torch.bfloat16, 32): 5.0000 ms -> 2.0000 ms with num_warps 2, num_stages 4; 6 tried, 0 of them can't be taken"
    )
    assert launch_config.configuration("kernel", CLASS, DEFAULT, CPU) is DEFAULT  # as before the search


def test_times_of_all_parts_count():
    """What helps one and harms the other more is left."""
    one = MadeUp(lambda o: 4 - 2 * (o["num_warps"] == 8) - (o["num_warps"] == 2), same)
    other = MadeUp(lambda o: 4 + 3 * (o["num_warps"] == 8), same)
    (found,) = search([one, other], known=())
    assert found.options == {"num_warps": 2, "num_stages": 3}
    assert (found.before, found.after) == (8, 7)


@pytest.mark.parametrize(("time", "taken"), [(0.98, 4), (0.96, 8)])
def test_a_small_gain_is_none(time, taken):
    (found,) = search([MadeUp(lambda o: time if o["num_warps"] == 8 else 1.0, same)], known=())
    assert found.options["num_warps"] == taken
    assert found.after == (time if taken == 8 else 1.0)
    assert bool(as_entries([found])) == (taken == 8)


@needs_triton
def test_what_fails_or_computes_something_else_is_skipped():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    errors = {1: CompilationError(None, None, "too many registers"), 2: OutOfResources(300, 227, "shared memory")}

    def results(options: launch_config.Options) -> list[Tensor]:
        if error := errors.get(options["num_stages"]):
            raise error
        if options["num_stages"] == 4:
            raise RuntimeError("PassManager::run failed")
        return [torch.full((3,), {1: torch.nan, 2: 1.1, 4: 1.0, 8: 1 + 1e-6}[options["num_warps"]])]

    (found,) = search([MadeUp(lambda o: 1 / o["num_stages"] + abs(o["num_warps"] - 1), results)], known=())
    assert found.options == DEFAULT
    assert (found.tried, found.skipped) == (6, 5)  # but for 8 warps, which are slower


def test_other_errors_are_not_hidden():
    def results(options: launch_config.Options) -> list[Tensor]:
        if options["num_warps"] == 8:
            raise RuntimeError("an illegal memory access")
        return [torch.ones(3)]

    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(search([MadeUp(lambda o: 1.0, results)], known=()))


def test_what_is_known_is_not_searched_for():
    part = MadeUp(lambda o: 1.0, same)
    (found,) = search([part], known=())
    assert list(search([part], known={found.key})) == []


def test_candidates():
    assert candidates("convolve", "BLOCK", 32) == [8, 16, 64]
    assert candidates("gated_norm", "BLOCK", 2) == [1, 4]
    assert candidates("scan", "maxnreg", 0) == [0, 128, 168]
    assert candidates("scan_gradients", "num_stages", 3) == [1, 2, 3, 4]
    assert candidates("scan", "num_stages", 3) == [2, 3, 4]
    assert candidates("scan_gradients", "num_warps", 4) == [2, 4, 8]
    measured: list[dict[str, int]] = []
    fastest(DEFAULT, lambda option: candidates("scan", option, DEFAULT[option]), lambda o: measured.append(o) or 1.0)
    assert measured == [
        DEFAULT,
        *(DEFAULT | {"num_warps": n} for n in (1, 2)),
        *(DEFAULT | {"num_stages": n} for n in (2, 4)),
    ]


def test_what_was_found_is_read_back(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned_configs, "FILE", tmp_path / "kernels.json")
    monkeypatch.setattr(tuned_configs, "card", lambda device: "sm_90, triton 3.6")
    shape_class = (torch.bfloat16, torch.float32, 32, True, "tf32x3")
    fast = {"num_warps": 2, "num_stages": 4}
    found = [
        Found("scan", shape_class, DEFAULT, fast, 2, 1, 5, 0),
        Found("scan", (torch.float32,), DEFAULT, DEFAULT, 2, 2, 5, 0),
    ]
    tune_kernels.write(tuned_configs.FILE, "sm_90, triton 3.6", {"device": "H100", "fused": as_entries(found)})
    launch_config.known.cache_clear()
    try:
        assert launch_config.known(torch.device("cuda", 0)) == {("scan", shape_class): fast}
    finally:
        launch_config.known.cache_clear()


def test_registers_that_are_left_to_the_compiler_are_not_kept():
    default = {"num_warps": 4, "maxnreg": 0}
    found = Found("scan", (torch.bfloat16, 32), default, default | {"num_warps": 8}, 2, 1, 5, 0)
    assert as_entries([found]) == {"scan": [{"key": ["torch.bfloat16", 32], "config": {"num_warps": 8}}]}


def test_the_parts_of_a_step_run_alone():
    """On a CPU by plain torch: one of each kind, with what it was given and gradients for all of it."""
    config = presets.override(presets.tiny(), batch_size=1, crop=64)
    step = TrainingStep(config, CPU, torch.float32)
    parts = parts_of(step)
    kinds = {(type(part.run), part.tensors[0].shape) for part in parts}
    assert len(kinds) == len(parts) == 4  # two stages of the backbone
    assert all(isinstance(part.run, SS2D | GatedWindowAttention) for part in parts)
    for part in parts:
        y, *gradients = part()
        assert y.shape == part.tensors[0].shape
        assert len(gradients) == 1 + len(list(part.run.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert part.agrees(part(), [y, *gradients])
        assert not part.agrees(part(), [y, *(1.01 * gradient for gradient in gradients)])
    assert all(not module._forward_pre_hooks for module in step.model.modules())
    assert list(search(parts, known=())) == []


def searched_between_convolutions() -> list[Found]:
    """Kernels that are interpreted, on small maps of a step, by times that are made up: the smaller an option the faster."""
    step = TrainingStep(presets.override(presets.tiny(), batch_size=1, crop=64, phase=2), CPU, torch.float32)
    set_fused_ops(step.model, importlib.import_module("vfi.ops.pointwise.dispatch")._import())
    small = [part for part in parts_of(step) if part.tensors[0].numel() <= 2**13 and not isinstance(part.run, nn.Module)]
    parts = list({(part.run, len(part.tensors)): part for part in small}.values())  # with and without a residual …
    chooser = kernel_search._Chooser()

    def milliseconds(part: Part, kernel: str) -> float:
        return float(sum(sum(options.values()) for (name, _), options in chooser.taken.items() if name == kernel))

    with (
        mock.patch.object(kernel_search, "_Chooser", return_value=chooser),
        mock.patch.object(Part, "milliseconds", milliseconds),
        mock.patch.multiple(kernel_search, _FACTORS=(0.5, 2), _VALUES={"num_warps": (2, 8)}),
    ):
        return list(search(parts, known=()))


@needs_triton
def test_kernels_between_convolutions_compute_the_same_with_all_options(interpreter):
    found = interpreter.submit(searched_between_convolutions).result()
    assert {one.kernel for one in found} == {
        "bias_prelu_forward", "bias_prelu_backward", "stack_maps", "unstack_maps", "warp_forward", "warp_backward",
        "layer_norm_forward", "layer_norm_backward",
    }  # fmt: skip
    assert len({one.key for one in found}) == len(found)
    for one in found:
        assert one.skipped == 0, one
        smallest = {name: min(2, value) if name == "num_warps" else max(1, value // 2) for name, value in one.default.items()}
        assert one.options == smallest


@needs_triton
def test_the_loss_is_a_part(monkeypatch):
    """Here its pyramids are made by PyTorch."""

    def in_torch(images: Tensor, levels: int) -> Tensor:
        return laplacian_loss(images, torch.zeros_like(images[0]), "torch")

    monkeypatch.setattr("vfi.ops.loss.laplacian_kernels.pyramid_sizes", in_torch)
    for module in ("vfi.ops.loss.laplacian", "vfi.profiling.kernel_search"):
        monkeypatch.setattr(f"{module}.choose_loss", lambda backend, device: (backend != "torch", ""))
    step = TrainingStep(presets.override(presets.tiny(), batch_size=2, crop=64), CPU, torch.float32)
    (part,) = [part for part in parts_of(step) if part.run is in_torch]
    sizes, gradient = part()
    assert sizes.shape == (1,)
    assert gradient.shape == (1, 2, 3, 64, 64)


def anything_else(default, values, measure) -> tuple[launch_config.Options, int, int]:
    """`fastest`, by times that are a thousandth of those measured where options aren't the default."""

    def faster(options: launch_config.Options) -> float | None:
        time = measure(options)
        assert time is None or time > 0
        return time if time is None or options == default else time / 1000

    return fastest(default, values, faster)


@pytest.mark.gpu
def test_gpu_what_is_found_is_used_and_computes_the_same(monkeypatch, tmp_path):
    """The job with few candidates, on tiny. What differs from the code is taken for faster, so that all of it is found."""
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(tuned_configs, "FILE", tmp_path / "kernels.json")
    tuned_configs.FILE.write_text("{}")
    monkeypatch.setattr(kernel_search, "_VALUES", {"num_warps": (2, 8), "num_stages": (), "TOKENS": ()})
    monkeypatch.setattr(kernel_search, "_FACTORS", (0.5,))
    monkeypatch.setattr(kernel_search, "_GAIN", 1000)
    monkeypatch.setattr(kernel_search, "_SHORTEST_GAIN", -1000)
    monkeypatch.setattr(kernel_search, "fastest", anything_else)
    monkeypatch.setattr(tune_kernels, "kernel_obstacle", lambda device: "mamba-ssm has a test of its own")
    launch_config.known.cache_clear()
    try:
        config = presets.override(presets.tiny(), batch_size=2, crop=128, phase=2)
        parts = parts_of(TrainingStep(config, device, torch.bfloat16))
        plain = [part() for part in parts]
        job = tune_kernels.Options(presets=("tiny",), precisions=("bf16",), batch_size=2, crop=128, out=tuned_configs.FILE)
        lines = list(tune_kernels.tune(job))
        print(*lines, sep="\n")
        fused: dict[str, list[dict[str, Any]]] = json.loads(tuned_configs.FILE.read_text())[tuned_configs.card(device)]["fused"]

        launch_config.known.cache_clear()
        taken, configuration = dict[str, launch_config.Options](), launch_config.configuration

        def note(kernel, shape_class, default, device):
            taken[kernel] = configuration(kernel, shape_class, default, device)
            (found,) = [one["config"] for one in fused[kernel] if one["key"] == launch_config.written(shape_class)]
            assert taken[kernel] == default | found != default
            return taken[kernel]

        monkeypatch.setattr(launch_config, "configuration", note)
        for part, wanted in zip(parts, plain, strict=True):
            assert part.agrees(part(), wanted)
        some = {"scan", "scan_gradients", "window_attention_forward", "bias_prelu_backward", "unstack_maps", "pyramid_band"}
        assert some < set(taken) == set(fused)
    finally:
        launch_config.known.cache_clear()
