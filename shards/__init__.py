"""Conversion of data sets to tar shards, on the CPU and without torch. Commands: python -m shards.<set> and shards.verify."""
