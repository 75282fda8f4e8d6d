"""Shared parts of all Triton kernels: availability, launch configurations, compilation and mathematics."""
