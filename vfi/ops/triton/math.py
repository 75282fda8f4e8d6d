"""What do kernels compute that Triton has only in a slower form?"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # a power of 2 is one instruction, a power of e several


@triton.jit
def _reciprocal(x):
    """1 / x to 1 ulp, and 0 below 2^-126: PTX ISA, rcp.approx.ftz.f32."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


_COMPILED = tl.constexpr(isinstance(_reciprocal, triton.JITFunction))  # and not interpreted, for there is no PTX then


@triton.jit
def sigmoid(x):
    """Of fp32, in 5 instructions in place of the 13 of `tl.sigmoid`."""
    one_more = 1.0 + tl.exp2(-x * LOG2_E)
    if _COMPILED:
        y = _reciprocal(one_more)
    else:
        y = 1.0 / one_more
    return y
