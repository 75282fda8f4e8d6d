"""Phases 2 and 3: flow, warps, scale and teacher; features that serve any number of timesteps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from vfi.config import presets
from vfi.config.configs import ModelConfig
from vfi.model.flow import FlowEstimate, FlowNet
from vfi.model.interpolator import FrameInterpolator
from vfi.ops.warp.warp import backward_warp

TINY = dataclasses.replace(presets.tiny().model, phase=2)
HALF = torch.tensor([0.5])


def moving(config: ModelConfig, seed: int = 0) -> FrameInterpolator:
    """A model whose zero layers are not zero, so that every part shows in the output."""
    torch.manual_seed(seed)
    model = FrameInterpolator(config).eval()
    heads = [stage.head for stage in model.flow.stages]
    heads += [model.refine.head] if model.refine else []
    heads += [model.flow.teacher.head] if model.flow.teacher else []
    for head in heads:
        torch.nn.init.normal_(head.weight, std=0.05)
    return model


def test_phase_2_starts_as_phase_1():
    """With the weights of phase 1 and flow heads at zero the prediction is that of phase 1."""
    first = FrameInterpolator(dataclasses.replace(TINY, phase=1)).eval()
    torch.nn.init.normal_(first.refine.head.weight, std=0.1)
    second = FrameInterpolator(TINY).eval()
    missing = second.load_state_dict(first.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {key.partition(".")[0] for key in missing.missing_keys} == {"flow"}
    img0, img1 = torch.rand(2, 2, 3, 64, 80)
    time = torch.tensor([0.5, 0.25])
    expected, result = first(img0, img1, time), second(img0, img1, time)
    torch.testing.assert_close(result.imgt, expected.imgt, rtol=0, atol=1e-4)
    assert result.flow_t0.abs().max() == 0
    assert expected.flow_t0 is None


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_features_serve_any_number_of_timesteps(scale):
    model = moving(dataclasses.replace(TINY, scale=scale))
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    img0, img1 = torch.rand(2, 1, 3, 70, 90)
    times = [torch.tensor([(i + 1) / 8]) for i in range(7)]
    encoded = model.encode(img0, img1)
    reused = [model.decode(encoded, time).imgt for time in times]
    assert len(calls) == (1 if scale == 1 else 2)  # once at each size
    separate = [model(img0, img1, time).imgt for time in times]
    for one, other in zip(reused, separate, strict=True):
        assert torch.equal(one, other)
    assert not torch.allclose(reused[0], reused[1], atol=1e-5)


def constant_motion(monkeypatch, model: FrameInterpolator, dx: float, dy: float) -> None:
    """FlowNet finds the same motion everywhere: (dx, dy) pixels of the frames it is given, to frame 0, and back to frame 1."""

    def forward(_features, frames, _timestep):
        pairs, _, H, W = frames[: len(frames) // 2].shape
        flow = torch.tensor([dx / 2, dy / 2]).view(1, 2, 1, 1).expand(pairs, 2, H // 2, W // 2)
        return [FlowEstimate(torch.cat((flow, -flow)), torch.zeros(pairs, 1, H // 2, W // 2))]

    monkeypatch.setattr(model.flow, "forward", forward)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25])
def test_flow_is_in_pixels_of_the_frame(monkeypatch, scale):
    """Flow found on reduced frames comes out on the grid and in the pixels of the whole frame, and moves frames so."""
    model = moving(dataclasses.replace(TINY, warp="flow_only"))
    constant_motion(monkeypatch, model, dx=3.0 * scale, dy=-2.0 * scale)
    img0, img1 = torch.rand(2, 1, 3, 75, 101)
    prediction = model(img0, img1, HALF, scale=scale)
    flow = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 75, 101)
    torch.testing.assert_close(prediction.flow_t0, flow)
    torch.testing.assert_close(prediction.flow_t1, -flow)
    inside = (..., slice(8, -8), slice(8, -8))
    torch.testing.assert_close(prediction.warped0[inside], backward_warp(img0, flow)[inside], rtol=0, atol=1e-4)
    torch.testing.assert_close(prediction.warped1[inside], backward_warp(img1, -flow)[inside], rtol=0, atol=1e-4)
    torch.testing.assert_close(prediction.imgt, (prediction.warped0 + prediction.warped1) / 2)


def test_scale_reduces_the_frames_that_flow_sees():
    model = moving(TINY)
    seen = {}
    model.flow.register_forward_pre_hook(lambda _m, args: seen.update(frames=args[1], features=args[0]))
    img0, img1 = torch.rand(2, 1, 3, 128, 192)
    outputs = {scale: model(img0, img1, HALF, scale=scale).imgt for scale in (1.0, 0.5, 0.25)}
    assert seen["frames"].shape == (2, 3, 32, 48)
    torch.testing.assert_close(seen["frames"], F.avg_pool2d(torch.cat((img0, img1)), 4))
    assert seen["features"][0].shape[2:] == (32, 48)
    assert all(output.shape == img0.shape for output in outputs.values())
    assert not torch.allclose(outputs[1.0], outputs[0.25], atol=1e-4)
    configured = moving(dataclasses.replace(TINY, scale=0.25))
    assert torch.equal(configured(img0, img1, HALF).imgt, outputs[0.25])


def test_scale_is_refused_where_it_means_nothing():
    image = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="choose from"):
        FrameInterpolator(TINY)(image, image, HALF, scale=0.3)
    with pytest.raises(ValueError, match="no flow"):
        FrameInterpolator(dataclasses.replace(TINY, phase=1))(image, image, HALF, scale=0.5)


def test_warp_decides_what_moves():
    """feature: RefineNet sees moved features; image: as they were; flow_only: there is no RefineNet."""
    models = {warp: moving(dataclasses.replace(TINY, warp=warp)) for warp in ("feature", "image", "flow_only")}
    assert models["flow_only"].refine is None
    weights = models["feature"].state_dict()
    assert weights.keys() == models["image"].state_dict().keys()
    assert models["flow_only"].state_dict().keys() == {name for name in weights if not name.startswith("refine.")}
    models["image"].load_state_dict(weights)
    models["flow_only"].load_state_dict({name: w for name, w in weights.items() if not name.startswith("refine.")})
    img0, img1 = torch.rand(2, 1, 3, 64, 64)
    seen = {}
    for warp in ("feature", "image"):
        models[warp].refine.register_forward_pre_hook(lambda _m, args, warp=warp: seen.update({warp: args}))
    predictions = {warp: model(img0, img1, HALF) for warp, model in models.items()}
    features = models["feature"].backbone(torch.cat((img0, img1)))
    for plain, moved, unmoved in zip(features, seen["feature"][0], seen["image"][0], strict=True):
        torch.testing.assert_close(unmoved, plain)
        assert not torch.allclose(moved, plain, atol=1e-3)
    flow = torch.cat((predictions["feature"].flow_t0, predictions["feature"].flow_t1))
    torch.testing.assert_close(seen["feature"][0][0], backward_warp(features[0], flow))
    torch.testing.assert_close(seen["feature"][1], seen["image"][1])
    alone = predictions["flow_only"]
    torch.testing.assert_close(alone.flow_t0, predictions["feature"].flow_t0)
    mask = alone.mask_logit.sigmoid()
    torch.testing.assert_close(alone.imgt, mask * alone.warped0 + (1 - mask) * alone.warped1)
    assert alone.residual.abs().max() == 0


def test_masks_add_up():
    """mask = sigmoid(flow's logit + RefineNet's logit + prior of the timestep)."""
    model = moving(TINY)
    logits = {}
    model.flow.register_forward_hook(lambda _m, _i, motions: logits.update(flow=motions[-1].at((64, 64)).mask_logit))
    model.refine.register_forward_hook(lambda _m, _i, out: logits.update(refine=out[0]))
    prediction = model(*torch.rand(2, 1, 3, 64, 64), torch.tensor([0.25]))
    expected = logits["flow"] + logits["refine"] + torch.logit(torch.tensor(0.75))
    torch.testing.assert_close(prediction.mask_logit, expected)


def test_stages_refine_each_other():
    """Every stage starts from the flow of the one before: with a silent later stage the motion just goes on."""
    net = FlowNet(TINY)
    model = moving(TINY)
    features = model.backbone(torch.rand(2, 3, 64, 96))
    torch.nn.init.normal_(net.stages[0].head.weight, std=0.05)
    motions = net(features, torch.rand(2, 3, 64, 96), HALF)
    assert [tuple(motion.flow.shape) for motion in motions] == [(2, 2, 8, 12), (2, 2, 16, 24), (2, 2, 32, 48)]
    torch.testing.assert_close(motions[1].flow, motions[0].at((16, 24)).flow)
    torch.testing.assert_close(motions[2].flow, motions[0].at((16, 24)).at((32, 48)).flow)
    assert motions[0].flow.abs().max() > 0


def test_training_shows_the_stages_and_evaluation_does_not():
    model = moving(dataclasses.replace(TINY, teacher=True))
    img0, imgt, img1 = torch.rand(3, 2, 3, 70, 64)
    time = torch.tensor([0.5, 0.5])
    assert model(img0, img1, time, imgt).stages == ()
    prediction = model.train()(img0, img1, time, imgt)
    assert [stage.flow.shape for stage in prediction.stages] == [(2, 4, 70, 64)] * 3
    torch.testing.assert_close(prediction.stages[-1].flow, torch.cat((prediction.flow_t0, prediction.flow_t1), dim=1))
    assert prediction.teacher.merge.shape == (2, 3, 70, 64)
    assert model(img0, img1, time).teacher is None


def test_last_stage_merges_as_the_network_without_refinement():
    model = moving(dataclasses.replace(TINY, warp="flow_only")).train()
    prediction = model(*torch.rand(2, 1, 3, 64, 64), HALF)
    assert torch.equal(prediction.stages[-1].merge, prediction.imgt)
    assert not torch.allclose(prediction.stages[0].merge, prediction.imgt, atol=1e-4)


def test_teacher_sees_the_truth_and_changes_nothing_else():
    """The truth reaches the teacher's flow and nothing of the prediction; its gradient stays in the teacher."""
    model = moving(dataclasses.replace(TINY, teacher=True)).train()
    img0, imgt, img1 = torch.rand(3, 1, 3, 64, 64)
    one, other = model(img0, img1, HALF, imgt), model(img0, img1, HALF, 1 - imgt)
    assert torch.equal(one.imgt, other.imgt)
    assert not torch.allclose(one.teacher.flow, other.teacher.flow, atol=1e-4)
    other.teacher.merge.sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert touched
    assert all(name.startswith(("flow.teacher.", "backbone.")) for name in touched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flow_stays_fp32_under_autocast(dtype):
    model = moving(TINY)
    img0, img1 = torch.rand(2, 1, 3, 64, 64)
    exact = model(img0, img1, HALF)
    with torch.autocast("cpu", dtype=dtype):
        half = model(img0, img1, HALF)
    for name in ("imgt", "flow_t0", "flow_t1", "mask_logit", "residual", "warped0"):
        assert getattr(half, name).dtype == torch.float32, name
    error = (half.flow_t0 - exact.flow_t0).abs().max() / exact.flow_t0.abs().max()
    print(f"{dtype}: flow differs by {error:.1e} of its largest value")
    assert error < 0.1
