"""The network: architecture only, without file access, ranks, losses or accelerate."""
