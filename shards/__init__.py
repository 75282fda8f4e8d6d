"""How does a data set become tar shards? CPU only, no torch. Jobs: python -m shards.video | vimeo90k | synthetic | verify."""
