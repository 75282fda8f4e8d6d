"""A trained model outside of training: loading, arrays, tiling and in-between frames of any size."""
