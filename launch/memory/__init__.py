"""Memory that training takes, by measured profiles, and the batch size that fits."""
