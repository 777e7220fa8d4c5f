"""The prompt's padding masked out of attention: CLIP's padding embeddings carry what is memorized (arXiv 2605.02908)."""

from __future__ import annotations

import torch
from basinescape import Guidance, Sampler
from basinescape.models import PromptedUNet
from torch import Tensor

from .method import Batch, Method


def words_mask(batch: Batch) -> Tensor:
    """(B, T) bool: the tokens of each prompt up to its end, without the padding after it."""
    tokenizer = batch.sampler.pipe.tokenizer
    lengths = tokenizer(list(batch.prompts), truncation=True, max_length=tokenizer.model_max_length).input_ids
    return torch.arange(tokenizer.model_max_length) < torch.tensor([[len(tokens)] for tokens in lengths])


def needs_unet(sampler: Sampler, steps: int) -> None:
    """Raises ValueError for a model without a UNet, whose cross-attention alone can be told which tokens to look at."""
    if not hasattr(sampler.pipe, "unet"):
        raise ValueError(f"it masks the cross-attention of a UNet, and a {type(sampler.pipe).__name__} has none")


def masked(network: PromptedUNet, batch: Batch) -> PromptedUNet:
    """`network`, whose conditional half sees the words alone."""
    cond = words_mask(batch).to(network.inputs["both"]["encoder_hidden_states"].device)
    masks = {"uncond": torch.ones_like(cond), "cond": cond, "both": torch.cat([torch.ones_like(cond), cond])}
    for branch, inputs in network.inputs.items():
        inputs["encoder_attention_mask"] = masks[branch]
    return network


def method(guidance: Guidance) -> Method:
    return Method(guidance, wrap=masked, suits=needs_unet)
