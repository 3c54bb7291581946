"""Where weights and activations are rounded to: learned, balanced, drawn, and with how many bits."""
