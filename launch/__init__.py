"""Submission of runs to a cluster. The package starts processes and does not need torch."""
