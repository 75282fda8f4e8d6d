"""Laplacian pyramid loss: the reference and its fused Triton kernels."""
