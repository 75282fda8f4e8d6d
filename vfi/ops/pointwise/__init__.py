"""Operators between the convolutions: their dispatch and Triton kernels."""
