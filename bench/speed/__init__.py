"""Benchmarks of speed: `kernel`, `step` and `images`. All peers run in one process, interleaved, and must agree first."""
