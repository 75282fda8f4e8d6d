"""Handing a model to others: its card and its graphs in other formats."""
