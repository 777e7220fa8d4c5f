"""The evaluation of memorization, benchmarks, and the small pipeline that ships with the project."""
