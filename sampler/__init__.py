"""basinescape: a sampler for guided diffusion models that keeps samples from reproducing training images."""

from .guidance import At, FirstMinimum, Guidance
from .sampler import Output, Sampler

__version__ = "0.1.0"
__all__ = ["At", "FirstMinimum", "Guidance", "Output", "Sampler"]
