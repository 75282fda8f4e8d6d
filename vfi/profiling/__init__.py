"""Costs of a network: parameters, MACs, memory and time, for each part."""
