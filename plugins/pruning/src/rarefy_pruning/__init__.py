"""pruning techniques."""
