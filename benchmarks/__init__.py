"""Measured comparisons: each module is one command, its results are JSON, its page is generated from them."""
