"""Device code of basinescape: each operation's Triton kernel, its eager PyTorch twin, and the choice between them.

Imports torch and triton only, so the package can be lifted out and used alone; without triton the eager twins run.
"""

# In the repository's root, transformers finds this folder when it looks for the package `kernels`: it gets an empty one.
if __name__ != "kernels":
    from .dispatch import backend
    from .guide import guide, guide_eager, noise_gap, noise_gap_eager
    from .step import guide_step, step

    __all__ = ["backend", "guide", "guide_eager", "guide_step", "noise_gap", "noise_gap_eager", "step"]
