"""Mask the prompt's padding in attention, because CLIP's padding embeddings carry what is memorized (arXiv 2605.02908)."""

from __future__ import annotations

import torch
from basinescape import Guidance, Sampler
from basinescape.models import PromptedUNet
from torch import Tensor

from .method import Batch, Method


def words_mask(batch: Batch) -> Tensor:
    """(B, T) bool: True for each prompt's tokens up to the end token, False for the padding after it."""
    tokenizer = batch.sampler.pipe.tokenizer
    lengths = tokenizer(list(batch.prompts), truncation=True, max_length=tokenizer.model_max_length).input_ids
    return torch.arange(tokenizer.model_max_length) < torch.tensor([[len(tokens)] for tokens in lengths])


def needs_unet(sampler: Sampler, steps: int) -> None:
    """Raise ValueError for a model without a UNet, because the method masks the cross-attention of a UNet."""
    if not hasattr(sampler.pipe, "unet"):
        raise ValueError(f"it masks the cross-attention of a UNet, and a {type(sampler.pipe).__name__} has none")


def masked(network: PromptedUNet, batch: Batch) -> PromptedUNet:
    """Mask the padding in the conditional half of `network`, and return it."""
    cond = words_mask(batch).to(network.inputs["both"]["encoder_hidden_states"].device)
    masks = {"uncond": torch.ones_like(cond), "cond": cond, "both": torch.cat([torch.ones_like(cond), cond])}
    for branch, inputs in network.inputs.items():
        inputs["encoder_attention_mask"] = masks[branch]
    return network


def method(guidance: Guidance) -> Method:
    return Method(guidance, wrap=masked, suits=needs_unet)
