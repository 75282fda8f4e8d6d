"""Branch A: scan directions, the Mamba-1 recurrence, and both kinds of SS2D against independent Mambas."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from vfi.config.configs import ModelConfig, OptimConfig
from vfi.errors import JobError
from vfi.model import ss2d as ss2d_module
from vfi.model.ss2d import Mamba1SS2D, Mamba2SS2D, orders_at_once, pairs_at_once, ss2d
from vfi.ops.ssm import scan_order, selective_scan, ssd
from vfi.ops.ssm.scan_order import SCANS, flip_scan, flip_unscan, interleaved_scan, interleaved_unscan
from vfi.ops.ssm.selective_scan import choose_selective_scan, selective_scan_elements, selective_scan_reference
from vfi.ops.ssm.ssd import mamba1_obstacle, ssd_elements
from vfi.training.optimizer import build_optimizer

CPU = torch.device("cpu")
SMALL = {"d_state": 16, "head_dim": 8, "expand": 2}


def test_flip_scan_order_of_every_token():
    frames, H, W = 4, 3, 5
    places = [(h, w) for h in range(H) for w in range(W)]
    columns = sorted(places, key=lambda place: (place[1], place[0]))
    x = torch.arange(frames * H * W, dtype=torch.float64).view(frames, H, W, 1)
    scanned = flip_scan(x)
    assert scanned.shape == (4 * frames, H * W, 1)
    for order, walk in enumerate((places, columns, places[::-1], columns[::-1])):
        for frame in range(frames):
            expected = [x[frame, h, w, 0].item() for h, w in walk]
            assert scanned[order * frames + frame, :, 0].tolist() == expected


@pytest.mark.parametrize(("B", "H", "W"), [(1, 1, 1), (2, 3, 5), (3, 8, 4)])
def test_flip_scan_is_undone_in_every_order(B, H, W):
    x = torch.randn(2 * B, H, W, 6, dtype=torch.float64)
    assert torch.equal(flip_unscan(flip_scan(x), B, H, W), x.expand(4, -1, -1, -1, -1))


def test_flip_scan_gradients():
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(16, 15, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flip_scan, (x,))
    assert torch.autograd.gradcheck(lambda t: flip_unscan(t, 2, 3, 5), (y,))


@pytest.mark.parametrize(("scan", "unscan"), [(interleaved_scan, interleaved_unscan), (flip_scan, flip_unscan)])
@pytest.mark.parametrize("orders", [range(0, 2), range(1, 3), range(3, 4)])
def test_some_orders_are_a_part_of_all(scan, unscan, orders):
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    whole = scan(x).unflatten(0, (4, -1))[orders.start : orders.stop]
    some = scan(x, orders)
    assert torch.equal(some, whole.flatten(0, 1))
    back = unscan(some, 2, 3, 5, orders)
    assert torch.equal(back, x.expand(len(orders), -1, -1, -1, -1))
    weight = torch.randn_like(back)
    torch.testing.assert_close(torch.autograd.grad((back * weight).sum(), x)[0], weight.sum(0))


def test_cached_indices_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(scan_order, "_CACHE_BYTES", 1_000_000)
    for side in range(20, 60):
        interleaved_scan(torch.zeros(2, side, side, 1))
        flip_scan(torch.zeros(2, side, side, 1))
    held = sum(t.nbytes for pair in scan_order._cache.values() for t in pair)
    assert 500_000 < held <= 1_000_000
    flip_scan(torch.zeros(2, 200, 200, 1))  # larger than the bound on its own: kept until the next one
    assert len(scan_order._cache) == 1


def recurrence(x, dt, A, B, C, D, dt_bias):
    """The state-space recurrence of Mamba-1, token by token."""
    step = F.softplus(dt + dt_bias)
    state = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype)
    y = []
    for i in range(x.shape[1]):
        added = (step[:, i] * x[:, i]).unsqueeze(-1) * B[:, i].unsqueeze(1)
        state = state * torch.exp(step[:, i].unsqueeze(-1) * A) + added
        y.append((state * C[:, i].unsqueeze(1)).sum(-1) + D * x[:, i])
    return torch.stack(y, dim=1)


def scan_inputs(L, N=2, D=3, S=5, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(L)
    shapes = [(N, L, D), (N, L, D), (D, S), (N, L, S), (N, L, S), (D,), (D,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[2] = -tensors[2].exp()
    return [tensor.to(device, dtype) for tensor in tensors]


def with_gradients(function, inputs):
    """Output of `function` and the gradient of every input, for a fixed weighting of the output."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad((y * weight.to(y)).sum(), inputs)]


