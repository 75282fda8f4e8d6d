"""vfi model: counts against formulas and PyTorch's own counter, memory against a list of live tensors, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vfi import model_summary
from vfi.config import presets
from vfi.inference.loading import predict
from vfi.model.interpolator import FrameInterpolator
from vfi.model_summary import from_command_line, levels, main
from vfi.profiling import timing
from vfi.profiling.costs import REST, CostCounter, by_part, count, parameters_by_part, part_of, watch_parts
from vfi.profiling.timing import Rates, measure_parts

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> FrameInterpolator:
    """Two blocks a stage, so that one shifts its windows."""
    torch.manual_seed(0)
    return FrameInterpolator(dataclasses.replace(presets.tiny().model, depths=(2, 2), ssd_backend="reference")).eval()


class Wrapped(nn.Module):
    """One layer as a network of two frames and a timestep."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, img0, img1, timestep):
        return self.layer(torch.cat((img0, img1), dim=1))


# ---------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("refine", "refine"),
        ("refine.mix.0.weight", "refine"),
        ("flow.stages.2.body", "flow"),
        ("backbone", None),
        ("backbone.stem.1.0", "backbone stem"),
        ("backbone.stages.0.3", None),
        ("backbone.stages.0.3.branches", None),
        ("backbone.stages.0.3.branches.ss2d.in_proj", "stride 8 ss2d"),
        ("backbone.stages.1.0.norm2", "stride 16 norm"),
        ("backbone.stages.1.0.mixing1.gate", "stride 16 mixing"),
        ("", None),
    ],
)
def test_the_part_of_a_module(path, part) -> None:
    assert part_of(path) == part


def test_parameters_of_the_parts_are_all_parameters(model) -> None:
    numbers = parameters_by_part(model)
    assert sum(numbers.values()) == sum(p.numel() for p in model.parameters())
    assert numbers["refine"] == sum(p.numel() for p in model.refine.parameters())
    stage = model.backbone.stages[1]
    assert numbers["stride 16 attention"] == sum(p.numel() for block in stage for p in block.branches.attention.parameters())
    assert numbers[REST] == 0


def test_a_part_inside_a_part_is_counted_once() -> None:
    """The whole takes 1 + 1, `outer` 10 before and after it calls `inner`, which takes 100 each of two times."""
    now = 0

    def spend(amount: int) -> None:
        nonlocal now
        now += amount

    class Part(nn.Module):
        def forward(self, *inner):
            spend(10 if inner else 100)
            for part in inner:
                part()
            spend(10 if inner else 0)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner = Part(), nn.ModuleList([Part()])

        def forward(self):
            spend(1)
            self.outer(self.inner[0])
            self.inner[0]()
            spend(1)

    whole = Whole()
    with watch_parts(whole, lambda: now) as calls:
        whole()
    assert by_part(calls, lambda start, end: end - start) == {REST: 2, "outer": 20, "inner": 200}
    before = now
    whole()  # not watched any more
    assert len(calls) == 4
    assert now == 2 * before


# ----------------------------------------------------------------------------------------------------------------- MACs


@pytest.mark.parametrize(
    ("layer", "per_pixel"),
    [
        (nn.Conv2d(6, 5, 3, padding=1), 3 * 3 * 6 * 5),
        (nn.Conv2d(6, 8, 3, padding=1, stride=2), 3 * 3 * 6 * 8 / 4),
        (nn.Conv2d(6, 6, 5, padding=2, groups=3), 5 * 5 * 6 * 2),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(6, 4, 1)), 6 * 4),
        (nn.PReLU(6), 0),
    ],
)
def test_macs_of_one_layer(layer, per_pixel) -> None:
    cost = count(Wrapped(layer), 3, (40, 64), torch.float32)
    assert sum(cost.macs.values()) == cost.macs.get("layer", 0) == 3 * 40 * 64 * per_pixel


def test_macs_of_attention_in_windows(model) -> None:
    """Per token: 4 C^2 + C * heads (gate) for the projections; over whole windows: 2 * window^2 * C a token."""
    H, W, C, heads = 64, 96, 64, 4
    cost = count(model, 1, (H, W), torch.float32)
    h, w = H // 8, W // 8
    projections = 2 * 2 * h * w * (4 * C * C + C * heads)  # two blocks, two frames
    windows = 2 * (math.ceil(h / 8) * math.ceil(w / 8) + math.ceil((h + 4) / 8) * math.ceil((w + 4) / 8))  # plain, shifted
    assert cost.macs["stride 8 attention"] == projections + windows * 64 * 2 * 64 * C


