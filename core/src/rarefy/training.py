"""Placeholder for types; replaced by the loop."""
