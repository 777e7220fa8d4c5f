"""The prompt's padding masked out of attention: CLIP's padding embeddings carry what is memorized (arXiv 2605.02908)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basinescape import Guidance, Output, Sampler
from basinescape.models import GuidedUNet


def words_mask(sampler: Sampler, prompts: Sequence[str]) -> torch.Tensor:
    """(B, T) bool: the tokens of each prompt up to its end, without the padding after it."""
    tokenizer = sampler.pipe.tokenizer
    lengths = tokenizer(list(prompts), truncation=True, max_length=tokenizer.model_max_length).input_ids
    return torch.arange(tokenizer.model_max_length) < torch.tensor([[len(tokens)] for tokens in lengths])


def method(guidance: Guidance):
    def sample(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Output:
        def wrap(network: GuidedUNet) -> GuidedUNet:
            cond = words_mask(sampler, prompts).to(network.inputs["both"]["encoder_hidden_states"].device)
            masks = {"uncond": torch.ones_like(cond), "cond": cond, "both": torch.cat([torch.ones_like(cond), cond])}
            for branch, inputs in network.inputs.items():
                inputs["encoder_attention_mask"] = masks[branch]
            return network

        return sampler(prompts, seeds, steps, guidance, progress=False, wrap=wrap)

    return sample
