"""Removing single weights: a criterion scores each, the lowest become zeros."""
