"""State-space operators: scan directions, recurrences, the short convolution and the fused SS2D."""
