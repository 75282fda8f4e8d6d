"""Backward warping: the reference and its Triton kernels."""
