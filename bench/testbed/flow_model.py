"""The networks of the second test bed, in the shape of Stable Diffusion 3 (Esser et al., https://arxiv.org/abs/2403.03206)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from basinescape import Sampler
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from ..evaluation.scenes import FLOW_CONCEPTS, FORMS, SIZE, draw_facts
from .training import text_config

TOKENS = 16
WIDTH, LAYERS, HEAD, PATCH = 160, 5, 32, 4  # of the transformer; it costs a third of what patches of 2 x 2 latents would
SHIFT = 2.0  # of the noise levels, in training as in sampling


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level scheme with a vocabulary grown from the captions; any other text falls back to bytes."""
    rng = np.random.default_rng(0)
    captions = [draw_facts(rng, name).caption(form) for _ in range(20) for name in FLOW_CONCEPTS for form in range(len(FORMS))]
    every_last_byte = [chr(i) for i in (*range(0x21, 0x7F), *range(0x7C0, 0x800))]
    tiny = CLIPTokenizer.from_pretrained(Sampler.model_path("tiny") / "tokenizer")
    words = tiny.train_new_from_iterator(captions + every_last_byte, vocab_size=1000, min_frequency=2)
    words.model_max_length = TOKENS
    return words


def networks(words: CLIPTokenizer) -> nn.ModuleDict:
    """Both text encoders and the transformer, under the pipeline's names; initialised as DiT (https://arxiv.org/abs/2212.09748)."""
    config = text_config(words, 80, attn_implementation="eager")  # the fused attention is slow backwards on CPUs
    encoders = {name: CLIPTextModelWithProjection(config) for name in ("text_encoder", "text_encoder_2")}
    text = sum(encoder.config.projection_dim for encoder in encoders.values())
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD,
        joint_attention_dim=text,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=text,
        pos_embed_max_size=SIZE // 4,
        qk_norm="rms_norm",
    )
    for name, value in transformer.named_parameters():
        if ".linear." in name or name.startswith("proj_out"):  # every block begins as the identity (DiT's adaLN-Zero)
            nn.init.zeros_(value)
    return nn.ModuleDict(encoders | {"transformer": transformer})


class Repeated:
    """Joint attention as diffusers' `JointAttnProcessor2_0`, in which the last text token stands for `copies` equal ones.

    With no third text encoder the stock pipeline appends `max_sequence_length` tokens of zeros, 256 by default. Text has no
    positions in this transformer, so they stay equal in every layer, and n equal keys weigh as much as one whose score is
    larger by log n: training needs one token in their place.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        *,
        copies: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Image (B, N, C) and text (B, M, C) tokens, copies (B,) -> the same shapes."""

        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return norm(x) if norm is not None else x

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], dim=2)
        key = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], dim=2)
        value = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], dim=2)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        bias = F.pad(copies.log().to(scores.dtype)[:, None], (key.shape[2] - 1, 0))
        mixed = ((scores + bias[:, None, None]).softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        image, text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def velocity(nets: nn.ModuleDict, tokens: Tensor, noisy: Tensor, sigma: Tensor, copies: Tensor) -> Tensor:
    """noise - clean as predicted, (B, 4, h, w), from captions (B, TOKENS), as the stock pipeline computes it.

    sigma (B,) in 0..1; copies (B,): the pipeline's max_sequence_length; the transformer's attention must be `Repeated`.
    """
    read = [nets[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    states = torch.cat([text.hidden_states[-2] for text in read], dim=-1)
    pooled = torch.cat([text.text_embeds for text in read], dim=-1)
    states = F.pad(states, (0, 0, 0, 1))
    return nets["transformer"](noisy, states, pooled, 1000 * sigma, joint_attention_kwargs={"copies": copies}).sample


def no_third_encoder(width: int) -> dict[str, T5EncoderModel | T5TokenizerFast]:
    """What stands for a third text encoder, as the pipeline loads only with one: T5 with no layers, whose tokens are all zeros.

    So the transformer reads `max_sequence_length` tokens of zeros, as from the stock pipeline with text_encoder_3=None.
    """
    words = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    encoder = T5EncoderModel(T5Config(vocab_size=len(words), d_model=width, d_kv=1, d_ff=1, num_layers=0, num_heads=1))
    nn.init.zeros_(encoder.shared.weight)
    return {"text_encoder_3": encoder.eval(), "tokenizer_3": words}


def pipeline(nets: nn.ModuleDict, vae: AutoencoderKL, words: CLIPTokenizer) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        tokenizer=words,
        tokenizer_2=words,
        **nets,
        **no_third_encoder(nets["transformer"].config.joint_attention_dim),
    )
