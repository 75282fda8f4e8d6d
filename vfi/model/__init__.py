"""The network: architecture only, no files, ranks, losses or accelerate."""
