"""Small pipelines of today's families with random weights and tokenizers of their own, for tests; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import tokenizers
import torch
import transformers

WIDTH = 32  # of every text encoder's states
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def t5_tokenizer():
    """Letters as words."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.0123456789"]
    return transformers.T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def clip(words, **config):
    return transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        projection_dim=WIDTH,
        eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        **config,
    )


def t5(words, width=WIDTH):
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(words), **T5 | {"d_model": width}))


def picture_vae(blocks, channels, **config):
    """An autoencoder that makes pictures 2 ** (blocks - 1) times as large as its latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=channels,
        **config,
    )


def ready(pipe):
    """Without dropout and bars."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3(words, t5_too=True, **scheduler):
    torch.manual_seed(0)
    letters = t5_tokenizer() if t5_too else None
    made = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=picture_vae(2, 4, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=transformers.CLIPTextModelWithProjection(clip(words)),
        tokenizer=words,
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip(words)),
        tokenizer_2=words,
        text_encoder_3=t5(letters, 2 * WIDTH) if t5_too else None,
        tokenizer_3=letters,
    )
    return ready(made)


def pixart(sample_size=8, blocks=2):
    torch.manual_seed(0)
    letters = t5_tokenizer()
    made = diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=sample_size,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=picture_vae(blocks, 4),
        text_encoder=t5(letters),
        tokenizer=letters,
    )
    return ready(made)


def flux(words, guidance_embeds=True, **scheduler):
    torch.manual_seed(0)
    letters = t5_tokenizer()
    made = diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **scheduler}),
        vae=picture_vae(2, 4, scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=transformers.CLIPTextModel(clip(words)),
        tokenizer=words,
        text_encoder_2=t5(letters),
        tokenizer_2=letters,
    )
    made.default_sample_size = 8
    return ready(made)


def qwen_tokenizer():
    """Bytes as words."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = {letter: i for i, letter in enumerate([*letters, *special])}
    return transformers.Qwen2Tokenizer(vocab=words, merges=[], additional_special_tokens=special[1:])


def video_vae(cls, **config):
    return cls(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
        **config,
    )


def qwen(**scheduler):
    torch.manual_seed(0)
    bytes_ = qwen_tokenizer()
    text = {
        "vocab_size": len(bytes_),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    made = diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **{"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02, **scheduler}
        ),
        vae=video_vae(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        tokenizer=bytes_,
    )
    made.default_sample_size = 8
    before, _ = made.prompt_template_encode.split("{}")
    made.prompt_template_encode_start_idx = len(bytes_(before).input_ids)
    return ready(made)


def wan():
    torch.manual_seed(0)
    letters = t5_tokenizer()
    made = diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=16,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        vae=video_vae(diffusers.AutoencoderKLWan, scale_factor_temporal=2, scale_factor_spatial=2),
        text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(letters), **T5)),
        tokenizer=letters,
    )
    return ready(made)


@dataclass(frozen=True)
class Case:
    """A family, as its stock pipeline and our sampler are asked for the same.

    make: a pipeline, from the words of a CLIP. scale: what stock calls the guidance scale. options: of both calls.
    """

    make: Callable[..., diffusers.DiffusionPipeline]
    scale: str
    options: dict[str, Any]

    def stock(self, pipe, prompts, seeds, steps, scale, negative, output="np", **options):
        """Images, or videos, of the pipeline's own call."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"num_inference_steps": steps, self.scale: scale, "negative_prompt": negative, "generator": generators}
        return pipe(prompts, output_type=output, **{**settings, **self.options, **options})[0]


SIZE = {"height": 16, "width": 24}
SHORT = {**SIZE, "max_sequence_length": 40}
CASES = {
    "sd3": Case(sd3, "guidance_scale", SHORT),
    "sd3-shifted": Case(partial(sd3, t5_too=False, use_dynamic_shifting=True), "guidance_scale", SHORT),
    "pixart": Case(lambda _: pixart(), "guidance_scale", {**SHORT, "use_resolution_binning": False, "clean_caption": False}),
    "pixart-binned": Case(
        lambda _: pixart(32, 4), "guidance_scale", {**SHORT, "height": 45, "width": 100, "clean_caption": False}
    ),
    "flux": Case(flux, "true_cfg_scale", {**SHORT, "guidance_scale": 2.5}),
    "qwen": Case(lambda _: qwen(), "true_cfg_scale", SHORT),
    "wan": Case(lambda _: wan(), "guidance_scale", {**SHORT, "width": 32, "num_frames": 5}),
}
