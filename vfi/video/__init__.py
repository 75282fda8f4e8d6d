"""Videos and folders of frames, converted to more frames."""
