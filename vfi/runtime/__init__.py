"""The process and its devices: numerics, memory, CUDA graphs, stop signals and messages."""
