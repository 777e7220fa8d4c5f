"""Small pipelines of today's families with random weights and tokenizers of their own, for tests; nothing is downloaded."""

import diffusers
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


def t5(words, cls=transformers.T5EncoderModel, config=transformers.T5Config):
    return cls(config(vocab_size=len(words), **T5))


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
        text_encoder_3=transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=len(letters), **T5 | {"d_model": 2 * WIDTH})
        )
        if t5_too
        else None,
        tokenizer_3=letters,
    )
    return ready(made)
