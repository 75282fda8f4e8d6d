"""Metrics of images and motion."""
