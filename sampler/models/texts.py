"""Both halves of a batch of texts, as the families' networks take them."""

from __future__ import annotations

import torch
from torch import Tensor


def negative_texts(negative: list[str | None]) -> list[str] | None:
    """As a pipeline's `encode_prompt` takes them; None where there are none, which some tell from empty ones."""
    return None if all(text is None for text in negative) else [text or "" for text in negative]


def halves(uncond: Tensor, cond: Tensor, prompts: int, count: int, name: str = "prompt_embeds") -> Tensor:
    """Both halves of a batch, (2 * prompts * count, ...), each given as a row a prompt or already a row a sample.

    Raises ValueError if they are not alike.
    """
    if uncond.shape[1:] != cond.shape[1:] or not {len(uncond), len(cond)} <= {prompts, prompts * count}:
        raise ValueError(
            f"{name} are {tuple(cond.shape)} and negative_{name} {tuple(uncond.shape)}: they must be alike, a row a prompt"
        )
    return torch.cat([half.repeat_interleave(prompts * count // len(half), dim=0) for half in (uncond, cond)])
