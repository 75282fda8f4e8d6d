"""How does a run reach a cluster? It starts processes and needs no torch."""
