"""Inference with a trained model: loading, conversion of arrays, tiling, and in-between frames of any size."""
