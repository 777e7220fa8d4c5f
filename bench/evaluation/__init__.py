"""Memorization measured: images made by every method, what they are worth, basins, and pages about it."""
