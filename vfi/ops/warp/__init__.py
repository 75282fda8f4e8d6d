"""Backward warping: the reference and its fused Triton kernels."""
