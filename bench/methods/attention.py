"""Re-weight cross-attention: the prompt's first token gets more attention, the tokens after its last word get none.

Ren et al., "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention", ECCV 2024,
https://arxiv.org/abs/2403.11052, section 5: at inference the logits of the beginning token are multiplied by BEGINNING and
those of the summary tokens (the end of the text and the padding) are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from basinescape import Guidance
from basinescape.models import PromptedUNet
from basinescape.types import Branch, Network
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .method import Batch, Method
from .padding import needs_unet, words_mask

BEGINNING = 1.25


class Reweighted:
    """Attention processor. words: (N, T) bool, the tokens of each row that may be attended to."""

    def __init__(self, words: Tensor):
        self.words = words

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        logits = query @ key.transpose(-1, -2) * attn.scale
        cond = self.words.any(dim=1) & ~self.words.all(dim=1)
        factor = torch.ones_like(self.words, dtype=logits.dtype)
        factor[cond, 0] = BEGINNING
        logits = (logits * factor[:, None, None]).masked_fill(~self.words[:, None, None], -torch.inf)
        out = (F.softmax(logits, dim=-1) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def attending(unet: Any, words: Tensor) -> Iterator[None]:
    """In this context, `Reweighted` processes the cross-attention of `unet`."""
    own = dict(unet.attn_processors)
    unet.set_attn_processor({name: Reweighted(words) if "attn2" in name else old for name, old in own.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(own)


def reweighted(network: PromptedUNet, batch: Batch) -> Network:
    """Wrap `network`: its conditional half attends to the first token and the words only."""
    words = words_mask(batch)
    words = words & words.roll(-1, dims=1)  # without the end of the text
    words[:, -1] = False
    words = words.to(network.inputs["both"]["encoder_hidden_states"].device)
    rows = {"cond": words, "both": torch.cat([torch.ones_like(words), words])}

    def predict(latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        if branch == "uncond":
            return network(latents, timesteps, branch)
        with attending(batch.sampler.pipe.unet, rows[branch]):
            return network(latents, timesteps, branch)

    return predict


def method(guidance: Guidance) -> Method:
    return Method(guidance, wrap=reweighted, suits=needs_unet)
