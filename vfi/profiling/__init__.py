"""Costs of a network: parameters, MACs, memory and time, by part."""
