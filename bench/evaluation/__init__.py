"""Measurements of memorization: the images of every method, their quality, basins, and pages about the results."""
