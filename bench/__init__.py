"""Benchmarks, the memorization evaluation, and the small pipeline that ships with the project."""
