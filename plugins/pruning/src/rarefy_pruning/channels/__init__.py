"""Removing whole channels, heads and neurons: a criterion scores the units of each dependency group."""
