"""Attention -> Mamba-2: every slice by brute force, the resulting computation, and rejected inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from vfi.config import presets
from vfi.config.configs import ModelConfig
from vfi.model.backbone import HybridBackbone
from vfi.model.interpolator import FrameInterpolator
from vfi.model.matvlm_init import init_mamba_from_attn, matvlm_init_mamba2, random_source
from vfi.model.ss2d import ss2d
from vfi.model.window_attention import GatedWindowAttention
from vfi.ops.ssm.scan_order import interleaved_scan

CPU = torch.device("cpu")
DIM, D = 32, 8  # channels, and those of a head: four heads in the donor
PLAN_B = {"expand": 1, "ssd_groups": "per_head", "d_state": D, "head_dim": D}
PLAN_C = PLAN_B | {"xb_share": 2}


def attention(dim=DIM, **switches):
    torch.manual_seed(1)
    return GatedWindowAttention(dim, ModelConfig(head_dim=D, **switches), False, CPU)


def scan(**switches):
    torch.manual_seed(2)
    return ss2d(DIM, ModelConfig(**{"head_dim": D} | switches), CPU)


def rows_of(donor):
    """Rows of the donor by head: q[h], k[h], v[h], each [D, DIM], and columns of W_O by head, each [DIM, D]."""
    weight = donor.qkv_gate.weight
    q, k, v = ([weight[part * DIM + h * D : part * DIM + (h + 1) * D] for h in range(DIM // D)] for part in range(3))
    return q, k, v, [donor.out_proj.weight[:, h * D : (h + 1) * D] for h in range(DIM // D)]


def transplant(donor, receiver, plan):
    """Records, and the receiver's weights before the transplant."""
    before = {name: t.clone() for name, t in receiver.state_dict().items()}
    records = matvlm_init_mamba2(receiver, donor.state_dict(), plan)
    for name in set(before) - {"in_proj.weight", "out_proj.weight"}:
        assert torch.equal(receiver.state_dict()[name], before[name]), name
    return records, before


def parts_of(weight, widths):
    assert sum(widths) == len(weight)
    return weight.split(widths)


