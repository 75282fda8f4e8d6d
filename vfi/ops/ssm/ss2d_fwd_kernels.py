"""Fused Triton kernels of the forward pass of the SS2D (for the mathematics, see vfi/ops/ssm/ss2d_common.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from vfi.ops.ssm.ss2d_common import EPSILON, TAPS, _at_spot, _kernel, _places, _rows, _softplus, _tokens, _x
from vfi.ops.triton.math import LOG2_E, sigmoid


@triton.jit
def _write_convolved(total, token, here, channel, x, keys, inner, channels, with_keys, ACTIVATED: tl.constexpr):
    """Store x, and B and C if the program may have some of their channels, for a block of tokens."""
    if ACTIVATED:
        total *= sigmoid(total)
        at = x + token * inner + channel[None, :]
        tl.store(at, total.to(x.dtype.element_ty), mask=here & (channel < inner)[None, :])
    else:
        tl.store(x + token * channels + channel[None, :], total.to(x.dtype.element_ty), mask=here)
    if with_keys:
        value = total if ACTIVATED else total * sigmoid(total)
        at_keys = keys + token * (channels - inner) + (channel - inner)[None, :]
        tl.store(at_keys, value.to(keys.dtype.element_ty), mask=here & (channel >= inner)[None, :])


@_kernel
def convolve(
    map_, stride, weight, bias, x, keys, L, first_order, sequences, H, W, inner, channels,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, ACTIVATED: tl.constexpr,
):  # fmt: skip
    """Apply the causal convolution of x, B and C along each direction, and SiLU: x [n, L, inner], keys [n, L, B | C].

    If not ACTIVATED, x [n, L, channels] contains all of them before their SiLU. Program: (block of tokens, sequence, block of
    channels).
    """
    n = tl.program_id(1)
    order, sequence = first_order + n // sequences, n % sequences
    spots = H * W
    spot = tl.program_id(0) * (BLOCK // TOGETHER) + tl.arange(0, BLOCK // TOGETHER)
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    known = channel < channels
    with_keys = (tl.program_id(2) + 1) * WIDTH > inner
    start = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    weight += channel * TAPS
    w0 = tl.load(weight, mask=known, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(weight + 1, mask=known, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(weight + 2, mask=known, other=0.0).to(tl.float32)[None, :]
    w3 = tl.load(weight + 3, mask=known, other=0.0).to(tl.float32)[None, :]
    here = (spot < spots)[:, None] & known[None, :]
    before = here & (spot >= 1)[:, None]
    earlier = here & (spot >= 2)[:, None]
    at = _at_spot(spot, spots, order, H, W, stride)[:, None] + channel[None, :]
    at_before = _at_spot(spot - 1, spots, order, H, W, stride)[:, None] + channel[None, :]
    at_earlier = _at_spot(spot - 2, spots, order, H, W, stride)[:, None] + channel[None, :]
    token = n.to(tl.int64) * L + spot[:, None] * TOGETHER
    frame = spots.to(tl.int64) * stride
    if TOGETHER == 2:  # each spot has one token of either frame; in the reversed directions the second frame's comes first
        first = map_ + tl.where(order >= 2, sequences + sequence, sequence) * frame
        second = map_ + tl.where(order >= 2, sequence, sequences + sequence) * frame
        first_here = tl.load(first + at, mask=here, other=0.0).to(tl.float32)
        first_before = tl.load(first + at_before, mask=before, other=0.0).to(tl.float32)
        second_before = tl.load(second + at_before, mask=before, other=0.0).to(tl.float32)
        second_earlier = tl.load(second + at_earlier, mask=earlier, other=0.0).to(tl.float32)
        total = start + second_earlier * w0 + first_before * w1 + second_before * w2 + first_here * w3
        _write_convolved(total, token, here, channel, x, keys, inner, channels, with_keys, ACTIVATED)
        second_here = tl.load(second + at, mask=here, other=0.0).to(tl.float32)
        total = start + first_before * w0 + second_before * w1 + first_here * w2 + second_here * w3
        _write_convolved(total, token + 1, here, channel, x, keys, inner, channels, with_keys, ACTIVATED)
    else:
        map_ += sequence * frame
        at_first = _at_spot(spot - 3, spots, order, H, W, stride)[:, None] + channel[None, :]
        total = start + tl.load(map_ + at_first, mask=here & (spot >= 3)[:, None], other=0.0).to(tl.float32) * w0
        total += tl.load(map_ + at_earlier, mask=earlier, other=0.0).to(tl.float32) * w1
        total += tl.load(map_ + at_before, mask=before, other=0.0).to(tl.float32) * w2
        total += tl.load(map_ + at, mask=here, other=0.0).to(tl.float32) * w3
        _write_convolved(total, token, here, channel, x, keys, inner, channels, with_keys, ACTIVATED)


@_kernel
def time_steps(
    raw, stride, dt_bias, A, steps, decays, L, first_order, sequences, H, W, heads,
    Q: tl.constexpr, HEADS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Compute step dt = softplus(raw + dt_bias) and decay a of every token, [n, heads, chunks * Q]; decays are base-2 logs.

    Steps beyond the last token are zero. Program: (chunk, sequence).
    """
    chunk, n = tl.program_id(0), tl.program_id(1)
    order, sequence = first_order + n // sequences, n % sequences
    place = chunk * Q + tl.arange(0, Q)
    head = tl.arange(0, HEADS)
    row = _rows(place, L, order, sequence, sequences, H, W, TOGETHER)
    known = (head < heads)[None, :]
    here = (place < L)[:, None] & known
    value = tl.load(raw + row[:, None] * stride + head[None, :], mask=here, other=0.0).to(tl.float32)
    value += tl.load(dt_bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
    a = tl.load(A + head, mask=head < heads, other=0.0).to(tl.float32) * LOG2_E
    step = tl.where(here, _softplus(value), 0.0)
    decay = tl.cumsum(step * a[None, :], 0)
    at = (n.to(tl.int64) * heads + head[None, :]) * (tl.num_programs(0) * Q) + place[:, None]
    tl.store(steps + at, step, mask=known)
    tl.store(decays + at, decay, mask=known)


@_kernel
def scan(
    x_, keys, steps, decays, D, before, y, L, chunks_each, heads,
    P: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATED: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """Compute y [n, L, inner] of a segment of `chunks_each` chunks. Program: (head, sequence, segment).

    If not ACTIVATED, x [n, L, inner | B, C] is passed before its SiLU. CARRIED: the initial state of each segment is
    `before [n, segments, heads, S, P]`; otherwise there is one segment, and it starts at zero.
    """
    head, n, segment = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    q, s, p = tl.arange(0, Q), tl.arange(0, S), tl.arange(0, P)
    chunks = tl.cdiv(L, Q)
    state = tl.zeros([S, P], tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    if CARRIED:
        start = before + ((n * tl.num_programs(2) + segment) * heads + head) * (S * P)
        state = tl.load(start + s[:, None] * P + p[None, :])
    for chunk in range(segment * chunks_each, tl.minimum((segment + 1) * chunks_each, chunks)):
        place = chunk * Q + q
        inside = place < L
        token = n * L + place
        key = _tokens(keys, token, 2 * S, s, inside)
        query = _tokens(keys, token, 2 * S, S + s, inside)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        at = ((n * heads + head) * chunks + chunk) * Q
        x = _x(x_, token, head, heads, inside, P, S, ACTIVATED)
        step, decay, whole = tl.load(steps + at + q), tl.load(decays + at + q), tl.load(decays + at + Q - 1)
        entering = x * step[:, None]
        between = tl.where(q[:, None] >= q[None, :], tl.exp2(decay[:, None] - decay[None, :]), 0.0)
        out = tl.dot(query, state.to(DOT), input_precision=PRECISION) * tl.exp2(decay)[:, None]
        out += tl.dot((scores * between).to(DOT), entering.to(DOT), input_precision=PRECISION)
        out += skip * x
        at_y = y + token[:, None] * (heads * P) + (head * P + p)[None, :]
        tl.store(at_y, out.to(y.dtype.element_ty), mask=inside[:, None])
        fading = (entering * tl.exp2(whole - decay)[:, None]).to(DOT)
        state = state * tl.exp2(whole) + tl.dot(tl.trans(key), fading, input_precision=PRECISION)


@_kernel
def scan_states(
    x_, keys, steps, decays, states, totals, L, chunks_each, heads,
    P: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATED: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Compute only the states, from zero at the start of each segment. Program: (head, sequence, segment).

    If not ACTIVATED, x [n, L, inner | B, C] is passed before its SiLU. EVERY: store the state before each chunk, states
    [n, chunks, heads, S, P], of one segment that is the whole sequence. Otherwise store the state after each segment
    [n, segments, heads, S, P], and the decay over it, totals [n, segments, heads].
    """
    head, n, segment = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    q, s, p = tl.arange(0, Q), tl.arange(0, S), tl.arange(0, P)
    chunks = tl.cdiv(L, Q)
    tile = s[:, None] * P + p[None, :]
    state = tl.zeros([S, P], tl.float32)
    total = tl.load(decays) * 0.0
    for chunk in range(segment * chunks_each, tl.minimum((segment + 1) * chunks_each, chunks)):
        if EVERY:
            start = states + ((n * chunks + chunk) * heads + head) * (S * P)
            tl.store(start + tile, state.to(states.dtype.element_ty))
        place = chunk * Q + q
        inside = place < L
        token = n * L + place
        key = _tokens(keys, token, 2 * S, s, inside)
        at = ((n * heads + head) * chunks + chunk) * Q
        x = _x(x_, token, head, heads, inside, P, S, ACTIVATED)
        whole = tl.load(decays + at + Q - 1)
        fading = (x * (tl.load(steps + at + q) * tl.exp2(whole - tl.load(decays + at + q)))[:, None]).to(DOT)
        state = state * tl.exp2(whole) + tl.dot(tl.trans(key), fading, input_precision=PRECISION)
        total += whole
    if not EVERY:
        start = (n * tl.num_programs(2) + segment) * heads + head
        tl.store(states + start * (S * P) + tile, state)
        tl.store(totals + start, total)


@_kernel
def carry_states(states, totals, segments, heads, SIZE: tl.constexpr):
    """Turn states after each segment alone, [n, segments, heads, SIZE], into those before each segment of the whole, in place.

    Program: (head, sequence).
    """
    head, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, SIZE)
    state = tl.zeros([SIZE], tl.float32)
    for segment in range(segments):
        start = (n * segments + segment) * heads + head
        added = tl.load(states + start * SIZE + i)
        tl.store(states + start * SIZE + i, state)
        state = state * tl.exp2(tl.load(totals + start)) + added


@_kernel
def gated_norm(
    y, z, stride, weight, out, L, first_order, sequences, H, W, inner, ADD: tl.constexpr, ORDERS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Sum RMSNorm(y * silu(z)) * weight over directions, back at the pixels: y [n, L, inner] -> out [frames * H * W, inner].

    ADD: add to the previous content of `out`. Program: (block of pixels of a frame, frame).
    """
    frame = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    row = frame.to(tl.int64) * (H * W) + pixel
    here = (pixel < H * W)[:, None] & (channel < inner)[None, :]
    gate = tl.load(z + row[:, None] * stride + channel[None, :], mask=here, other=0.0).to(tl.float32)
    gate *= sigmoid(gate)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for order in tl.static_range(ORDERS):
        sequence, place = _places(frame, pixel, L, first_order + order, sequences, H, W, TOGETHER)
        token = (order * sequences + sequence).to(tl.int64) * L + place
        u = tl.load(y + token[:, None] * inner + channel[None, :], mask=here, other=0.0).to(tl.float32) * gate
        total += u * tl.rsqrt(tl.sum(u * u, 1) / inner + EPSILON)[:, None]
    total *= tl.load(weight + channel, mask=channel < inner, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * inner + channel[None, :]
    if ADD:
        total += tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=here)
