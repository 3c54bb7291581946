"""Weights that share a value, and neurons that merge into one."""
