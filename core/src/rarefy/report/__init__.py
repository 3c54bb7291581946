"""The report of a run: a page, a table for the terminal, findings in words, and several runs side by side."""

from rarefy.report.comparison import compare_html, compare_rows
from rarefy.report.page import render
from rarefy.report.sentences import verdict, words
from rarefy.report.terminal import console

__all__ = ["compare_html", "compare_rows", "console", "render", "verdict", "words"]
