"""The training loss against a pyramid written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from vfi.config.configs import ConfigError, OptimConfig
from vfi.model.interpolator import Prediction, Stage
from vfi.ops.loss.laplacian import laplacian_loss
from vfi.training.losses import check_flow, end_point_error, teacher_loss, training_losses

TAPS = np.array([1, 4, 6, 4, 1]) / 16


def blur(image, gain=1.0):
    for axis in (1, 2):
        image = scipy.ndimage.correlate1d(image, TAPS, axis=axis, mode="mirror")
    return image * gain


def pyramid(image, levels=5):
    """Laplacian pyramid of [C, H, W], with the coarse image at the end."""
    bands = []
    for _ in range(levels):
        coarse = blur(image)[:, ::2, ::2]
        spread = np.zeros_like(image)
        spread[:, ::2, ::2] = coarse
        bands.append(image - blur(spread, gain=4.0))
        image = coarse
    return [*bands, image]


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (75, 131)])
def test_sum_of_l1_over_two_pyramids(size):
    generator = np.random.default_rng(0)
    prediction, truth = generator.random((2, 3, *size))
    expected = sum(np.abs(a - b).mean() for a, b in zip(pyramid(prediction), pyramid(truth), strict=True))
    tensors = [torch.from_numpy(image)[None] for image in (prediction, truth)]
    torch.testing.assert_close(laplacian_loss(*tensors), torch.tensor(expected, dtype=torch.float64))


def test_several_predictions_at_once():
    """Each has the loss, and the gradient, that it has by itself."""
    predictions, truth = torch.rand(3, 2, 3, 64, 80, dtype=torch.float64, requires_grad=True), torch.rand(2, 3, 64, 80).double()
    together, alone = laplacian_loss(predictions, truth), [laplacian_loss(one, truth) for one in predictions]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=0)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * losses).sum(), predictions)[0] for losses in (together, torch.stack(alone))]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_constant_error_counts():
    """A wrong mean colour lies in the coarse image alone; without it the loss would be blind to it."""
    truth = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    loss = laplacian_loss(truth + 0.1, truth)
    torch.testing.assert_close(loss, torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_fp32_under_autocast(dtype):
    prediction, truth = torch.rand(2, 1, 3, 64, 64)
    with torch.autocast("cpu", dtype=dtype):
        inside = laplacian_loss(prediction, truth)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, laplacian_loss(prediction, truth), rtol=0, atol=0)


def test_too_small():
    with pytest.raises(ValueError, match="at least 64"):
        laplacian_loss(torch.zeros(1, 3, 63, 80), torch.zeros(1, 3, 63, 80))


def stage(seed):
    generator = torch.Generator().manual_seed(seed)
    return Stage(3 * torch.randn(2, 4, 64, 64, generator=generator), torch.rand(2, 3, 64, 64, generator=generator))


def test_end_point_error_is_the_length_of_the_difference():
    one, other = stage(0).flow, stage(1).flow
    expected = [torch.linalg.vector_norm(one[:, i : i + 2] - other[:, i : i + 2], dim=1) for i in (0, 2)]
    torch.testing.assert_close(end_point_error(one, other), torch.stack(expected, dim=1), rtol=1e-4, atol=1e-5)
    still = torch.zeros(1, 4, 2, 2, requires_grad=True)
    end_point_error(still, torch.zeros(1, 4, 2, 2)).sum().backward()
    assert still.grad.isfinite().all()


def test_teacher_counts_only_where_it_is_better():
    """A loop over pixels, in float64."""
    mine, teacher, truth = stage(0), stage(1), torch.rand(2, 3, 64, 64)
    own = (mine.merge - truth).double().abs().mean(1)
    of_teacher = (teacher.merge - truth).double().abs().mean(1)
    distance = (mine.flow - teacher.flow).double()
    total = 0.0
    for b, y, x in np.ndindex(2, 64, 64):
        if own[b, y, x] > of_teacher[b, y, x] + 0.01:
            dx0, dy0, dx1, dy1 = distance[b, :, y, x].tolist()
            total += np.hypot(dx0, dy0) + np.hypot(dx1, dy1)
    assert teacher_loss([mine], teacher, truth).item() == pytest.approx(total / (2 * 2 * 64 * 64), rel=1e-4)


def test_losses_add_up_by_their_weights():
    truth = torch.rand(2, 3, 64, 64)
    image, stages, teacher = stage(9).merge, (stage(0), stage(1), stage(2)), stage(3)
    flow = stage(4).flow.split(2, dim=1)
    config = OptimConfig(merge_weight=0.5, teacher_weight=0.25, distill_weight=2.0)
    plain = Prediction(image, *[torch.zeros(())] * 4)
    assert set(training_losses(plain, truth, config)) == {"loss", "image"}
    losses = training_losses(plain._replace(stages=stages, teacher=teacher), truth, config, flow)
    of_stages = sum(laplacian_loss(one.merge, truth) for one in stages)
    torch.testing.assert_close(losses["merge"], of_stages)
    torch.testing.assert_close(losses["teacher_image"], laplacian_loss(teacher.merge, truth))
    torch.testing.assert_close(losses["teacher"], sum(teacher_loss([one], teacher, truth) for one in stages))
    torch.testing.assert_close(losses["distill"], sum(end_point_error(one.flow, stage(4).flow).mean() for one in stages))
    total = losses["image"] + 0.5 * losses["merge"] + losses["teacher_image"] + 0.25 * losses["teacher"] + 2 * losses["distill"]
    torch.testing.assert_close(losses["loss"], total)


def test_distilled_flow_counts_by_its_weight():
    truth, stages, weight = torch.rand(2, 3, 64, 64), (stage(0), stage(1)), torch.rand(2, 2, 64, 64)
    flow, config = stage(4).flow, OptimConfig(distill_weight=1.0)
    predicted = Prediction(stage(9).merge, *[torch.zeros(())] * 4)._replace(stages=stages)
    losses = training_losses(predicted, truth, config, (*flow.split(2, dim=1), weight))
    expected = sum((end_point_error(one.flow, flow) * weight).mean() for one in stages)
    torch.testing.assert_close(losses["distill"], expected)
    plain = training_losses(predicted, truth, config, (*flow.split(2, dim=1), torch.ones_like(weight)))
    torch.testing.assert_close(plain["distill"], training_losses(predicted, truth, config, flow.split(2, dim=1))["distill"])


@pytest.mark.parametrize(
    "flow", [(torch.zeros(1, 2, 8, 9),), (torch.zeros(1, 2, 8, 9), torch.zeros(1, 2, 8, 8)), (torch.zeros(1, 2, 8, 9),) * 4]
)
def test_a_teacher_that_gives_something_else_is_refused(flow):
    with pytest.raises(ConfigError, match=r"the flow teacher gave tensors \[.*\]; expected two or three of \(1, 2, 8, 9\)"):
        check_flow(flow, torch.zeros(1, 3, 8, 9))
    assert len(check_flow((torch.zeros(1, 2, 8, 9),) * 3, torch.zeros(1, 3, 8, 9))) == 3


def test_nothing_flows_back_into_the_teacher():
    teacher = Stage(stage(1).flow.requires_grad_(), stage(1).merge.requires_grad_())
    student = Stage(stage(0).flow.requires_grad_(), stage(0).merge.requires_grad_())
    teacher_loss([student], teacher, torch.rand(2, 3, 64, 64)).backward()
    assert teacher.flow.grad is None
    assert teacher.merge.grad is None
    assert student.merge.grad is None
    assert student.flow.grad.abs().sum() > 0