@pytest.mark.parametrize("L", [1, 2, 7, 64, 65, 200])
def test_selective_scan_reference_is_the_recurrence(L):
    inputs = scan_inputs(L)
    pairs = zip(with_gradients(selective_scan_reference, inputs), with_gradients(recurrence, inputs), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("elements", [1, 2 * 30 * 5, 3 * 30 * 5, 6 * 30 * 5])
def test_selective_scan_in_slices_is_the_same(elements, monkeypatch):
    """Slices of one channel, of two, of one row, of two rows."""
    inputs = scan_inputs(30, N=3)
    whole = with_gradients(selective_scan_reference, inputs)
    monkeypatch.setitem(selective_scan._SLICE, "cpu", elements)
    for ours, expected in zip(with_gradients(selective_scan_reference, inputs), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_selective_scan_reference_gradients():
    inputs = [tensor.requires_grad_() for tensor in scan_inputs(11, N=1, D=2, S=2)]
    assert torch.autograd.gradcheck(selective_scan_reference, inputs)


def test_selective_scan_survives_wide_steps():
    """Large time steps decay to nothing and must not become NaN."""
    inputs = scan_inputs(130, dtype=torch.float32)
    inputs[1] = inputs[1] * 100
    assert all(t.isfinite().all() for t in with_gradients(selective_scan_reference, inputs))


def test_selective_scan_keeps_no_states():
    """What autograd keeps is of the size of the inputs, not of all states (N * L * D * S)."""
    inputs = [t.requires_grad_() for t in scan_inputs(256, N=2, D=8, S=64)]
    kept: list[int] = []

    def pack(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan_reference(*inputs)
    assert kept
    assert max(kept) <= 2 * 256 * 64


def test_selective_scan_choice_says_why():
    function, reason = choose_selective_scan("auto", CPU)
    assert function is selective_scan_reference
    assert reason == "selective_scan: reference (mamba_ssm's kernels need a CUDA GPU and the device is cpu)"
    with pytest.raises(JobError, match="mamba_ssm cannot run"):
        choose_selective_scan("mamba_ssm", CPU)
    with pytest.raises(ValueError, match="does not exist"):
        choose_selective_scan("cuda", CPU)


def test_empty_stand_in_does_not_pass_for_the_extension(monkeypatch):
    """Mamba-2's import puts an empty module in the place of Mamba-1's extension; Mamba-1 must still miss it."""
    monkeypatch.setattr(selective_scan, "kernel_obstacle", lambda device: None)  # as on a GPU with mamba_ssm
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)  # as if it were not installed
    for _ in range(2):
        function, reason = choose_selective_scan("auto", CPU)
        assert function is selective_scan_reference
        assert "selective_scan_cuda" in reason
        with pytest.raises(JobError, match=r"selective_scan_cuda.*build mamba_ssm with CUDA"):
            choose_selective_scan("mamba_ssm", CPU)
    real = types.ModuleType("selective_scan_cuda")
    real.fwd = real.bwd = None
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", real)
    assert mamba1_obstacle() is None
    assert choose_selective_scan("auto", CPU)[1] == "selective_scan: mamba_ssm (available on cpu)"


def test_extension_that_cannot_be_loaded_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "selective_scan_cuda.py").write_text("raise ImportError('undefined symbol: made for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "selective_scan_cuda", raising=False)
    try:
        assert "made for another torch" in mamba1_obstacle()
        assert "made for another torch" in mamba1_obstacle()  # also once the stand-in is there
    finally:
        sys.modules.pop("selective_scan_cuda", None)


# transformers is imported where it is needed: the tests for a GPU do without it
def mamba1_of_transformers(dim):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=dim, state_size=SMALL["d_state"], expand=SMALL["expand"], time_step_rank="auto", conv_kernel=4,
        use_bias=False, use_conv_bias=True, use_mambapy=False,
    )  # fmt: skip
    return MambaMixer(config, layer_idx=0)


def mamba2_of_transformers(dim, groups=1):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    heads = SMALL["expand"] * dim // SMALL["head_dim"]
    config = Mamba2Config(
        hidden_size=dim, num_heads=heads, head_dim=SMALL["head_dim"], state_size=SMALL["d_state"], expand=SMALL["expand"],
        n_groups=groups, chunk_size=32, layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True,
    )  # fmt: skip
    return Mamba2Mixer(config, layer_idx=0)


KINDS = {
    "mamba1": (lambda: mamba1_of_transformers(16), {"ssm": "mamba1"}),
    "mamba2": (lambda: mamba2_of_transformers(16), {}),
    "mamba2_per_head": (lambda: mamba2_of_transformers(16, groups=4), {"ssd_groups": "per_head"}),
}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_ss2d_is_a_mamba_over_four_sequences(kind, scan):
    """The cheaper form against an independent Mamba on the four reordered copies: output and every gradient."""
    build, switches = KINDS[kind]
    ours = ss2d(16, ModelConfig(**SMALL, scan=scan, **switches), CPU).double()
    theirs = build().double().eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 5, 7, 16, dtype=torch.float64)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ours(ours_x)
    # it computes in fp32 inside, hence the tolerance
    sequences = SCANS[scan].scan(theirs_x, range(4))
    expected = SCANS[scan].unscan(theirs(sequences), 2, 5, 7, range(4)).sum(0)
    torch.testing.assert_close(y, expected.double(), rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-3, atol=1e-4)
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - their_gradients.pop(name)).norm() / parameter.grad.norm()
        assert difference < 1e-4, name
    assert not their_gradients


