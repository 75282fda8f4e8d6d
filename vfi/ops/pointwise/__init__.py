"""Operators between the convolutions: their dispatch and fused Triton kernels."""