def test_macs_of_the_scan_follow_the_formula_that_is_shown(model) -> None:
    for batch, size in ((1, (64, 96)), (2, (80, 112))):
        cost = count(model, batch, size, torch.float32)
        found = levels(model, batch, size)
        for level in found[3:]:
            C, inner, state = level.channels, 2 * level.channels, 16
            tokens = 2 * batch * level.tokens
            projections = 2 * tokens * (C * (2 * inner + 2 * state + inner // 16) + inner * C)  # two blocks
            assert cost.macs[f"stride {level.stride} ss2d"] == projections + level.scan_macs
        assert cost.by_kind["batched products"] == sum(level.scan_macs or 0 for level in found)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_parts_add_up_to_what_pytorch_counts(phase, precision) -> None:
    network = FrameInterpolator(dataclasses.replace(presets.tiny().model, phase=phase, mixing="mhc")).eval()
    cost = count(network, 2, (72, 80), precision)
    frames = torch.rand(2, 2, 3, 72, 80)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # known to torch from 2.15 on
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={attention: _attention_flops}) as counter:
        network(frames[0], frames[1], torch.full((2,), 0.5))
    assert sum(cost.macs.values()) == sum(cost.by_kind.values()) == counter.get_total_flops() // 2
    assert cost.macs["refine"] > 0
    assert ("flow" in cost.macs) == (phase == 2)
    assert cost.macs[REST] == 0


def _attention_flops(q, k, v, *_, **__) -> int:
    """Two products of [tokens, d] and [d, tokens] for every head, from shapes: [windows, heads, tokens, d]."""
    return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def test_macs_grow_with_the_area(model) -> None:
    """Four times the pixels are four times the MACs but for windows and chunks at the edges, of which these sizes have none."""
    plain = FrameInterpolator(dataclasses.replace(presets.tiny().model, depths=(1, 1))).eval()  # no shifted windows
    small, large = (count(plain, 1, size, torch.float32) for size in ((128, 256), (256, 512)))
    pooled = {"stride 8 fusion", "stride 16 fusion"}  # the gate's convolution over channels does not depend on the size
    for part, macs in small.macs.items():
        if part in pooled:
            assert 3.99 < large.macs[part] / macs < 4
        else:
            assert large.macs[part] == 4 * macs


def test_counting_takes_no_memory_and_leaves_nothing_behind(model) -> None:
    """More than any test machine has; and what operators keep for the next call at the same size is real afterwards."""
    large = FrameInterpolator(dataclasses.replace(model.config, backbone_mode="gated_attn_only")).eval()  # it has no loops
    assert count(large, 2**15, (256, 256), torch.float32).peak_bytes > 2**39
    count(model, 1, (72, 104), torch.float32)
    frames = torch.rand(2, 1, 3, 72, 104)
    assert type(predict(model, frames[0], frames[1], torch.tensor([0.5]), torch.float32)) is torch.Tensor


# --------------------------------------------------------------------------------------------------------------- memory


def _chain(x: torch.Tensor, weight: torch.Tensor, *, keep: bool) -> torch.Tensor:
    """Six tensors of the size of x, all kept to the end or each let go as soon as the next one is there."""
    kept = []
    for _ in range(6):
        x = torch.nn.functional.relu(x @ weight).view(-1, 8)  # a product and its activation; a view costs nothing
        x.mul_(2)
        if keep:
            kept.append(x)
    return x


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(("keep", "tensors"), [(False, 3), (True, 7)])
def test_the_peak_is_that_of_the_tensors_alive(fake, keep, tensors) -> None:
    """By hand. Let go: the last result, the new product, its activation. Kept: five results, the product, its activation."""
    size = 50 * 8 * 4
    with torch.no_grad(), FakeTensorMode() if fake else torch.no_grad():
        x, weight = torch.rand(50, 8), torch.rand(8, 8)
        with CostCounter() as counter:
            result = _chain(x, weight, keep=keep)
            assert counter.live == size
    assert counter.peak == tensors * size
    assert counter.macs == 6 * 50 * 8 * 8
    del result
    assert counter.live == 0
    product, activation, in_place = 2 * size + 8 * 8 * 4, 2 * size, 2 * size
    assert [nbytes for _, nbytes in counter.operations] == [product, activation, in_place] * 6


def test_the_peak_of_a_network_counts_weights_and_frames() -> None:
    """A 1x1 convolution of both frames, by hand: weights, frames, the two side by side, the result, the timestep."""
    cost = count(Wrapped(nn.Conv2d(6, 10, 1)), 2, (40, 64), torch.float32)
    pixels = 2 * 40 * 64
    assert cost.peak_bytes == 4 * ((6 * 10 + 10) + 6 * pixels + 2 + 6 * pixels + 10 * pixels)


def test_a_view_of_a_weight_is_no_new_tensor() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(1000, 6, 40, 1))

        def forward(self, x):
            return x * self.weight[0].unsqueeze(0)

    cost = count(Wrapped(Scale()), 1, (40, 64), torch.float32)
    pixels = 40 * 64
    assert cost.peak_bytes == 4 * (1000 * 6 * 40 + 6 * pixels + 1 + 6 * pixels + 6 * pixels)


