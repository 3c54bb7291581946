"""quantization techniques."""
