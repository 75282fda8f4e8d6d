"""Residual mixing: its constraints, the plain block as its limit, diverging streams, precision, every switch in training."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfi.config import presets
from vfi.config.configs import ModelConfig
from vfi.model.backbone import HybridBackbone, LGSBlock
from vfi.model.hyper_connections import (
    HyperConnections,
    MixingCoefficients,
    mixing_report,
    permutation_mixture,
    recording,
    set_annealing,
    sinkhorn,
)
from vfi.model.interpolator import FrameInterpolator
from vfi.training.optimizer import decays

TINY = presets.tiny().model
CPU = torch.device("cpu")
KINDS = ("hc", "mhc", "mhc_lite")
EVERY = list(itertools.product(KINDS, (2, 4), ("token", "pooled")))

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(kind: str, streams: int = 4, coefficients: str = "token", **others) -> ModelConfig:
    return dataclasses.replace(TINY, mixing=kind, mixing_streams=streams, mixing_coefficients=coefficients, **others)


def random_mixing(
    config: ModelConfig, dim: int = 6, branches: int = 2, index: int = 1, spread: float = 0.3
) -> HyperConnections:
    """A mixing as training might leave it: every parameter away from its first value."""
    mixing = HyperConnections(dim, branches, index, config)
    with torch.no_grad():
        for parameter in mixing.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return mixing


def sublayer(x: Tensor) -> tuple[Tensor, ...]:
    """Two branches that are easily computed elsewhere."""
    return x.sin(), 0.5 * x.cos()


def all_permutations(n: int) -> Tensor:
    return torch.stack([torch.eye(n)[list(order)] for order in itertools.permutations(range(n))])


def naive_sinkhorn(logits: list[list[float]], iterations: int) -> list[list[float]]:
    """Exponentiate; divide every column, then every row by its sum; in Python's floats."""
    n = range(len(logits))
    matrix = [[math.exp(value) for value in row] for row in logits]
    for _ in range(iterations):
        sums = [sum(matrix[i][j] for i in n) for j in n]
        matrix = [[matrix[i][j] / sums[j] for j in n] for i in n]
        matrix = [[value / sum(row) for value in row] for row in matrix]
    return matrix


def naive_permutation_mixture(logits: list[float], n: int) -> list[list[float]]:
    total = sum(map(math.exp, logits))
    matrix = [[0.0] * n for _ in range(n)]
    for logit, order in zip(logits, itertools.permutations(range(n)), strict=True):
        for row, column in enumerate(order):
            matrix[row][column] += math.exp(logit) / total
    return matrix


# ---- the constraint on H_res


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_is_normalising_in_turn(n, iterations):
    logits = 2 * torch.randn(5, n, n, dtype=torch.float64)
    expected = torch.tensor([naive_sinkhorn(matrix, iterations) for matrix in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits, iterations), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [2, 4])
