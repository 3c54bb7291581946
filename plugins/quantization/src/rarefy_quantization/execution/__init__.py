"""Files that run on integer kernels."""
