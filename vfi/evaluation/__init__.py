"""Benchmarks of models: protocols, data sets, scores, latency, and their result files."""
