"""Training stack for video frame interpolation: the model, its training, benchmarks and use."""
