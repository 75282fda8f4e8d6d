"""From shards to batches of frames on the device, in the planned order."""
