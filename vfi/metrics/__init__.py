"""Image and motion metrics."""
