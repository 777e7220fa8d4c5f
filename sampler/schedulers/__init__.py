"""Diffusers' schedulers for the sampling loop: noise levels, and linear solvers with their coefficients."""
