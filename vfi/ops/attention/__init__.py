"""Gated window attention: the reference and its fused Triton kernels."""
