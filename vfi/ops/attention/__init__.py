"""Gated window attention: the reference and its Triton kernels."""
