"""Fused Triton kernels of the backward pass of the SS2D (for the mathematics, see vfi/ops/ssm/ss2d_common.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from vfi.ops.ssm.ss2d_common import EPSILON, TAPS, _kernel, _places, _tokens, _x
from vfi.ops.triton.math import sigmoid


@_kernel
def scan_state_gradients(
    keys, decays, dy, state_gradients, L, heads,
    P: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the state after each chunk, [n, chunks, heads, S, P], from the last to the first.

    Program: (head, n).
    """
    head, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q, s, p = tl.arange(0, Q), tl.arange(0, S), tl.arange(0, P)
    chunks = tl.cdiv(L, Q)
    gradient = tl.zeros([S, P], tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = state_gradients + ((n * chunks + chunk) * heads + head) * (S * P)
        tl.store(start + s[:, None] * P + p[None, :], gradient.to(state_gradients.dtype.element_ty))
        place = chunk * Q + q
        inside = place < L
        token = n * L + place
        query = _tokens(keys, token, 2 * S, S + s, inside)
        at = ((n * heads + head) * chunks + chunk) * Q
        g = _tokens(dy, token, heads * P, head * P + p, inside).to(tl.float32)
        fading = (g * tl.exp2(tl.load(decays + at + q))[:, None]).to(DOT)
        whole = tl.load(decays + at + Q - 1)
        gradient = gradient * tl.exp2(whole) + tl.dot(tl.trans(query), fading, input_precision=PRECISION)


@_kernel
def scan_key_gradients(
    x_, keys, steps, decays, states, state_gradients, dy, d_keys, d_heads, L, heads,
    P: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of B and C through the states before and after a chunk, summed over heads: d_keys [n, L, B | C].

    x [n, L, inner | B, C] is passed before its SiLU. For each chunk and head, also store sum(h * dh'), the gradient of the
    chunk's
    whole decay through the state, and sum(x * dy), that of D: d_heads [n, chunks, heads, 2]. Program: (chunk, sequence).
    """
    chunk, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inner = heads * P
    q, s, p = tl.arange(0, Q), tl.arange(0, S), tl.arange(0, P)
    place = chunk * Q + q
    inside = place < L
    token = n * L + place
    here = n * tl.num_programs(0) + chunk
    steps += n * heads * tl.num_programs(0) * Q + chunk * Q
    decays += n * heads * tl.num_programs(0) * Q + chunk * Q
    d_key = tl.zeros([Q, S], tl.float32)
    d_query = tl.zeros([Q, S], tl.float32)
    for head in range(heads):
        x = _x(x_, token, head, heads, inside, P, S, ACTIVATED=False)
        g = _tokens(dy, token, inner, head * P + p, inside).to(tl.float32)
        tile = (here * heads + head) * (S * P) + s[:, None] * P + p[None, :]
        state, d_state = tl.load(states + tile), tl.load(state_gradients + tile)
        at = head * tl.num_programs(0) * Q
        step, decay, whole = tl.load(steps + at + q), tl.load(decays + at + q), tl.load(decays + at + Q - 1)
        from_state = (g * tl.exp2(decay)[:, None]).to(DOT)
        d_query = tl.dot(from_state, tl.trans(state), acc=d_query, input_precision=PRECISION)
        to_state = (x * (step * tl.exp2(whole - decay))[:, None]).to(DOT)
        d_key = tl.dot(to_state, tl.trans(d_state), acc=d_key, input_precision=PRECISION)
        tl.store(d_heads + (here * heads + head) * 2, tl.sum(state.to(tl.float32) * d_state.to(tl.float32)))
        tl.store(d_heads + (here * heads + head) * 2 + 1, tl.sum(x * g))
    at = d_keys + token[:, None] * (2 * S) + s[None, :]
    tl.store(at, d_key.to(d_keys.dtype.element_ty), mask=inside[:, None])
    tl.store(at + S, d_query.to(d_keys.dtype.element_ty), mask=inside[:, None])


@_kernel
def scan_gradients(
    convolved, keys, steps, decays, D, states, state_gradients, dy, d_keys, sums, L, heads,
    P: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of x, B and C before their SiLU, which overwrite `convolved`, head by head.

    Those of the products C B^T, which all heads share, are summed; together with d_keys [n, L, B | C] they give the gradients
    of
    B and C. For the gradients of the decays, `step_gradients` completes sums [5, n, heads, chunks * Q]: over the rows and over
    the columns of a chunk, from the state before, to the state after, and through dt x. Program: (chunk, n).
    """
    chunk, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inner = heads * P
    q, s, p = tl.arange(0, Q), tl.arange(0, S), tl.arange(0, P)
    place = chunk * Q + q
    inside = place < L
    token = n * L + place
    here = n * tl.num_programs(0) + chunk
    size = tl.num_programs(0) * Q
    steps += n * heads * size + chunk * Q
    decays += n * heads * size + chunk * Q
    sums += n * heads * size + chunk * Q
    kind = tl.num_programs(1).to(tl.int64) * heads * size

    key = _tokens(keys, token, 2 * S, s, inside)
    query = _tokens(keys, token, 2 * S, S + s, inside)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    d_scores = tl.zeros([Q, Q], tl.float32)
    for head in range(heads):
        before_silu = _tokens(convolved, token, inner + 2 * S, head * P + p, inside).to(tl.float32)
        gate = sigmoid(before_silu)
        x = before_silu * gate
        g = _tokens(dy, token, inner, head * P + p, inside)
        tile = (here * heads + head) * (S * P) + s[:, None] * P + p[None, :]
        state, d_state = tl.load(states + tile), tl.load(state_gradients + tile)
        step, decay = tl.load(steps + head * size + q), tl.load(decays + head * size + q)
        whole = tl.load(decays + head * size + Q - 1)
        out = sums + head * size + q

        entering = x * step[:, None]
        between = tl.where(q[:, None] >= q[None, :], tl.exp2(decay[:, None] - decay[None, :]), 0.0)
        d_one = tl.dot(g.to(DOT), tl.trans(entering.to(DOT)), input_precision=PRECISION) * between
        d_scores += d_one
        d_one *= scores
        tl.store(out, tl.sum(d_one, 1))
        tl.store(out + kind, tl.sum(d_one, 0))
        from_state = tl.dot(query, state, input_precision=PRECISION) * g.to(tl.float32)
        tl.store(out + 2 * kind, tl.sum(from_state, 1))
        to_state = tl.dot(key, d_state, input_precision=PRECISION) * tl.exp2(whole - decay)[:, None]
        tl.store(out + 3 * kind, tl.sum(to_state * entering, 1))
        d_entering = to_state + tl.dot(tl.trans((scores * between).to(DOT)), g.to(DOT), input_precision=PRECISION)
        tl.store(out + 4 * kind, tl.sum(d_entering * x, 1))
        d_x = d_entering * step[:, None] + tl.load(D + head).to(tl.float32) * g.to(tl.float32)
        d_x *= gate * (1 + before_silu * (1 - gate))
        at = convolved + token[:, None] * (inner + 2 * S) + (head * P + p)[None, :]
        tl.store(at, d_x.to(convolved.dtype.element_ty), mask=inside[:, None])

    for part in tl.static_range(2):
        if part == 0:
            gradient = tl.dot(tl.trans(d_scores.to(DOT)), query, input_precision=PRECISION)
        else:
            gradient = tl.dot(d_scores.to(DOT), key, input_precision=PRECISION)
        gradient += _tokens(d_keys, token, 2 * S, part * S + s, inside).to(tl.float32)
        before_silu = _tokens(convolved, token, inner + 2 * S, inner + part * S + s, inside).to(tl.float32)
        gate = sigmoid(before_silu)
        gradient *= gate * (1 + before_silu * (1 - gate))
        at = convolved + token[:, None] * (inner + 2 * S) + (inner + part * S + s)[None, :]
        tl.store(at, gradient.to(convolved.dtype.element_ty), mask=inside[:, None])


@_kernel
def step_gradients(steps, decays, A, sums, d_heads, d_steps, heads, Q: tl.constexpr, HEADS: tl.constexpr):
    """Compute the gradients of the steps, d_steps [n, heads, chunks * Q], and of A, from the sums of `scan_gradients`.

    The gradient of A overwrites the first component of d_heads [n, chunks, heads, 2]. Program: (chunk, sequence).
    """
    chunk, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    size = tl.num_programs(0) * Q
    at = (n * heads + head) * size + chunk * Q + tl.arange(0, Q)[None, :]
    kind = tl.num_programs(1).to(tl.int64) * heads * size
    known = (head < heads) & (at >= 0)
    step, decay = tl.load(steps + at, mask=known, other=0.0), tl.load(decays + at, mask=known, other=0.0)
    whole = tl.load(decays + (n * heads + head) * size + chunk * Q + Q - 1, mask=head < heads, other=0.0)
    rows, columns = tl.load(sums + at, mask=known, other=0.0), tl.load(sums + kind + at, mask=known, other=0.0)
    from_state = tl.load(sums + 2 * kind + at, mask=known, other=0.0) * tl.exp2(decay)
    to_state = tl.load(sums + 3 * kind + at, mask=known, other=0.0)
    of_entering = tl.load(sums + 4 * kind + at, mask=known, other=0.0)
    one = d_heads + ((n * tl.num_programs(0) + chunk) * heads + head) * 2
    d_whole = tl.sum(to_state, 1)[:, None] + tl.exp2(whole) * tl.load(one, mask=head < heads, other=0.0)
    d_log = tl.cumsum(rows - columns + from_state - to_state, 1, reverse=True) + d_whole  # of step * A
    a = tl.load(A + head, mask=head < heads, other=0.0).to(tl.float32)
    tl.store(d_steps + at, d_log * a + of_entering, mask=known)
    tl.store(one, tl.sum(d_log * step, 1)[:, None], mask=head < heads)


@_kernel
def time_step_gradients(
    raw, stride, dt_bias, d_steps, d_raw, d_stride, d_bias, L, size, sequences, H, W, heads,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Backpropagate through softplus and the four directions: d_steps [n, heads, size] -> d_raw of the pixels.

    Also store the gradient of the bias, d_bias [programs, heads]. Program: (block of pixels of a frame, frame).
    """
    block, frame = tl.program_id(0), tl.program_id(1)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    here = (pixel < H * W)[:, None] & (head < heads)[None, :]
    row = frame.to(tl.int64) * (H * W) + pixel
    value = tl.load(raw + row[:, None] * stride + head[None, :], mask=here, other=0.0).to(tl.float32)
    value += tl.load(dt_bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK, HEADS], tl.float32)
    for order in tl.static_range(4):
        sequence, place = _places(frame, pixel, L, order, sequences, H, W, TOGETHER)
        n = (order * sequences + sequence).to(tl.int64)
        total += tl.load(d_steps + (n * heads + head[None, :]) * size + place[:, None], mask=here, other=0.0)
    total *= sigmoid(value)
    tl.store(d_raw + row[:, None] * d_stride + head[None, :], total.to(d_raw.dtype.element_ty), mask=here)
    out = d_bias + (frame * tl.num_programs(0) + block) * heads + head
    tl.store(out, tl.sum(total, 0), mask=head < heads)


@triton.jit
def _where_read(d_convolved, frame, pixel, L, order, sequences, H, W, channel, channels, TOGETHER: tl.constexpr):
    """Return the addresses of the gradients of the tokens that a direction reads from the pixels, and their positions."""
    sequence, place = _places(frame, pixel, L, order, sequences, H, W, TOGETHER)
    d_convolved += (order * sequences + sequence).to(tl.int64) * L * channels
    return d_convolved + (place.to(tl.int64) * channels)[:, None] + channel[None, :], place


@triton.jit
def _read_later(at, place, later, L, channels, here):
    """Load the gradients of tokens `later` positions after `at`; zero beyond the last one."""
    return tl.load(at + later * channels, mask=here & (place + later < L)[:, None], other=0.0).to(tl.float32)


@_kernel
def convolution_gradients(
    map_, stride, weight, d_convolved, d_map, d_stride, d_weights, L, sequences, H, W, channels,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Backpropagate through the convolution and the four directions: d_map of the pixels.

    Also store the gradients of weights and bias by block, d_weights [blocks, TAPS + 1, channels]. Program: (block of pixels of
    a
    frame, frame, block of channels).
    """
    block, frame = tl.program_id(0), tl.program_id(1)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    known = channel < channels
    here = (pixel < H * W)[:, None] & known[None, :]
    row = frame.to(tl.int64) * (H * W) + pixel
    value = tl.load(map_ + row[:, None] * stride + channel[None, :], mask=here, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    out = d_weights + (frame * tl.num_programs(0) + block).to(tl.int64) * (TAPS + 1) * channels + channel
    at0, place0 = _where_read(d_convolved, frame, pixel, L, 0, sequences, H, W, channel, channels, TOGETHER)
    at1, place1 = _where_read(d_convolved, frame, pixel, L, 1, sequences, H, W, channel, channels, TOGETHER)
    at2, place2 = _where_read(d_convolved, frame, pixel, L, 2, sequences, H, W, channel, channels, TOGETHER)
    at3, place3 = _where_read(d_convolved, frame, pixel, L, 3, sequences, H, W, channel, channels, TOGETHER)
    for tap in tl.static_range(TAPS):
        later = TAPS - 1 - tap
        read = _read_later(at0, place0, later, L, channels, here)  # of the tokens that read these pixels with this tap
        read += _read_later(at1, place1, later, L, channels, here)
        read += _read_later(at2, place2, later, L, channels, here)
        read += _read_later(at3, place3, later, L, channels, here)
        total += read * tl.load(weight + channel * TAPS + tap, mask=known, other=0.0).to(tl.float32)[None, :]
        tl.store(out + tap * channels, tl.sum(read * value, 0), mask=known)
        if tap == TAPS - 1:
            tl.store(out + TAPS * channels, tl.sum(read, 0), mask=known)
    tl.store(d_map + row[:, None] * d_stride + channel[None, :], total.to(d_map.dtype.element_ty), mask=here)


@_kernel
def gated_norm_gradients(
    y, z, stride, weight, d_out, dz, d_stride, d_weights, L, sequences, H, W, inner,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of `gated_norm` for all four directions: dz, and that of y [n, L, inner] in its place.

    Also store the gradient of the weight by program, d_weights [programs, inner]. Program: (BLOCKS consecutive pixels of a
    frame,
    frame).
    """
    block, frame = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    known = channel < inner
    w = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    d_weight = tl.zeros([WIDTH], tl.float32)
    for i in range(BLOCKS):
        pixel = block * BLOCKS + i
        row = frame.to(tl.int64) * (H * W) + pixel
        here = known & (pixel < H * W)
        value = tl.load(z + row * stride + channel, mask=here, other=0.0).to(tl.float32)
        gate = sigmoid(value)
        d = tl.load(d_out + row * inner + channel, mask=here, other=0.0).to(tl.float32)
        d_gate = tl.zeros([WIDTH], tl.float32)
        for order in tl.static_range(4):
            sequence, place = _places(frame, pixel, L, order, sequences, H, W, TOGETHER)
            at = ((order * sequences + sequence).to(tl.int64) * L + place) * inner + channel
            one = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
            u = one * value * gate
            scale = tl.rsqrt(tl.sum(u * u, 0) / inner + EPSILON)
            d_u = scale * (d * w - u * (scale * scale * tl.sum(d * w * u, 0) / inner))
            d_weight += d * u * scale
            d_gate += d_u * one
            tl.store(y + at, (d_u * value * gate).to(y.dtype.element_ty), mask=here)
        d_value = d_gate * gate * (1 + value * (1 - gate))
        tl.store(dz + row * d_stride + channel, d_value.to(dz.dtype.element_ty), mask=here)
    out = d_weights + (frame * tl.num_programs(0) + block).to(tl.int64) * inner + channel
    tl.store(out, d_weight, mask=known)
