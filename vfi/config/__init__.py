"""Settings of a run: their types, presets, validation and command line."""