def test_sinkhorn_is_doubly_stochastic(n):
    matrix = sinkhorn(0.5 * torch.randn(1000, n, n), 20)
    assert (matrix >= 0).all()
    for dim in (-1, -2):
        assert (matrix.sum(dim) - 1).abs().max() < 1e-6
    wide = 2 * torch.randn(1000, n, n)
    errors = [(sinkhorn(wide, iterations).sum(-2) - 1).abs().mean() for iterations in (5, 20, 80)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # and comes closer with more iterations


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("spread", [1, 100])
def test_permutation_mixture_is_doubly_stochastic_up_to_rounding(n, spread):
    logits = spread * torch.randn(1000, math.factorial(n))
    for dtype, tolerance in ((torch.float32, 5e-7), (torch.float64, 1e-15)):
        matrix = permutation_mixture(logits.to(dtype), all_permutations(n))
        assert matrix.dtype == dtype
        assert (matrix >= 0).all()
        for dim in (-1, -2):
            assert (matrix.sum(dim) - 1).abs().max() < tolerance


@pytest.mark.parametrize("n", [2, 4])
def test_permutation_mixture_is_the_weighted_mean_of_all(n):
    logits = 2 * torch.randn(5, math.factorial(n), dtype=torch.float64)
    expected = torch.tensor([naive_permutation_mixture(row, n) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(permutation_mixture(logits, all_permutations(n)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("width", [50, 100])
def test_wide_logits_have_finite_values_and_gradients(n, width):
    functions = {
        n * n: lambda logits: sinkhorn(logits.unflatten(-1, (n, n)), 20),
        math.factorial(n): lambda logits: permutation_mixture(logits, all_permutations(n)),
    }
    for size, function in functions.items():
        logits = (width * (2 * torch.rand(500, size) - 1)).requires_grad_()
        matrix = function(logits)
        (matrix * torch.randn_like(matrix)).sum().backward()
        assert matrix.isfinite().all()
        assert logits.grad.isfinite().all()
        assert logits.grad.abs().max() > 0


def gains(product: Tensor) -> Tensor:
    """The larger of the largest absolute row and column sum, of each matrix."""
    return torch.maximum(product.abs().sum(-1).amax(-1), product.abs().sum(-2).amax(-1))


@pytest.mark.parametrize(("kind", "low", "high"), [("hc", 100, math.inf), ("mhc", 1, 1.1), ("mhc_lite", 1, 1 + 1e-5)])
def test_gain_of_fifty_layers(kind, low, high):
    """At every token; what the report says is the product of the means. Twenty iterations leave mhc a few percent."""
    stack = nn.ModuleList(random_mixing(settings(kind), index=i, spread=0.5) for i in range(50))
    x = torch.randn(2, 3, 5, 4, 6)
    product = torch.eye(4, dtype=torch.float64)
    means = torch.eye(4, dtype=torch.float64)
    largest = 0.0
    with torch.no_grad(), recording(stack) as records:
        for mixing in stack:
            skip = mixing.coefficients(x)[2]
            product, means = skip.double() @ product, skip.mean((0, 1, 2)).double() @ means
            largest = max(largest, gains(means).item())
            x = mixing(x, sublayer)
            x = x / x.std()
    gain = gains(product).max().item()
    report = mixing_report(records)
    print(kind, "gain of the worst token:", gain, report)
    assert len(records) == 50
    assert report["gain"] == pytest.approx(largest, rel=1e-5)
    assert low - 1e-5 < gain < high
    assert (report["row_error"] < 1e-5) == (kind != "hc")
    assert (report["column_error"] < 1e-5) == (kind == "mhc_lite")


# ---- the whole mixing


def naive_mixing(mixing: HyperConnections, x: Tensor, config: ModelConfig) -> Tensor:
    """The formulas of the papers, token by token, with one branch after the other."""
    module, n = mixing.coefficients, config.mixing_streams
    out = torch.empty_like(x)
    for frame, i, j in itertools.product(*map(range, x.shape[:3])):
        tokens = x[frame].flatten(0, 1) if config.mixing_coefficients == "pooled" else x[frame, i, j][None]
        state = tokens.mean(0).flatten()
        state = state / (state.square().mean() + 1e-6).sqrt()
        dynamic = module.weight @ state
        if config.mixing == "hc":
            dynamic = torch.tanh(dynamic)
        gate = torch.cat([gate.expand(size) for gate, size in zip(module.gates, (n, 2 * n, len(dynamic) - 3 * n), strict=True)])
        logits = module.static + gate * dynamic
        pre, post, res = logits[:n], logits[n : 3 * n], logits[3 * n :]
        if config.mixing == "hc":
            matrix = res.view(n, n)
        else:
            pre, post = 1 / (1 + (-pre).exp()), 2 / (1 + (-post).exp())
            rows = res.view(n, n).tolist() if config.mixing == "mhc" else res.tolist()
            matrix = naive_sinkhorn(rows, 20) if config.mixing == "mhc" else naive_permutation_mixture(rows, n)
            matrix = torch.tensor(matrix, dtype=x.dtype)
        streams = x[frame, i, j]
        read = pre @ streams
        first, second = sublayer(read)
        out[frame, i, j] = matrix @ streams + post[:n].outer(first) + post[n:].outer(second)
    return out


@pytest.mark.parametrize(("kind", "n", "coefficients"), EVERY)
def test_mixing_against_a_loop_over_tokens(kind, n, coefficients):
    config = settings(kind, n, coefficients)
    mixing = random_mixing(config).double()
    x = torch.randn(2, 3, 5, n, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixing(x, sublayer), naive_mixing(mixing, x, config), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "n", "coefficients"), EVERY)
def test_gradients(kind, n, coefficients):
    mixing = random_mixing(settings(kind, n, coefficients, sinkhorn_iterations=3), dim=2).double()
    set_annealing(mixing, 0.25)
    names = [name for name, _ in mixing.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(mixing, dict(zip(names, parameters, strict=True)), (x, sublayer))

    x = torch.randn(2, 1, 2, n, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *mixing.parameters()))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_first_coefficients_are_those_of_a_plain_block(kind, n):
    x = torch.randn(2, 3, 5, n, 6)
    for index in range(2 * n):
        read, write, skip = MixingCoefficients(6, 2, index, settings(kind, n))(x)
        torch.testing.assert_close(read.sum(-1), torch.ones(2, 3, 5), rtol=0, atol=2e-7)
        assert (read.argmax(-1) == index % n).all()
        assert (read[..., index % n] >= 0.97 - 1e-6).all()
        assert torch.equal(write, torch.ones(2, 3, 5, 2, n))
        assert (skip - torch.eye(n)).abs().max() < 0.0101


def test_coefficients_of_a_frame_depend_on_that_frame_only():
    for coefficients in ("token", "pooled"):
        module = random_mixing(settings("mhc", coefficients=coefficients)).coefficients
        x = torch.randn(4, 3, 5, 4, 6)
        other = torch.randn_like(x)
        other[2] = x[2]
        for one, two in zip(module(x), module(other), strict=True):
            torch.testing.assert_close(one[2], two[2])
            assert not torch.allclose(one[1], two[1], atol=1e-3)


def test_pooled_and_token_agree_on_a_constant_image():
    token, pooled = (random_mixing(settings("mhc", coefficients=name)) for name in ("token", "pooled"))
    pooled.load_state_dict(token.state_dict())
    constant = torch.randn(2, 1, 1, 4, 6).expand(2, 5, 7, 4, 6)
    torch.testing.assert_close(token(constant, sublayer), pooled(constant, sublayer))
    assert pooled.coefficients(constant)[2].shape == (2, 1, 1, 4, 4)
    varied = torch.randn(2, 5, 7, 4, 6)
    assert not torch.allclose(token(varied, sublayer), pooled(varied, sublayer), atol=1e-2)


# ---- annealing, and the plain block


@pytest.mark.parametrize(("kind", "n", "coefficients"), EVERY)
def test_full_annealing_is_the_plain_shortcut_to_the_last_bit(kind, n, coefficients):
    mixing = random_mixing(settings(kind, n, coefficients), spread=2.0)
    x = torch.randn(2, 3, 5, n, 6)
    learnt = mixing.coefficients(x)[2]
    set_annealing(mixing, 0.25)
    torch.testing.assert_close(mixing.coefficients(x)[2], 0.75 * learnt + 0.25 * torch.eye(n))
    set_annealing(mixing, 1)
    read, write, _ = mixing.coefficients(x)
    outputs = sublayer((read.unsqueeze(-1) * x).sum(-2))
    expected = x
    for branch, output in enumerate(outputs):
        expected = expected + write[..., branch, :, None] * output.unsqueeze(-2)
    assert torch.equal(mixing(x, sublayer), expected)


@pytest.mark.parametrize(("kind", "n", "coefficients"), EVERY)
@pytest.mark.parametrize("annealing", [0, 1])
def test_backbone_starts_as_the_plain_one(kind, n, coefficients, annealing):
    """With the same weights of the sub-layers, which the same seed gives; copies pass through rows that sum to 1, too."""
    backbones = []
    for config in (settings("none", depths=(2, 1)), settings(kind, n, coefficients, depths=(2, 1))):
        torch.manual_seed(0)
        backbones.append(HybridBackbone(config, CPU))
    plain, mixed = backbones
    missing = mixed.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(".mixing" in name for name in missing.missing_keys)
    set_annealing(mixed, annealing)
    frames = torch.rand(2, 3, 48, 80)
    with torch.no_grad():
        for expected, level in zip(plain(frames), mixed(frames), strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-5, atol=1e-5)


def test_plain_block_is_a_sum():
    """none: no parameters, and to the last bit the sums in the order of the branches."""
    block = LGSBlock(16, settings("none", head_dim=8), 1, CPU)
    assert not any("mixing" in name for name in block.state_dict())
    x = torch.randn(2, 5, 7, 16)
    with torch.no_grad():
        y = x
        for branch in block.branches.values():
            y = y + branch(block.norm1(x))
        assert torch.equal(block(x), y + block.fusion(block.norm2(y)))


def test_annealing_belongs_to_the_weights():
    one, other = (HybridBackbone(settings("mhc"), CPU) for _ in range(2))
    set_annealing(one, 0.75)
    factors = {name: tensor for name, tensor in one.state_dict().items() if name.endswith(".annealing")}
    assert len(factors) == 4
    other.load_state_dict(one.state_dict())
    assert all(tensor == 0.75 for name, tensor in other.state_dict().items() if name in factors)
    with pytest.raises(ValueError, match=r"annealing factor is 1\.5"):
        set_annealing(one, 1.5)


# ---- training


def stage_streams(backbone: HybridBackbone, frames: Tensor) -> Tensor:
    """The streams at the end of the first stage."""
    seen = []
    handle = backbone.stages[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    backbone(frames)
    handle.remove()
    return seen[0]


def spread_of_streams(streams: Tensor) -> float:
    return ((streams - streams.mean(-2, keepdim=True)).norm() / streams.norm()).item()


def train(backbone: HybridBackbone, frames: Tensor, steps: int) -> None:
    torch.manual_seed(1)
    targets = [torch.randn_like(level) for level in backbone(frames)[3:]]
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((level - target).square().mean() for level, target in zip(backbone(frames)[3:], targets, strict=True)).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_streams_part_and_every_coefficient_learns(kind):
    config = settings(kind, depths=(3, 1), backbone_mode="gated_attn_only")
    backbone = HybridBackbone(config, CPU)
    frames = torch.rand(2, 3, 64, 64)
    assert spread_of_streams(stage_streams(backbone, frames)) < 1e-6
    train(backbone, frames, steps=20)
    spread = spread_of_streams(stage_streams(backbone, frames))
    print(kind, "spread of the streams after 20 steps:", spread)
    assert spread > 5e-3
    first, *middle, _ = (module for module in backbone.stages[0].modules() if isinstance(module, MixingCoefficients))
    assert len(middle) == 4
    for module in middle:
        gradients = [group for p in (module.static, module.weight) for group in p.grad.split(module.sizes)]
        assert all(gradient.abs().max() > 1e-8 for gradient in (*gradients, *module.gates.grad))
    if kind != "hc":  # the first mixing of a stage sees equal streams, which a doubly stochastic matrix does not change
        assert first.static.grad[-first.kind.width :].abs().max() < 0.01 * gradients[2].abs().max()


@pytest.mark.parametrize("kind", ["mhc", "mhc_lite"])
def test_equal_reads_would_keep_the_streams_equal(kind):
    """Why the mixings of a stage start with different reads."""
    backbone = HybridBackbone(settings(kind, depths=(3, 1), backbone_mode="gated_attn_only"), CPU)
    for module in backbone.modules():
        if isinstance(module, MixingCoefficients):
            nn.init.constant_(module.static[:4], math.log(1 / 3))  # sigmoid 1/4 for each
    frames = torch.rand(2, 3, 64, 64)
    train(backbone, frames, steps=5)
    assert spread_of_streams(stage_streams(backbone, frames)) < 1e-5


@pytest.mark.parametrize(("kind", "n", "coefficients"), EVERY)
def test_every_switch_trains_the_whole_network(kind, n, coefficients):
    """One step, on frames that need padding to odd sizes at stride 8 and 16, in channels-last memory."""
    model = FrameInterpolator(settings(kind, n, coefficients)).to(memory_format=torch.channels_last)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    img0, img1 = torch.rand(2, 1, 3, 37, 75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.no_grad():
        model.refine.head.weight.normal_(std=0.1)  # zero at first, which lets nothing through to the backbone
    (model(img0, img1, torch.tensor([0.5])).imgt - torch.rand_like(img0)).abs().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    optimizer.step()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.endswith("coefficients.static") for name in changed)
    assert any(name.endswith("coefficients.weight") for name in changed)
    assert model(img0, img1, torch.tensor([0.5])).imgt.isfinite().all()


def test_weight_decay_spares_the_static_parts_and_gates():
    parameters = HybridBackbone(settings("mhc"), CPU).named_parameters()
    decayed = {name.rpartition(".")[2]: decays(name, parameter) for name, parameter in parameters if ".mixing" in name}
    assert decayed == {"static": False, "gates": False, "weight": True}


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_stay_fp32_under_autocast(kind, dtype):
    mixing = random_mixing(settings(kind))
    module, seen = mixing.coefficients, []
    skip = module.kind.skip

    def spy(logits):
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return skip(logits)

    module.kind.skip = spy
    x = torch.randn(2, 3, 5, 4, 6).to(dtype)
    reference = module(x.float())
    exact = mixing(x.float(), sublayer)
    with torch.autocast("cpu", dtype=dtype):
        inside = module(x)
        result = mixing(x, sublayer)
    assert set(seen) == {(torch.float32, False)}
    for value, expected in zip(inside, reference, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    assert result.dtype == dtype
    error = ((result.float() - exact).norm() / exact.norm()).item()
    rounding = ((exact.to(dtype).float() - exact).norm() / exact.norm()).item()
    print(kind, dtype, "relative error of the streams:", error, "of rounding them once:", rounding)
    assert error < 2 * rounding  # the read and the branches are rounded, too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(dtype):
    """What the backward pass recomputes is fp32 again: the gradients of half-precision streams against those of fp32."""
    mixing = random_mixing(settings("mhc"))
    half = torch.randn(2, 3, 5, 4, 6).to(dtype)
    weight = torch.randn(half.shape)
    gradients = []
    for x, enabled in ((half, True), (half.float(), False)):
        x.requires_grad_()
        mixing.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            (mixing(x, sublayer) * weight).sum().backward()
        gradients.append([x.grad.float(), *(parameter.grad.clone() for parameter in mixing.parameters())])
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()


# ---- monitoring


def test_recording_sees_the_last_forward_and_leaves_nothing_behind():
    model = HybridBackbone(settings("hc", depths=(2, 1)), CPU)
    set_annealing(model, 0.5)
    skip = model.stages[0][0].mixing2.coefficients
    with torch.no_grad():
        skip.static[-16:].mul_(3)  # I -> 3 I, and 2 I under the annealing
    with recording(model) as records:
        for _ in range(2):
            sum(level.mean() for level in model(torch.rand(2, 3, 32, 48))).backward()
    assert [record.place for record in records.values()] == [0, 1, 2, 3, 0, 1]
    torch.testing.assert_close(records["stages.0.0.mixing2.coefficients"].mean, 2 * torch.eye(4))
    assert mixing_report(records) == pytest.approx({"row_error": 1, "column_error": 1, "gain": 2, "annealing": 0.5})
    assert not any(module._forward_hooks for module in model.modules())


def test_recording_a_plain_network_is_empty():
    model = HybridBackbone(settings("none"), CPU)
    with recording(model) as records:
        model(torch.rand(2, 3, 32, 48))
    assert mixing_report(records) == {}


@pytest.mark.parametrize("kind", ["mhc", "mhc_lite"])
def test_backward_keeps_no_intermediate_results_of_the_coefficients(kind):
    """The forward pass keeps streams and coefficients; twenty normalisations would be several times as much."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mixing = random_mixing(settings(kind), dim=16)
    x = torch.randn(2, 8, 8, 4, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mixing(x, lambda read: (F.silu(read), read))
    assert y.requires_grad
    assert sum(kept.values()) < 2.5 * x.untyped_storage().nbytes()
