"""rarefy: compress trained PyTorch models with one recipe, one report and one file."""

__version__ = "0.1.0"
