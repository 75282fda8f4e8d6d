"""Release of a model: its card, and its graph in other formats."""
