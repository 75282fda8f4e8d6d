"""Conversion of videos and folders of frames to more frames or slow motion."""
