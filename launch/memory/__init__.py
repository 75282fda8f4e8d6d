"""Prediction of training memory from measured profiles, and of the batch size that fits."""
