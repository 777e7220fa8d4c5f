"""Device code of basinescape: the Triton kernel of each operation, its eager PyTorch version, and the choice between them.

The package imports only torch and triton, so it can be copied and used alone: under another name than `kernels`, and in a
process without basinescape, since both register the same operators. Without triton the eager versions run.
"""

# In the repository's root, transformers imports this folder as the package `kernels`; it then gets an empty module.
if __name__ != "kernels":
    from .dispatch import backend
    from .guide import guide, guide_eager, noise_gap, noise_gap_eager
    from .step import guide_step, step

    __all__ = ["backend", "guide", "guide_eager", "guide_step", "noise_gap", "noise_gap_eager", "step"]