def test_reading_counts_what_is_looked_at() -> None:
    """Two of eight columns; and one row that stands for fifty."""
    x, row = torch.rand(50, 8), torch.rand(1, 8)
    with torch.no_grad(), CostCounter() as counter:
        x[:, :2].exp()
        row.expand(50, 8).exp()
    assert [nbytes for _, nbytes in counter.operations] == [4 * (50 * 2 + 50 * 2), 4 * (8 + 50 * 8)]


def test_half_precision_needs_less() -> None:
    network = FrameInterpolator(presets.tiny().model).eval()
    full, half = (count(network, 1, (128, 128), precision).peak_bytes for precision in (torch.float32, torch.bfloat16))
    assert half < full


def test_roofline_takes_the_slower_of_arithmetic_and_memory() -> None:
    assert timing.roofline_ms([(10**9, 10**3), (10, 10**9)], tflops=2, gbs=500) == pytest.approx(1 + 2)


# ---------------------------------------------------------------------------------------------------------------- levels


def test_receptive_fields_are_where_gradients_reach(model) -> None:
    """From one value in the middle of each level back to the pixels of an input, through the convolutions alone."""
    backbone = model.backbone
    fields = [level.conv_field for level in levels(model, 1, (128, 128))]
    x = image = torch.rand(1, 3, 128, 128, requires_grad=True)
    for layer, field in zip([*backbone.stem, *backbone.down], fields, strict=True):
        x = layer(x)
        (gradient,) = torch.autograd.grad(x[0, :, x.shape[2] // 2, x.shape[3] // 2].sum(), image, retain_graph=True)
        touched = gradient[0].abs().sum(0) > 0
        assert touched.any(0).sum() == touched.any(1).sum() == field


def test_levels_follow_the_settings() -> None:
    def at(size=(100, 130), batch=1, **settings):
        return levels(FrameInterpolator(dataclasses.replace(presets.tiny().model, **settings)), batch, size)

    found = at()
    assert [level.tokens for level in found] == [112 * 144 >> 2 * index for index in range(5)]  # padded to multiples of 16
    assert [level.stride for level in found] == [1, 2, 4, 8, 16]
    assert [level.channels for level in found] == [8, 16, 32, 64, 128]
    assert [level.window for level in found] == [None, None, None, 64, 128]
    assert [level.scan_tokens for level in found] == [None, None, None, 2 * 14 * 18, 2 * 7 * 9]
    assert [level.scan_tokens for level in at(scan="flip")][3:] == [14 * 18, 7 * 9]
    assert [level.scan_macs for level in at(ssm="mamba1")][3:] == [None, None]
    assert [level.scan_tokens for level in at(backbone_mode="gated_attn_only")] == [None] * 5
    assert [level.window for level in at(backbone_mode="mamba2_only")] == [None] * 5
    assert at(batch=3)[3].scan_macs == 3 * (found[3].scan_macs or 0)
    assert at(phase=3, scale=0.25)[0].tokens == 128 * 192  # padded to multiples of 64


# ------------------------------------------------------------------------------------------------------------------ job


def test_the_estimate_and_its_file(tmp_path, capsys) -> None:
    out = tmp_path / "new" / "tiny.json"
    flags = "--preset tiny --width 16 --sizes 64x96 100x70 64x96 --device cpu --assume_tflops 1 --assume-gbs 10"
    main([*flags.split(), "--json", str(out)])
    shown = capsys.readouterr().out
    written = json.loads(out.read_text())
    network = FrameInterpolator(dataclasses.replace(presets.tiny().model, width=16))
    assert sum(written["parameters"].values()) == sum(p.numel() for p in network.parameters())
    assert f"{sum(written['parameters'].values()):,}" in shown
    assert [size["size"] for size in written["sizes"]] == ["64x96", "100x70"]
    for size in written["sizes"]:
        assert sum(size["macs"].values()) == sum(size["macs_by_kind"].values()) > 0
        assert f"{sum(size['macs'].values()) / 1e9:.2f}" in shown
        assert size["estimated_ms"] > 0
        assert size["measured"] is None
    assert written["schema"] == "vfi-model-summary"
    assert written["config"]["width"] == 16
    assert written["environment"]["command"] == f"vfi profile {flags} --json {out}"
    assert written["environment"]["precision"] == "fp32"
    assert written["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert "tiny, phase 1: estimated" in shown
    assert "estimate: ms, each operator alone at 1 TFLOP/s or 10 GB/s" in shown


def test_measured_on_the_cpu(tmp_path, capsys) -> None:
    out = tmp_path / "tiny.json"
    flags = "--preset tiny --phase 2 --sizes 48x64 --device cpu --measure --repeats 2 --training --train_batch 2 --crop 64"
    main([*flags.split(), "--precision", "bf16", "--json", str(out)])
    shown = capsys.readouterr().out
    (size,) = json.loads(out.read_text())["sizes"]
    assert size["measured"]["ms"] > 0
    assert size["measured"]["allocated"] is None
    assert {"backbone stem", "stride 8 ss2d", "flow", "refine", REST} <= set(size["parts_ms"])
    assert all(ms > 0 for ms in size["parts_ms"].values())
    assert set(size["floors_ms"]) == set(size["parts_ms"])
    training = json.loads(out.read_text())["training"]
    assert (training["batch"], training["crop"]) == (2, 64)
    assert training["samples_per_s"] == pytest.approx(2e3 / training["measured"]["ms"])
    assert "tiny, phase 2: measured" in shown
    assert "bf16 autocast" in shown
    assert "Where the time of a forward pass goes" in shown
    assert "Where that of a training step goes" in shown
    assert f"{training['samples_per_s']:.1f} samples/s" in shown


def test_time_is_the_median_and_the_inputs_rotate(monkeypatch) -> None:
    """A clock by hand: after warm-up, calls take 1, 1, 100, 1, … ms."""
    readings, seen, made = [0.0], [], []

    def step(frames: tuple[torch.Tensor, ...]) -> None:
        seen.append(frames)
        readings[0] += 0.1 if len(seen) % 3 == 0 else 0.001

    def make() -> tuple[torch.Tensor, ...]:
        made.append((torch.rand(1),))
        return made[-1]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: readings[0])
    measured = timing.measure(step, make, CPU, repeats=7)
    assert measured.ms == pytest.approx(1)
    assert len(seen) == timing.WARMUP + 7
    assert [frames[0].item() for frames in seen[-3:]] != [made[0][0].item()] * 3
    assert {frames[0].item() for frames in seen} == {frames[0].item() for frames in made}


def test_a_call_alone_takes_the_median_without_the_first_ones(monkeypatch) -> None:
    now, takes = [0.0], iter([*[100.0] * timing.WARMUP, 1.0, 9.0, 3.0])
    monkeypatch.setattr(timing, "_clock", lambda device: (lambda: now[0], lambda start, end: end - start))
    monkeypatch.setattr(timing, "_CACHE_BYTES", 1)

    def call() -> None:
        now[0] += next(takes)

    assert timing.milliseconds(call, CPU, repeats=3) == 3
    assert next(takes, None) is None


def test_the_parts_take_the_time_of_the_whole(model, monkeypatch) -> None:
    """A clock that goes on by 1 ms at each reading: together the parts take the time from the first to the last reading."""
    readings = itertools.count()
    frames = (*torch.rand(2, 1, 3, 64, 64), torch.tensor([0.5]))
    with monkeypatch.context() as patched:
        patched.setattr(timing.time, "perf_counter", lambda: next(readings) / 1000)
        parts = measure_parts(model, lambda given: model(*given), lambda: frames, CPU, repeats=3)
    assert sum(parts.values()) == pytest.approx(next(readings) / 3 - 1)
    assert parts["stride 8 ss2d"] == parts["stride 8 attention"] == pytest.approx(2)  # one call in each of two blocks
    assert set(parts) >= {"backbone stem", "stride 16 attention", "stride 8 fusion", "refine", REST}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_floors_are_what_must_be_moved_or_multiplied(model) -> None:
    """Of the two attentions at stride 8, by hand: at 64x64 there are 8x8 places of 64 channels."""
    cost = count(model, 3, (64, 64), torch.float32)
    weights = sum(p.numel() for block in model.backbone.stages[0] for p in block.branches["attention"].parameters())
    places = 2 * (2 * 3 * 8 * 8 * 64 * 4)
    assert cost.traffic["stride 8 attention"] == (places, places, 4 * weights)
    half = count(model, 3, (64, 64), torch.bfloat16)
    assert half.traffic["stride 8 attention"].weights == 2 * weights
    traffic, macs = cost.traffic["stride 8 attention"], cost.macs["stride 8 attention"]
    slow_memory, slow_products = Rates(1e9, 2), Rates(3, 1e9)

    def floor(rates: Rates, training: bool) -> float:
        return timing.floors_ms(cost, rates, training)["stride 8 attention"]

    assert floor(slow_memory, False) == pytest.approx(1e3 * (2 * places + 4 * weights) / 2e9)
    assert floor(slow_memory, True) == pytest.approx(1e3 * (5 * places + 12 * weights) / 2e9)
    assert floor(slow_products, False) == pytest.approx(1e3 * 2 * macs / 3e12)
    assert floor(slow_products, True) == pytest.approx(1e3 * 6 * macs / 3e12)
    assert set(cost.traffic) == set(cost.macs)
    assert traffic.forward < sum(nbytes for _, nbytes in cost.operations)


def test_rates_are_of_a_copy_and_of_a_product(monkeypatch) -> None:
    def measure(step, make, device, repeats):
        found = make()
        step(found)
        assert not (found[0].dtype == torch.uint8 and (found[0] != found[1]).any())
        return timing.Measured(4.0 if found[0].dtype == torch.uint8 else 2.0)

    monkeypatch.setattr(timing, "measure", measure)
    rates = timing.measure_rates(CPU, torch.float32)
    assert rates.gbs == pytest.approx(2 * 2**26 / 4e-3 / 1e9)
    assert rates.tflops == pytest.approx(2 * 256**3 / 2e-3 / 1e12)


def test_parts_of_a_training_step_are_measured_one_by_one(model, monkeypatch) -> None:
    """By a clock that goes on by 1 ms at each reading: each call of a part that calls no other takes 1 ms."""
    frames = (*torch.rand(2, 1, 3, 64, 64), torch.tensor([0.5]))
    readings = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(timing.time, "perf_counter", lambda: next(readings) / 1000)
        parts = timing.measure_training_parts(
            model, lambda given: model(*given).imgt.sum().backward(), frames, CPU, torch.float32, repeats=2
        )
    assert [parts[part].ms for part in ("stride 8 ss2d", "stride 16 attention")] == pytest.approx([2, 2])
    assert parts["refine"].ms == pytest.approx(1)
    assert parts["refine"].allocated is None
    assert parts["stride 8 norm"].ms == pytest.approx(4)
    assert not {"stride 8 mixing", REST} & set(parts)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_plain_operators_stand_beside_the_fused_ones(monkeypatch, capsys, tmp_path) -> None:
    """As a GPU would give it: 1 ms a part, where the plain form takes 3 ms, in a quarter of the memory."""
    measured = []

    def parts(model, *_: object) -> dict[str, float]:
        measured.append(model.config)
        return {"refine": 3.0 if model.config.pointwise_backend == "torch" else 1.0}

    def training_parts(model, *_: object) -> dict[str, timing.Measured]:
        (ms,) = parts(model).values()
        return {"refine": timing.Measured(ms, 2**20 if ms == 1 else 2**22)}

    monkeypatch.setattr(timing, "measure_parts", parts)
    monkeypatch.setattr(timing, "measure_training_parts", training_parts)
    monkeypatch.setattr(timing, "measure", lambda *_: timing.Measured(1.0))
    out = tmp_path / "tiny.json"
    flags = "--preset tiny --sizes 64x64 --device cpu --measure --training --reference --no-count"
    main([*flags.split(), "--assume_tflops", "1", "--assume_gbs", "1", "--json", str(out)])
    written, shown = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    assert [config.attention_backend for config in measured] == ["auto", "auto", "sdpa", "sdpa"]
    assert [config.ssd_backend for config in measured] == ["auto", "auto", "reference", "reference"]
    assert written["sizes"][0]["plain_parts_ms"] == {"refine": 3.0}
    assert written["training"]["plain_parts"]["refine"]["allocated"] == 2**22
    assert [line.split() for line in shown if line.startswith("refine")][-2:] == [
        ["refine", "1.00", "100", "%", "3.00", "3.0x"],
        ["refine", "1.00", "100", "%", "3.00", "3.0x", "1", "4"],
    ]


def test_a_size_without_enough_memory_is_a_row(monkeypatch, capsys) -> None:
    """As a GPU would say it, at one of the two sizes."""

    def refuse(model, img0, img1, timestep, precision, graphs):
        if img0.shape[2] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(model, img0, img1, timestep, precision, graphs=graphs)

    monkeypatch.setattr(model_summary, "predict", refuse)
    flags = "--preset tiny --sizes 96x96 64x64 --device cpu --measure --repeats 1 --no-count"
    main(flags.split())
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("ms"))
    assert row.split("  ")[0] == "ms"
    assert "out of memory" in row
    assert float(row.split()[-1]) > 0
    main([*flags.split(), "--markdown"])
    row = capsys.readouterr().out.strip().splitlines()[-1]
    assert row.startswith("| tiny, phase 1 | 1.3 M | out of memory | ")


def test_markdown_is_a_table_with_a_column_a_size(capsys) -> None:
    main(["--preset", "tiny", "--sizes", "64x64", "64x96", "--device", "cpu", "--markdown"])
    head, line, row = capsys.readouterr().out.strip().splitlines()[-3:]
    assert [cell.strip() for cell in head.split("|")[3:-1]] == ["64x64", "64x96"]
    assert head.count("|") == line.count("|") == row.count("|")
    assert "estimate" in head


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sizes 20x20", "--sizes 20x20: each side must be at least 32"),
        ("--sizes 64x64 abc", "--sizes 'abc' is not HEIGHTxWIDTH, such as 736x1280"),
        ("--sizes", "--sizes needs at least one size"),
        ("--batch 0", "--batch 0 must be at least 1"),
        ("--repeats 0", "--repeats 0 must be at least 1"),
        ("--preset large", "--preset 'large' does not exist"),
        ("--width 9", "--head_dim 16 must divide 8 * --width"),
        ("--scale 0.5", "--scale 0.5 has no effect without --phase 2 or 3"),
        ("--training --no-measure", "--training measures"),
        ("--reference --no-measure", "--reference measures"),
        ("--plain --no-measure", "--reference measures"),  # the former spelling
        ("--training --measure --crop 60", "--crop is 60"),
        ("--no-count --no-measure", "--no-count leaves nothing to do"),
        ("--assume_tflops 400", "--assume_tflops and --assume_gbs belong together"),
        ("--json summary.txt", "--json summary.txt must be a file name that ends in .json"),
    ],
)
def test_unusable_flags_are_refused_in_one_line(flags, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "tiny", "--device", "cpu", *flags.split()])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_flags_are_those_of_training() -> None:
    flags = "--preset base --use_mhc --no-use-ecab --train_batch 3 --crop 128"
    options, config = from_command_line(flags.split())
    assert config.model == dataclasses.replace(presets.base().model, mixing="mhc", use_ecab=False)
    assert (config.data.batch_size, config.data.crop) == (3, 128)
    assert options.measure == torch.cuda.is_available()
    assert not from_command_line(["--device", "cpu"])[0].measure


@pytest.mark.gpu
def test_measured_on_the_gpu(tmp_path) -> None:
    """Memory by the allocator's own count; the parts' times make up the whole; too large a size is a row."""
    out = tmp_path / "tiny.json"
    main(["--preset", "tiny", "--sizes", "256x256", "--training", "--train_batch", "4", "--json", str(out)])
    written = json.loads(out.read_text())
    (size,) = written["sizes"]
    weights = 4 * sum(written["parameters"].values())
    assert weights < size["measured"]["allocated"] <= size["measured"]["reserved"]
    assert size["graph_ms"] / 2 < sum(size["parts_ms"].values()) < 2 * size["graph_ms"]
    assert all(floor < size["parts_ms"][part] for part, floor in size["floors_ms"].items())
    assert sum(part["ms"] for part in written["training"]["parts"].values()) < 1.5 * written["training"]["measured"]["ms"]
    assert written["training"]["measured"]["allocated"] > 4 * weights  # weights, gradients and AdamW's two
