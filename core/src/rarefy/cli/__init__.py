"""The command line: thin commands over library calls. Importing it loads click and nothing heavier."""

from rarefy.cli.app import main

__all__ = ["main"]
