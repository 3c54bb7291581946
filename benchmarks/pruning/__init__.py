"""Measured comparisons of the pruning family."""
