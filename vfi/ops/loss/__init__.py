"""The Laplacian pyramid loss: the reference and its Triton kernels."""
