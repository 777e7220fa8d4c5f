"""Copies of training images: measures of likeness with their thresholds, and the one index of training images."""
