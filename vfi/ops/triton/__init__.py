"""What all Triton kernels share: availability, launch configurations, compilation and mathematics."""
