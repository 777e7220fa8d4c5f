"""Stock diffusers pipelines of the smallest random components, as data: a network alone, prompted by embeddings."""

import inspect
from dataclasses import dataclass, field

import diffusers
import torch

TOKENS, WIDTH = 6, 8
EULER = ("FlowMatchEulerDiscreteScheduler", {})
PROMPT = {"prompt_embeds": (TOKENS, WIDTH)}
MASK = {"prompt_attention_mask": (TOKENS,)}
POOLED = {"pooled_prompt_embeds": (WIDTH,)}
ROPE = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2)}


@dataclass(frozen=True)
class Double:
    """A pipeline's class; its network's class and configuration; its scheduler's; what a prompt is (name: shape, a mask has one
    dimension); further arguments of the call; further components, each a class and its configuration."""

    network: tuple[str, dict]
    scheduler: tuple[str, dict] = EULER
    prompt: dict = field(default_factory=lambda: PROMPT)
    call: dict = field(default_factory=lambda: {"height": 32, "width": 32})
    scale: str = "guidance_scale"
    parts: dict = field(default_factory=dict)
    networks: tuple[str, ...] = ("transformer",)
    listed: bool = False  # prompts are lists of tensors
    shift: float = 0.0  # how much larger our weight is than the pipeline's own scale
    arguments: dict = field(default_factory=dict)  # of the pipeline


