"""Regularised training that makes whole structures die, and their removal."""
