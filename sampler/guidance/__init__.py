"""Guidance as data: weights, transitions, the attempts of a guard."""
