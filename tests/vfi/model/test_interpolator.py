"""The network: agreement with its published parts, any size, every switch."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch import Tensor

from vfi.config import presets
from vfi.config.configs import ModelConfig
from vfi.model import interpolator
from vfi.model.channel_attention import eca_kernel_size
from vfi.model.interpolator import FrameInterpolator
from vfi.model.ss2d import ss2d

TINY = presets.tiny().model
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_every_preset_predicts_a_cross_fade_before_training(name):
    config = presets.get(name).model
    model = FrameInterpolator(config)
    img0, img1 = torch.rand(2, 2, 3, 64, 48)
    timestep = torch.tensor([0.5, 0.25])
    prediction = model(img0, img1, timestep)
    weight = timestep.view(-1, 1, 1, 1)
    torch.testing.assert_close(prediction.imgt, (1 - weight) * img0 + weight * img1)
    assert prediction.flow_t0 is None
    loss = (prediction.imgt - torch.rand_like(img0)).abs().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def trained_like(config: ModelConfig) -> FrameInterpolator:
    """A model whose last layer is not zero, so that everything before it shows."""
    torch.manual_seed(0)
    model = FrameInterpolator(config).eval()
    torch.nn.init.normal_(model.refine.head.weight, std=0.1)
    return model


@pytest.mark.parametrize("size", [(32, 32), (123, 77), (40, 200)])
def test_any_size(size):
    model = trained_like(TINY)
    img0, img1 = torch.rand(2, 1, 3, *size)
    prediction = model(img0, img1, torch.tensor([0.5]))
    assert prediction.imgt.shape == img0.shape
    assert prediction.mask_logit.shape == (1, 1, *size)
    assert prediction.imgt.isfinite().all()


def test_padding_is_centred_replication():
    """A frame padded by hand in the stated way gives the same prediction."""
    model = trained_like(TINY)
    img0, img1 = torch.rand(2, 1, 3, 61, 50)
    padding = (7, 7, 1, 2)  # left, right, top, bottom to 64 x 64
    outside = [torch.nn.functional.pad(image, padding, mode="replicate") for image in (img0, img1)]
    time = torch.tensor([0.5])
    whole = model(*outside, time).imgt[:, :, 1:62, 7:57]
    torch.testing.assert_close(model(img0, img1, time).imgt, whole)


def test_pairs_of_a_batch_do_not_mix():
    model = trained_like(TINY)
    img0, img1 = torch.rand(2, 3, 3, 48, 64)
    time = torch.tensor([0.5, 0.5, 0.5])
    together = model(img0, img1, time).imgt
    alone = torch.cat([model(img0[i : i + 1], img1[i : i + 1], time[:1]).imgt for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_signal_keeps_its_size_before_training():
    """The largest and the smallest spread of activations on the way from the frames to the head are within a factor of 3."""
    model = FrameInterpolator(dataclasses.replace(presets.small().model, depths=(1, 1)))
    spreads = []
    for module in (*model.backbone.stem, *model.refine.mix):
        module.register_forward_hook(lambda _module, _inputs, output: spreads.append(output.std().item()))
    model(*torch.rand(2, 1, 3, 64, 64), torch.tensor([0.5]))
    assert len(spreads) == 8
    assert max(spreads) < 3 * min(spreads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_core_stays_fp32_under_autocast(dtype, monkeypatch):
    """What reaches the scan's core is fp32 by default and of the autocast type with ssd_precision input."""
    seen = {}
    for precision in ("auto", "input"):
        module = ss2d(16, ModelConfig(d_state=16, head_dim=8, ssd_precision=precision, ssd_backend="reference"), CPU)
        core = module.ssd

        def spy(x, *rest, core=core, precision=precision):
            seen[precision] = (x.dtype, torch.is_autocast_enabled("cpu"))
            return core(x, *rest)

        module.ssd = spy
        with torch.autocast("cpu", dtype=dtype):
            module(torch.randn(2, 4, 4, 16))
    assert seen == {"auto": (torch.float32, False), "input": (dtype, True)}


def test_moved_features_are_given_up_in_training(monkeypatch):
    """What RefineNet mixes is made when it is mixed, and kept no longer: those of one level are in memory at a time."""
    moved, warp = list[weakref.ref[Tensor]](), interpolator.backward_warp
    most = 0

    def note(x: Tensor, flow: Tensor, top: int | None = None) -> Tensor:
        nonlocal most
        y = warp(x, flow, top)
        if x.shape[1] > 3:  # no frame
            moved.append(weakref.ref(y))
            most = max(most, sum(one() is not None for one in moved))
        return y

    monkeypatch.setattr(interpolator, "backward_warp", note)
    model = FrameInterpolator(presets.override(presets.tiny(), phase=2).model).train()
    prediction = model(*torch.rand(2, 1, 3, 64, 64), torch.tensor([0.5]), torch.rand(1, 3, 64, 64))
    assert len(moved) == 5
    assert most <= 2  # the next one is asked for before the last one is let go
    assert not any(one() is not None for one in moved)
    prediction.imgt.sum().backward()


def test_kernel_size_of_channel_attention():
    """ECA-Net's rule at C = 32 … 512."""
    assert [eca_kernel_size(2**n) for n in range(5, 10)] == [3, 3, 5, 5, 5]


def test_wrong_frames_are_refused():
    model = FrameInterpolator(TINY)
    image, time = torch.rand(1, 3, 64, 64), torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"both be \[B, 3, H, W\]"):
        model(image, image[:, :, :32], time)
    with pytest.raises(ValueError, match="at least 32"):
        model(image[:, :, :31], image[:, :, :31], time)
    with pytest.raises(ValueError, match="timestep must be"):
        model(image, image, torch.tensor(0.5))


@pytest.mark.gpu
def test_model_on_a_gpu_equals_the_reference():
    config = presets.small().model
    reference = trained_like(config)
    fast = FrameInterpolator(config, "cuda").eval()
    fast.load_state_dict(reference.state_dict())
    assert fast.choices() == [f"{part}: fused (available on cuda)" for part in ("attention", "pointwise", "ssd")]
    img0, img1 = torch.rand(2, 1, 3, 123, 176)
    time = torch.tensor([0.5])
    with torch.no_grad():
        expected = reference(img0, img1, time).imgt
        result = fast(img0.cuda(), img1.cuda(), time.cuda()).imgt.cpu()
        with torch.autocast("cuda", torch.bfloat16):
            half = fast(img0.cuda(), img1.cuda(), time.cuda()).imgt.cpu()
    signal = (expected - (img0 + img1) / 2).norm()
    errors = [((value - expected).norm() / signal).item() for value in (result, half)]
    print("relative error fp32, bf16:", errors)
    assert errors[0] < 5e-3
    assert errors[1] < 5e-2
