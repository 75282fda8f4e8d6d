"""State-space operators: scan orders, recurrences, the short convolution and the fused SS2D."""
