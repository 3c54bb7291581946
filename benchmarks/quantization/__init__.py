"""Measured claims about quantization."""
