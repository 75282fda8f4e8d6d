"""Checkpoints of a run, weights read out of them, and folders of pretrained models."""
