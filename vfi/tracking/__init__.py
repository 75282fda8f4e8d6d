"""Records of a run: metrics, TensorBoard, environment and status."""
