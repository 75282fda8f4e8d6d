"""What do kernels compute that Triton has only in a slower form?"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # a power of 2 is one instruction, a power of e several
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """Of fp32, in 5 instructions in place of the 13 of `tl.sigmoid`.

    Compiled, its division is the GPU's reciprocal, 1 ulp: PTX ISA, rcp.approx.ftz.f32.
    """
    one_more = 1.0 + tl.exp2(-x * LOG2_E)
    if _COMPILED:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [one_more], tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / one_more
    return y
