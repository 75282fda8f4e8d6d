"""Operators: for each, a reference in plain PyTorch and a fast path with the same signature."""
