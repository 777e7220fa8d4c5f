"""Silence for what other libraries say of themselves; their errors stay."""

from __future__ import annotations

import os
import warnings

LIBRARIES = ("diffusers", "transformers")
NOISY = (*LIBRARIES, "torchsde", "torch", "huggingface_hub", "timm")


def quieten() -> None:
    """To be called before they are imported: some of it comes on import, some in every step of a run."""
    for library in LIBRARIES:
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
    for library in NOISY:
        warnings.filterwarnings("ignore", module=rf"{library}\b")
    import diffusers
    import transformers

    for loaded in (diffusers, transformers):
        loaded.utils.logging.set_verbosity_error()
        loaded.utils.logging.disable_progress_bar()
