"""What Stable Diffusion can do beside text to image: each makes of a pipeline another one, and the options of its call."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from ip_adapter import WIDTH, load_adapter
from PIL import Image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((32, 64), 255, dtype=np.uint8), ((0, 32), (0, 0))))


def img2img(pipe):
    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), {
        "image": PICTURE,
        "strength": 0.5,
        "num_inference_steps": 8,
    }


def inpaint(pipe):
    return StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False), {
        "image": PICTURE,
        "mask_image": MASK,
        "height": 64,
        "width": 64,
        "strength": 0.8,
    }


def inpaint_of_nine(pipe):
    """A network that is also given the mask, and the picture beneath it."""
    torch.manual_seed(1)
    pipe.register_modules(unet=type(pipe.unet).from_config(pipe.unet.config, in_channels=9))
    return inpaint(pipe)


def controlled(pipe):
    torch.manual_seed(1)
    network = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return StableDiffusionControlNetPipeline(**pipe.components, controlnet=network, requires_safety_checker=False), {
        "image": [PICTURE] * 2
    }


def guessing(pipe):
    made, options = controlled(pipe)
    return made, {**options, "guess_mode": True}


def adapted(pipe):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config, "x")
    return pipe, {"cross_attention_kwargs": {"scale": 0.5}}


def with_an_image(pipe):
    load_adapter(pipe.unet)
    embeds = torch.randn((2, 1, WIDTH), generator=torch.Generator().manual_seed(1))
    return pipe, {"ip_adapter_image_embeds": [embeds]}


def hooked(pipe):
    """As offload has it: what moves weights and inputs sits in the network's forward."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(pipe.unet, AlignDevicesHook("cpu", offload=True, io_same_device=True))
    return pipe, {}


VARIANTS = [img2img, inpaint, inpaint_of_nine, controlled, guessing, adapted, with_an_image, hooked]
