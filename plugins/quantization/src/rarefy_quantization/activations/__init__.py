"""Inputs of layers with one or two bits, beside binary weights."""