def test_plan_b_matches_every_slice():
    donor, receiver = attention(), scan(**PLAN_B)
    records, before = transplant(donor, receiver, "B")
    q, k, v, out = rows_of(donor)
    widths = [DIM, DIM, DIM, DIM, DIM // D]
    z, x, B, C, dt = parts_of(receiver.in_proj.weight, widths)
    old_z, *_, old_dt = parts_of(before["in_proj.weight"], widths)
    assert torch.equal(x, torch.cat(v))
    assert torch.equal(B, torch.cat(k))
    assert torch.equal(C, torch.cat(q))
    assert torch.equal(receiver.out_proj.weight, torch.cat(out, dim=1))
    assert torch.equal(z, old_z)
    assert torch.equal(dt, old_dt)
    assert list(map(str, records)) == [
        "x <- W_V: 32 of 32 rows, from 32 of the donor's 32",
        "B <- W_K: 32 of 32 rows, from 32 of the donor's 32",
        "C <- W_Q: 32 of 32 rows, from 32 of the donor's 32",
        "out_proj <- W_O: 32 of 32 columns, from 32 of the donor's 32",
    ]


def test_plan_b_computes_linear_attention(monkeypatch):
    """Without convolution, SiLU, decay and D, the scan's core gives dt * sum_{j <= i} (q_i . k_j) v_j of the donor."""
    donor, receiver = attention(), scan(**PLAN_B)
    matvlm_init_mamba2(receiver, donor.state_dict(), "B")
    donor, receiver = donor.double(), receiver.double()
    dt = 0.3
    with torch.no_grad():
        receiver.conv1d.weight.zero_()
        receiver.conv1d.weight[:, :, -1] = 1
        receiver.conv1d.bias.zero_()
        receiver.D.zero_()
        receiver.A_log.fill_(-40)
        receiver.in_proj.weight[-receiver.heads :] = 0
        receiver.dt_bias.fill_(torch.tensor(dt, dtype=torch.float64).expm1().log())  # the inverse of softplus
    monkeypatch.setattr(F, "silu", lambda t: t)
    core, seen = receiver.ssd, []

    def spy(*args):
        seen.append(core(*args))
        return seen[-1]

    receiver.ssd = spy
    frames = torch.randn(2, 3, 4, DIM, dtype=torch.float64)
    receiver(frames)

    tokens = interleaved_scan(frames)
    q, k, v, _ = donor.qkv_gate(tokens).split(donor.splits, dim=-1)
    expected = torch.zeros(4, 24, DIM // D, D, dtype=torch.float64)
    for h in range(DIM // D):
        head = slice(h * D, (h + 1) * D)
        for i in range(24):
            for j in range(i + 1):
                product = (q[:, i, head] * k[:, j, head]).sum(-1, keepdim=True)
                expected[:, i, h] += dt * product * v[:, j, head]
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_plan_c_averages_the_heads_of_a_group():
    donor, receiver = attention(), scan(**PLAN_C)
    records, _ = transplant(donor, receiver, "C")
    q, k, v, out = rows_of(donor)
    _, x, B, C, _ = parts_of(receiver.in_proj.weight, [DIM, DIM // 2, DIM // 2, DIM, DIM // D])
    torch.testing.assert_close(x, torch.cat([(v[0] + v[1]) / 2, (v[2] + v[3]) / 2]))
    torch.testing.assert_close(B, torch.cat([(k[0] + k[1]) / 2, (k[2] + k[3]) / 2]))
    assert torch.equal(C, torch.cat(q))
    assert torch.equal(receiver.out_proj.weight, torch.cat(out, dim=1))
    assert [str(record) for record in records[:2]] == [
        "x <- means of 2 heads of W_V: 16 of 16 rows, from 32 of the donor's 32",
        "B <- means of 2 heads of W_K: 16 of 16 rows, from 32 of the donor's 32",
    ]


def test_plan_a_with_shared_groups_copies_what_overlaps():
    """Twice the inner width, and one B and C of 20 rows: two and a half heads of K and Q, the same for both."""
    donor, receiver = attention(), scan(expand=2, d_state=20)
    records, before = transplant(donor, receiver, "A")
    q, k, v, out = rows_of(donor)
    widths = [2 * DIM, 2 * DIM, 20, 20, 2 * DIM // D]
    z, x, B, C, dt = parts_of(receiver.in_proj.weight, widths)
    old_z, old_x, _, _, old_dt = parts_of(before["in_proj.weight"], widths)
    assert torch.equal(x, torch.cat([*v, old_x[DIM:]]))
    assert torch.equal(B, torch.cat(k)[:20])
    assert torch.equal(C, torch.cat(q)[:20])
    assert torch.equal(receiver.out_proj.weight, torch.cat([*out, before["out_proj.weight"][:, DIM:]], dim=1))
    assert torch.equal(z, old_z)
    assert torch.equal(dt, old_dt)
    assert list(map(str, records)) == [
        "x <- W_V: 32 of 64 rows, from 32 of the donor's 32",
        "B <- W_K: 20 of 20 rows, from 20 of the donor's 32",
        "C <- W_Q: 20 of 20 rows, from 20 of the donor's 32",
        "out_proj <- W_O: 32 of 64 columns, from 32 of the donor's 32",
    ]


@pytest.mark.parametrize("state", [6, 10])
def test_plan_a_per_head_keeps_heads_together(state):
    """A smaller or larger state than the donor's head: the rows that both have, head by head."""
    donor, receiver = attention(), scan(expand=2, d_state=state, ssd_groups="per_head")
    _, before = transplant(donor, receiver, "A")
    q, k, _, _ = rows_of(donor)
    heads = 2 * DIM // D
    widths = [2 * DIM, 2 * DIM, heads * state, heads * state, heads]
    for part, source in ((2, k), (3, q)):
        expected = parts_of(before["in_proj.weight"], widths)[part].clone()
        for h in range(DIM // D):
            expected[h * state : h * state + min(state, D)] = source[h][: min(state, D)]
        assert torch.equal(parts_of(receiver.in_proj.weight, widths)[part], expected)


def test_plan_a_with_shared_heads_takes_the_first_of_each_group():
    donor, receiver = attention(), scan(**PLAN_C | {"expand": 2})
    _, before = transplant(donor, receiver, "A")
    q, k, v, out = rows_of(donor)
    widths = [2 * DIM, DIM, DIM, 2 * DIM, 2 * DIM // D]
    _, x, B, C, _ = parts_of(receiver.in_proj.weight, widths)
    _, old_x, old_B, old_C, _ = parts_of(before["in_proj.weight"], widths)
    assert torch.equal(x, torch.cat([v[0], v[2], old_x[2 * D :]]))
    assert torch.equal(B, torch.cat([k[0], k[2], old_B[2 * D :]]))
    assert torch.equal(C, torch.cat([q[0], old_C[D : 2 * D], q[2], old_C[3 * D :]]))
    old_out = before["out_proj.weight"]
    expected = torch.cat([out[0], old_out[:, D : 2 * D], out[2], old_out[:, 3 * D :]], dim=1)
    assert torch.equal(receiver.out_proj.weight, expected)


@pytest.mark.parametrize(
    ("plan", "switches", "message"),
    [
        ("B", {"d_state": D}, r"plan B needs --expand 1 --ssd_groups per_head --d_state 8 --head_dim 8 --xb_share 1"),
        ("B", PLAN_B | {"expand": 2}, "plan B needs --expand 1"),
        ("B", PLAN_B | {"d_state": 16}, "--d_state 8 --head_dim 8"),
        ("B", PLAN_C, "--xb_share 1"),
        ("C", PLAN_B, "plan C needs .* --xb_share 2 or more; plan A takes any layout"),
        ("C", PLAN_C | {"d_state": 16}, "plan C needs"),
        ("A", {"ssm": "mamba1"}, "for --ssm mamba2"),
        ("D", {}, "choose from A, B, C"),
    ],
)
def test_wrong_layout_names_the_settings(plan, switches, message):
    with pytest.raises(ValueError, match=message):
        matvlm_init_mamba2(scan(**switches), attention().state_dict(), plan)


def test_other_donor_is_refused():
    with pytest.raises(ValueError, match="the donor has 48 channels here and this model 32"):
        matvlm_init_mamba2(scan(**PLAN_B), attention(dim=48).state_dict(), "B")
    donor = GatedWindowAttention(DIM, ModelConfig(head_dim=16), False, CPU)
    with pytest.raises(ValueError, match="the donor has 2 heads and this model's --head_dim 8 makes 4"):
        matvlm_init_mamba2(scan(**PLAN_B), donor.state_dict(), "B")


TINY = dataclasses.replace(presets.tiny().model, depths=(2, 1), expand=1, ssd_groups="per_head", d_state=16, head_dim=16)


def donor_model(seed=3, **switches):
    torch.manual_seed(seed)
    return FrameInterpolator(dataclasses.replace(TINY, backbone_mode="gated_attn_only", **switches))


@pytest.mark.parametrize("mode", ["hybrid", "mamba2_only"])
def test_every_block_takes_the_attention_of_its_place(mode):
    """A donor of the whole model, or of its backbone alone; the receiver's own attention stays."""
    donor = donor_model()
    receiver = HybridBackbone(dataclasses.replace(TINY, backbone_mode=mode), CPU)
    own = {name: t.clone() for name, t in receiver.state_dict().items() if ".ss2d." not in name}
    report = init_mamba_from_attn(receiver, donor.state_dict(), "B", donor_steps=20_000)
    for stage, depth in enumerate(TINY.depths):
        for i in range(depth):
            mamba = receiver.stages[stage][i].branches["ss2d"]
            attn = donor.backbone.stages[stage][i].branches["attention"]
            dim = attn.out_proj.in_features
            q, k, v = attn.qkv_gate.weight[: 3 * dim].split(dim)
            assert torch.equal(mamba.in_proj.weight[dim : 4 * dim], torch.cat((v, k, q)))
            assert torch.equal(mamba.out_proj.weight, attn.out_proj.weight)
    assert all(torch.equal(receiver.state_dict()[name], t) for name, t in own.items())
    assert report.warning is None
    text = str(report)
    assert "stages.0.1.branches.ss2d: x <- W_V: 64 of 64 rows" in text
    assert "stages.1.0.branches.ss2d: out_proj <- W_O: 128 of 128 columns" in text
    assert "trained for 20000 steps" in text
    assert len(report.lines) == 1 + 3 * 4 + 1
    again = HybridBackbone(dataclasses.replace(TINY, backbone_mode=mode), CPU)
    again.load_state_dict(receiver.state_dict())
    assert init_mamba_from_attn(again, donor.backbone.state_dict(), "B", 20_000) == report
    assert all(torch.equal(t, receiver.state_dict()[name]) for name, t in again.state_dict().items())


def test_the_receiver_still_predicts_and_trains():
    model = FrameInterpolator(TINY)
    report = init_mamba_from_attn(model.backbone, donor_model().state_dict(), "B", 20_000)
    assert report.warning is None
    img0, img1 = torch.rand(2, 1, 3, 32, 32)
    (model(img0, img1, torch.tensor([0.5])).imgt - img1).abs().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("steps", [None, 0, 999])
def test_untrained_donor_is_warned_of(steps):
    report = init_mamba_from_attn(HybridBackbone(TINY, CPU), random_source(TINY, seed=0), "B", steps)
    assert f"trained for {steps or 0} steps" in report.warning
    assert "copies random numbers" in report.warning
    assert str(report).endswith(f"WARNING: {report.warning}")


def test_control_arm_is_random_and_repeatable():
    """Same function, other numbers: no trained donor, the same for the same seed, and no effect on the global generator."""
    state = torch.get_rng_state()
    one, same, other = (random_source(TINY, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    name = "stages.0.0.branches.attention.qkv_gate.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    receivers = []
    for donor in (donor_model().state_dict(), one):
        torch.manual_seed(4)
        receivers.append(HybridBackbone(TINY, CPU))
        init_mamba_from_attn(receivers[-1], donor, "B", None)
    trained, control = (receiver.stages[0][0].branches["ss2d"].in_proj.weight for receiver in receivers)
    assert not torch.equal(trained[64:], control[64:])
    assert torch.equal(trained[:64], control[:64])  # z is not the donor's


def test_donor_that_does_not_fit_changes_nothing():
    receiver = HybridBackbone(TINY, CPU)
    before = {name: t.clone() for name, t in receiver.state_dict().items()}
    cases = [
        (donor_model(depths=(1, 1)), "the donor has no stages.0.1.branches.attention.*blocks 0.0, 1.0: use .* --depths"),
        (donor_model(width=16), "the donor has 128 channels here and this model 64: use the donor's --width"),
        (FrameInterpolator(dataclasses.replace(TINY, backbone_mode="mamba2_only")), r"blocks \(none\)"),
    ]
    for donor, message in cases:
        with pytest.raises(ValueError, match=message):
            init_mamba_from_attn(receiver, donor.state_dict(), "B", 20_000)
    with pytest.raises(ValueError, match="plan C needs"):
        init_mamba_from_attn(receiver, donor_model().state_dict(), "C", 20_000)
    assert all(torch.equal(receiver.state_dict()[name], t) for name, t in before.items())
    with pytest.raises(ValueError, match="no scan to initialise"):
        init_mamba_from_attn(donor_model().backbone, donor_model().state_dict(), "B", 20_000)
