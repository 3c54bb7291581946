"""Trellis-coded (dependent) quantization: which values a weight may take depends on the codes before it."""
