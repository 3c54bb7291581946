"""Weights of one or two bits, trained through the quantizer."""