EMPTY = {
    *("vae", "tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"),
}
VIDEO = {"height": 32, "width": 32, "num_frames": 5}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 16,
}
UNIPC_FLOW = (
    "UniPCMultistepScheduler",
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000, "flow_shift": 3.0},
)
FLUX = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH, **ROPE}
DIT = {"in_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "sample_size": 4}

PIPELINES = {
    "StableDiffusion3Pipeline": Double(
        (
            "SD3Transformer2DModel",
            {
                **DIT,
                "num_layers": 2,
                "out_channels": 4,
                "joint_attention_dim": WIDTH,
                "caption_projection_dim": 8,
                "pooled_projection_dim": WIDTH,
                "pos_embed_max_size": 8,
            },
        ),
        prompt=PROMPT | POOLED,
    ),
    "PixArtSigmaPipeline": Double(
        ("PixArtTransformer2DModel", {**DIT, "out_channels": 8, "cross_attention_dim": 8, "caption_channels": WIDTH}),
        ("DPMSolverMultistepScheduler", {}),
        prompt=PROMPT | MASK,
        call={"height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "AuraFlowPipeline": Double(
        (
            "AuraFlowTransformer2DModel",
            {
                "sample_size": 4,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "attention_head_dim": 4,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "caption_projection_dim": 8,
                "pos_embed_max_size": 16,
            },
        ),
        prompt=PROMPT | MASK,
    ),
    "SanaPipeline": Double(
        (
            "SanaTransformer2DModel",
            {
                **DIT,
                "out_channels": 4,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 4,
                "cross_attention_dim": 8,
                "caption_channels": WIDTH,
            },
        ),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
        prompt=PROMPT | MASK,
        call={"height": 128, "width": 128, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "LTXPipeline": Double(
        (
            "LTXVideoTransformer3DModel",
            {
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "cross_attention_dim": 16,
                "num_layers": 1,
                "caption_channels": WIDTH,
            },
        ),
        prompt=PROMPT | MASK,
        call={"height": 64, "width": 64, "num_frames": 9},
    ),
    "CogVideoXPipeline": Double(
        (
            "CogVideoXTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 4,
                "text_embed_dim": WIDTH,
                "num_layers": 1,
                "sample_width": 4,
                "sample_height": 4,
                "sample_frames": 5,
                "max_text_seq_length": TOKENS,
            },
        ),
        ("CogVideoXDDIMScheduler", {}),
        call=VIDEO,
    ),
    "ZImagePipeline": Double(
        (
            "ZImageTransformer2DModel",
            {
                "in_channels": 4,
                "dim": 32,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": WIDTH,
                "axes_dims": [8, 4, 4],
                "axes_lens": [256, 32, 32],
            },
        ),
        listed=True,
        shift=1.0,
    ),
    "FluxPipeline": Double(
        ("FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": WIDTH}), prompt=PROMPT | POOLED, scale="true_cfg_scale"
    ),
    "Flux2KleinPipeline": Double(
        (
            "Flux2Transformer2DModel",
            {**FLUX, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16, "guidance_embeds": False},
        ),
        parts={
            "vae": (
                "AutoencoderKLFlux2",
                {
                    "block_out_channels": (4, 4, 4, 4),
                    "down_block_types": ("DownEncoderBlock2D",) * 4,
                    "up_block_types": ("UpDecoderBlock2D",) * 4,
                    "layers_per_block": 1,
                    "latent_channels": 4,
                    "norm_num_groups": 2,
                    "sample_size": 32,
                },
            )
        },
    ),
    "QwenImagePipeline": Double(
        (
            "QwenImageTransformer2DModel",
            {"in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": WIDTH, **ROPE},
        ),
        prompt=PROMPT | {"prompt_embeds_mask": (TOKENS,)},
        scale="true_cfg_scale",
    ),
    "Lumina2Pipeline": Double(
        (
            "Lumina2Transformer2DModel",
            {
                "sample_size": 4,
                "in_channels": 4,
                "hidden_size": 32,
                "num_layers": 1,
                "num_refiner_layers": 1,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 8,
                "axes_dim_rope": (8, 4, 4),
                "axes_lens": (64, 16, 16),
                "cap_feat_dim": WIDTH,
            },
        ),
        prompt=PROMPT | MASK,
    ),
    "WanPipeline": Double(("WanTransformer3DModel", WAN), UNIPC_FLOW, call=VIDEO),
    "ChromaPipeline": Double(
        (
            "ChromaTransformer2DModel",
            {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        ),
        prompt=PROMPT | MASK,
    ),
    "HunyuanVideoPipeline": Double(
        (
            "HunyuanVideoTransformer3DModel",
            {
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 1,
                "num_single_layers": 1,
                "num_refiner_layers": 1,
                "text_embed_dim": WIDTH,
                "pooled_projection_dim": WIDTH,
                "rope_axes_dim": (4, 2, 2),
            },
        ),
        prompt=PROMPT | POOLED | MASK,
        call=VIDEO,
        scale="true_cfg_scale",
    ),
    "KandinskyV22Pipeline": Double(
        (
            "UNet2DConditionModel",
            {
                "sample_size": 4,
                "in_channels": 4,
                "out_channels": 8,
                "block_out_channels": (8, 8),
                "layers_per_block": 1,
                "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "norm_num_groups": 2,
                "attention_head_dim": 4,
                "addition_embed_type": "image",
                "encoder_hid_dim": WIDTH,
                "encoder_hid_dim_type": "image_proj",
                "cross_attention_dim": 8,
                "resnet_time_scale_shift": "scale_shift",
                "class_embed_type": None,
            },
        ),
        ("DDPMScheduler", {"clip_sample": False, "beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}),
        prompt={"image_embeds": (WIDTH,)},
        call={"height": 64, "width": 64},
        networks=("unet",),
        parts={
            "movq": (
                "VQModel",
                {
                    "block_out_channels": (4, 4, 4, 4),
                    "down_block_types": ("DownEncoderBlock2D",) * 4,
                    "up_block_types": ("UpDecoderBlock2D",) * 4,
                    "norm_num_groups": 2,
                    "latent_channels": 4,
                    "num_vq_embeddings": 4,
                },
            )
        },
    ),
}


def build(name, **more):
    """The pipeline; `more` are arguments of its class."""
    double = PIPELINES[name]
    torch.manual_seed(0)
    made = {part: make(*what) for part, what in {double.networks[0]: double.network, **double.parts}.items()}
    cls = getattr(diffusers, name)
    scheduler = getattr(diffusers, double.scheduler[0])(**double.scheduler[1])
    missing = dict.fromkeys(set(inspect.signature(cls.__init__).parameters) & EMPTY - made.keys())
    pipe = cls(**{**missing, **made, "scheduler": scheduler, **double.arguments, **more})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(name, config):
    """A model with random weights, none of which is zero."""
    model = getattr(diffusers, name)(**config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def prompts(name, batch=2, seed=0):
    """What the pipeline's call takes in the place of prompts and negative ones, different for each sample."""
    double, rng = PIPELINES[name], torch.Generator().manual_seed(seed)
    found = {}
    for sign in ("", "negative_"):
        for part, shape in double.prompt.items():
            mask = part.endswith("mask")
            given = torch.ones((batch, *shape), dtype=torch.bool) if mask else torch.randn((batch, *shape), generator=rng)
            found[sign + part] = list(given) if double.listed else given
    return found


def call(name, pipe, scale=4.0, batch=2, steps=3, rows=slice(None), **more):
    """The latents of a call with a seed for each sample. scale: None: left out. rows: which of the batch's samples."""
    double, dtype = PIPELINES[name], pipe.dtype
    given = {part: value[rows] for part, value in prompts(name, batch).items()}
    given |= {part: value.to(dtype) for part, value in given.items() if not double.listed and value.is_floating_point()}
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)][rows]
    options = {} if scale is None else {double.scale: scale - double.shift}
    options |= {"num_inference_steps": steps, "generator": generators}
    options |= {"output_type": "latent", "return_dict": False, **double.call, **given}
    return pipe(**(options | more))[0]


WORDS, SEEDS = ["a picture of a cat signed by arno", "a picture of a frog"], [3, 1]


def stable_diffusion(pipe, scale=7.5, words=WORDS, **options):
    """The images of a Stable Diffusion pipeline, by default latents, with a seed for each."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"num_inference_steps": 6, "output_type": "latent"} | options
    return pipe(words, guidance_scale=scale, generator=generators, **options).images