@pytest.mark.parametrize("share", [2, 4])
def test_xb_share_is_per_head_with_repeated_weights(share):
    """Heads that share x and B equal heads of their own with equal weights: output and the gradient of the input."""
    shared = ss2d(16, ModelConfig(**SMALL, ssd_groups="per_head", xb_share=share), CPU).double()
    own = ss2d(16, ModelConfig(**SMALL, ssd_groups="per_head"), CPU).double()
    heads, P, S = 4, SMALL["head_dim"], SMALL["d_state"]

    def repeat_heads(rows, width):
        return torch.cat([rows[h // share * width : (h // share + 1) * width] for h in range(heads)])

    def spread(xbc):
        x, B, C = xbc.split([heads // share * P, heads // share * S, heads * S])
        return torch.cat((repeat_heads(x, P), repeat_heads(B, S), C))

    state = shared.state_dict()
    z, xbc, dt = state["in_proj.weight"].split([heads * P, shared.splits[1], heads])
    state["in_proj.weight"] = torch.cat((z, spread(xbc), dt))
    state |= {name: spread(state[name]) for name in ("conv1d.weight", "conv1d.bias")}
    own.load_state_dict(state)
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    for ours, expected in zip(with_gradients(shared, [x]), with_gradients(own, [x]), strict=True):
        torch.testing.assert_close(ours, expected)
    assert shared.in_proj.weight.shape[0] < own.in_proj.weight.shape[0]


def spy_on_core(module):
    """List of the number of sequences in every call of the module's recurrence."""
    name = "ssd" if isinstance(module, Mamba2SS2D) else "selective_scan"
    core, seen = getattr(module, name), []

    def spy(x, *rest):
        seen.append(x.shape[0])
        return core(x, *rest)

    setattr(module, name, spy)
    return seen


# calls of the recurrence, in sequences, for 3 pairs of the interleaved scan when so many orders of so many pairs fit
@pytest.mark.parametrize(
    ("fits", "calls"), [(12, [12]), (11, [6, 6]), (6, [6, 6]), (3, [3] * 4), (2, [2] * 4 + [2] * 2), (1, [1] * 12)]
)
@pytest.mark.parametrize(("ssm", "scan"), [("mamba2", "interleaved"), ("mamba1", "flip")])
def test_split_calls_change_nothing(ssm, scan, fits, calls, monkeypatch):
    module = ss2d(16, ModelConfig(**SMALL, ssm=ssm, scan=scan, ssd_backend="reference"), CPU).double()
    x = torch.randn(6, 5, 7, 16, dtype=torch.float64)
    inputs = [x, *(p.detach() for p in module.parameters())]
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    whole = with_gradients(run, inputs)
    sequences = SCANS[scan].sequences  # of a pair in one order
    one = sequences * module.elements(70 // sequences)
    monkeypatch.setattr(ss2d_module, "MAX_ELEMENTS", fits * one)
    seen = spy_on_core(module)
    parts = with_gradients(run, inputs)
    # the reference asks for its states again in backward, but the module asks for each part once
    assert seen == [sequences * n for n in calls]
    for ours, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_orders_run_one_by_one_without_gradients(monkeypatch):
    module = ss2d(16, ModelConfig(**SMALL, ssd_backend="reference"), CPU)
    x = torch.randn(2, 5, 7, 16)
    whole = module(x)
    monkeypatch.setattr(ss2d_module, "LEAN_ELEMENTS", module.elements(70))
    seen = spy_on_core(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x), whole)
    assert seen == [1] * 4
    module(x)
    assert seen[4:] == [4]


def test_4k_is_split_where_it_must_be():
    """4096x2304 at stride 8 is 512x288 tokens a frame; base has 256 channels there."""
    tokens = 2 * 512 * 288
    base = Mamba2SS2D(256, ModelConfig(width=32), CPU)
    one = base.elements(tokens)
    assert one == tokens * (512 + 64 + 64)  # x, B, C of one order of one pair
    assert 4 * one < 2**31  # one pair fits in four orders …
    assert [orders_at_once(pairs * one, gradients=True) for pairs in (1, 2, 3, 5, 6, 11)] == [4, 4, 2, 2, 1, 1]
    assert orders_at_once(one, gradients=False) == 1  # … and goes one by one where that saves memory
    assert pairs_at_once(one, 12) == 11
    # every head with its own B and C: the products C B^T of every head and chunk are larger than all inputs
    per_head = Mamba2SS2D(256, ModelConfig(width=32, ssd_groups="per_head"), CPU)
    assert per_head.elements(tokens) == tokens * 16 * 256
    assert [orders_at_once(per_head.elements(tokens), gradients) for gradients in (True, False)] == [1, 1]
    assert pairs_at_once(per_head.elements(tokens), 2) == 1
    # a single order of a single pair of 8192x4608 frames can't be split any further
    with pytest.raises(ValueError, match="--ssd_groups shared"):
        pairs_at_once(per_head.elements(4 * tokens), 1)


def test_elements_count_the_largest_tensor():
    assert ssd_elements(L=1000, H=4, P=32, G=1, S=16) == 1024 * 256  # C B^T of 4 chunks of 256
    assert ssd_elements(L=1000, H=16, P=64, G=1, S=16) == 1000 * 16 * 64  # x
    assert ssd_elements(L=1000, H=16, P=64, G=1, S=512) == 4 * 16 * 64 * 512  # states
    assert ssd_elements(L=256, H=2, P=8, G=2, S=1024) == 256 * 2 * 1024  # B
    assert selective_scan_elements(L=4096, D=8, S=16) == 4096 * 8
    assert selective_scan_elements(L=100, D=8, S=64) == 8 * 128


@pytest.mark.parametrize(("ssm", "kind"), [("mamba1", Mamba1SS2D), ("mamba2", Mamba2SS2D)])
def test_the_kind_survives_a_copy(ssm, kind):
    module = ss2d(16, ModelConfig(**SMALL, ssm=ssm), CPU)
    x = torch.randn(2, 3, 4, 16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is kind
        assert torch.equal(other(x), module(x))


def test_mamba1_starts_as_published():
    module = ss2d(64, ModelConfig(d_state=8, ssm="mamba1"), CPU)
    torch.testing.assert_close(module.A_log.exp(), torch.arange(1.0, 9).expand(128, -1))
    step = F.softplus(module.dt_proj.bias)
    assert 1e-3 * 0.99 < step.min() < step.max() < 1e-1 * 1.01
    assert module.dt_proj.in_features == 4  # ceil(64 / 16)
    assert module.dt_proj.weight.abs().max() <= 0.5


def test_mamba1_matrices_decay_and_dynamics_do_not():
    module = ss2d(16, ModelConfig(**SMALL, ssm="mamba1"), CPU)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in build_optimizer(module, OptimConfig()).param_groups)
    assert plain == {"A_log", "D", "conv1d.bias", "dt_proj.bias"}
    assert decayed == {"in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mamba1_core_stays_fp32_under_autocast(dtype):
    for precision, expected in (("fp32", torch.float32), ("input", dtype)):
        module = ss2d(16, ModelConfig(**SMALL, ssm="mamba1", ssd_precision=precision), CPU)
        core, seen = module.selective_scan, []

        def spy(x, dt, A, B, C, *rest, core=core, seen=seen):
            seen.extend(t.dtype for t in (x, dt, B, C))
            return core(x, dt, A, B, C, *rest)

        module.selective_scan = spy
        with torch.autocast("cpu", dtype=dtype):
            assert module(torch.randn(2, 4, 4, 16)).dtype == dtype
        assert seen == [expected] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("L", [100, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_scan_kernel_against_float64(L, dtype):
    """Output and every gradient: at most twice the error of plain torch on inputs of the same dtype."""
    device = torch.device("cuda")
    kernel, reason = choose_selective_scan("auto", device)
    if kernel is selective_scan_reference:
        pytest.skip(reason)
    exact = scan_inputs(L, D=24, S=16, device=device)
    truth = with_gradients(selective_scan_reference, exact)
    # A, D and dt_bias are parameters: fp32 whatever the activations are
    low = [t.to(torch.float32 if t.dim() < 3 else dtype) for t in exact]
    results = [with_gradients(function, low) for function in (kernel, selective_scan_reference)]
    for of_kernel, of_reference, true in zip(*results, truth, strict=True):
        errors = [((t.double() - true).norm() / true.norm()).item() for t in (of_kernel, of_reference)]
        assert errors[0] < 2 * errors[1] + {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("scan", SCANS)
def test_ss2d_is_the_published_mamba2_over_four_sequences(scan, monkeypatch):
    """`mamba_ssm.Mamba2` with the same weights on the four materialised sequences, in fp32: against float64, our error in the
    output and in every gradient is at most twice its error (both run their kernels' products in TF32)."""
    device = torch.device("cuda")
    reason = ssd.kernel_obstacle(device)
    if reason:
        pytest.skip(reason)
    mamba1_obstacle()  # makes the package importable without Mamba-1's extension
    from mamba_ssm.modules.mamba2 import Mamba2

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its convolution is cuDNN's, which would widen the bound
    torch.manual_seed(0)
    dim, pairs, H, W = 64, 2, 24, 37
    config = ModelConfig(scan=scan, ssd_backend="mamba_ssm")
    theirs = Mamba2(
        d_model=dim, d_state=config.d_state, expand=config.expand, headdim=config.head_dim, ngroups=1, d_conv=4, rmsnorm=True,
        norm_before_gate=False, use_mem_eff_path=False, device=device, dtype=torch.float32,
    )  # fmt: skip
    ours = ss2d(dim, config, device).to(device)
    exact = ss2d(dim, ModelConfig(scan=scan, ssd_backend="reference"), device).to(device, torch.float64)
    for module in (ours, exact):
        module.load_state_dict(theirs.state_dict())
    x = torch.randn(2 * pairs, H, W, dim, device=device)
    weight = torch.randn(2 * pairs, H, W, dim, device=device)

    def plain_form(x):
        return SCANS[scan].unscan(theirs(SCANS[scan].scan(x, range(4))), pairs, H, W, range(4)).sum(0)

    results = []
    for module, function in ((exact, exact), (ours, ours), (theirs, plain_form)):
        dtype = next(module.parameters()).dtype
        tokens = x.to(dtype, copy=True).requires_grad_()
        y = function(tokens)
        (y * weight.to(dtype)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"y": y.detach(), "x": tokens.grad} | gradients)
    truth, of_ours, of_theirs = results
    assert truth.keys() == of_ours.keys() == of_theirs.keys()
    errors = {
        name: [((result[name].double() - true).norm() / true.norm()).item() for result in (of_ours, of_theirs)]
        for name, true in truth.items()
    }
    print(scan, errors)
    for name, (our_error, their_error) in errors.items():
        assert our_error <= 2 * their_error + 1e-6, name
        assert their_error < 1e-2, name


@pytest.mark.gpu
def test_4k_takes_less_memory_order_by_order(monkeypatch):
    """One LGS level of base at 4096x2304 (512x288 tokens of 256 channels), bf16 autocast, no gradients."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    module = ss2d(256, ModelConfig(width=32, ssd_backend="mamba_ssm"), device).to(device)
    x = torch.randn(2, 288, 512, 256, device=device, dtype=torch.bfloat16)
    results, peaks = [], []
    for lean in (ss2d_module.LEAN_ELEMENTS, ss2d_module.MAX_ELEMENTS):
        monkeypatch.setattr(ss2d_module, "LEAN_ELEMENTS", lean)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            results.append(module(x))
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**30)
    print("peak GiB, one order and four at a time:", peaks)
    lean, whole = (result.float() for result in results)  # the sum over the orders rounds to bf16 after each of them
    assert (lean - whole).norm() < 5e-3 * whole.norm()
    assert peaks[0] < 6
    assert peaks[0] < 0.6 * peaks[1]
