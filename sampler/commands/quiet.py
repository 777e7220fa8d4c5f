"""Silences the notices of other libraries, but not their errors."""

from __future__ import annotations

import os
import warnings

LIBRARIES = ("diffusers", "transformers")
NOISY = (*LIBRARIES, "torchsde", "torch", "huggingface_hub", "timm")


def quieten() -> None:
    """Silence other libraries. Call this before they are imported: some notices come on import, some in every step."""
    for library in LIBRARIES:
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
    for library in NOISY:
        warnings.filterwarnings("ignore", module=rf"{library}\b")
    import diffusers
    import transformers

    for module in (diffusers, transformers):
        module.utils.logging.set_verbosity_error()
        module.utils.logging.disable_progress_bar()
