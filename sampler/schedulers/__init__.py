"""Diffusers' schedulers as the loop sees them: noise levels, and linear solvers with their coefficients."""
