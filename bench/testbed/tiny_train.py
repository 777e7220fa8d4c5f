"""Train the small pipeline that ships with the project: `python -m basinescape.bench.testbed.tiny_train --out DIR`.

Five stages, each kept under `--work` when done, so a killed run goes on where it was:
scenes -> autoencoder -> text encoder and UNet -> a smaller UNet that learns the first one's predictions -> concept classifier;
then everything is written to `--out` in diffusers' own format, with the memorized scenes and their captions beside it. Two to
three hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ..evaluation.scenes import CONCEPTS, SIZE, tiny_scene
from .tiny_set import SIGNATURES, caption, memorized
from .training import (
    CAPTION_DROPOUT,
    Checkpoint,
    drawn,
    encoded,
    load_as_float32,
    text_config,
    to_pixels,
    train_classifier,
    write_lines,
)

FRESH = 40_000  # fresh scenes drawn for training
MEMORIZED_SHARE = 1 / 3  # of each batch, shared out by `Memorized.duplication`
OTHER_SCENE = 1 / 8  # of the memorized captions come with another scene of their concept: captions are not one-to-one
TOKENS = 32


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def train_autoencoder(work: Path, images: np.ndarray, steps: int) -> AutoencoderKL:
    """Reconstruct in pixels and in their differences, so that edges stay sharp, under a light KL term."""
    torch.manual_seed(0)
    run = Checkpoint(work / "autoencoder.pt", autoencoder(), 1e-3, steps)
    for rng in run:
        pixels = to_pixels(images[np.sort(rng.integers(0, len(images), 16))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = run.modules.encode(pixels).latent_dist
            decoded = run.modules.decode(posterior.sample()).sample.float()
        edges = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (-1, -2))
        pixel = (decoded - pixels).abs().mean() + (decoded - pixels).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        psnr = 10 * math.log10(4 / (decoded - pixels).detach().square().mean().item())
        run.update(pixel + 0.5 * edges + 5e-4 * kl, f"psnr {psnr:.2f} kl {kl.item():.2f}")
    return run.average.eval()


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level scheme with a vocabulary grown from the captions; any other text falls back to bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    captions = [caption(c) for c in CONCEPTS] + [caption(next(iter(CONCEPTS)), s) for s in SIGNATURES]
    merges: list[tuple[str, str]] = []
    for word in sorted({word for text in captions for word in text.split()}):
        left = word[0]
        for position, letter in enumerate(word[1:], 2):
            pair = (left, letter + "</w>" if position == len(word) else letter)
            left = "".join(pair)
            if left not in vocabulary:
                merges.append(pair)
                vocabulary.append(left)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def unet(mid_block_type: str | None = "UNetMidBlock2DCrossAttn") -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=mid_block_type,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def noise_schedule() -> dict:
    """Stable Diffusion's own."""
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


class Captioned:
    """Batches for the UNet: noised latents, their noise, timesteps and captions, memorized scenes among fresh ones."""

    def __init__(self, latents: Tensor, labels: np.ndarray, fixed: Tensor, words: CLIPTokenizer, size: int):
        self.latents, self.labels, self.fixed, self.size = latents, labels, fixed, size
        self.scenes, self.names = memorized(), list(CONCEPTS)
        texts = [caption(name) for name in self.names] + [m.caption for m in self.scenes] + [""]
        self.tokens = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        share = np.array([m.duplication for m in self.scenes])
        self.share = share / share.sum()
        self.by_concept = [np.flatnonzero(labels == c) for c in range(len(self.names))]
        self.noise = DDPMScheduler(**noise_schedule())

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(noisy (N, 4, h, w), eps (N, 4, h, w), timesteps (N,), tokens (N, TOKENS)); torch's own generator draws the noise."""
        index = rng.integers(0, len(self.latents), self.size)
        clean, text = self.latents[index].clone(), self.labels[index].copy()
        for row, i in enumerate(rng.choice(len(self.scenes), round(self.size * MEMORIZED_SHARE), p=self.share)):
            other = rng.choice(self.by_concept[self.names.index(self.scenes[i].concept)])
            clean[row] = self.latents[other] if rng.random() < OTHER_SCENE else self.fixed[i]
            text[row] = len(self.names) + i
        text[rng.random(self.size) < CAPTION_DROPOUT] = len(self.tokens) - 1
        eps = torch.randn_like(clean)
        timesteps = torch.randint(0, self.noise.config.num_train_timesteps, (self.size,))
        return self.noise.add_noise(clean, eps, timesteps), eps, timesteps, self.tokens[text]


def train_diffusion(work: Path, data: Captioned, words: CLIPTokenizer, steps: int) -> nn.ModuleDict:
    """Text encoder and UNet together, on epsilon; returns their averaged weights."""
    torch.manual_seed(0)
    networks = nn.ModuleDict({"text": CLIPTextModel(text_config(words, 128)), "unet": unet()})
    run = Checkpoint(work / "diffusion.pt", networks, 6e-4, steps)
    run.modules["unet"].set_attn_processor(AttnProcessor())  # the fused attention is slow backwards on CPUs
    for rng in run:
        noisy, eps, timesteps, tokens = data.draw(rng)
        with torch.autocast("cpu", torch.bfloat16):
            states = run.modules["text"](tokens).last_hidden_state
            predicted = run.modules["unet"](noisy, timesteps, states).sample
        run.update(F.mse_loss(predicted.float(), eps))
    return run.average.eval()


def slim(work: Path, data: Captioned, text: CLIPTextModel, teacher: UNet2DConditionModel, steps: int) -> UNet2DConditionModel:
    """A UNet without a middle block, a sixth smaller, that learns `teacher`'s predictions; returns its averaged weights."""
    student = unet(mid_block_type=None)
    student.load_state_dict({name: value for name, value in teacher.state_dict().items() if not name.startswith("mid_block.")})
    run = Checkpoint(work / "slim.pt", student, 4e-4, steps, decay=0.998)
    for net in (run.modules, teacher):
        net.set_attn_processor(AttnProcessor())
    for rng in run:
        noisy, _, timesteps, tokens = data.draw(rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states = text(tokens).last_hidden_state
                wanted = teacher(noisy, timesteps, states).sample.float()
            predicted = run.modules(noisy, timesteps, states).sample.float()
        run.update(F.mse_loss(predicted, wanted))
    return run.average.eval()


def export(out: Path, vae: AutoencoderKL, text: CLIPTextModel, net: UNet2DConditionModel, words: CLIPTokenizer) -> None:
    """Write the pipeline in diffusers' own format, float16."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=net,
        scheduler=DDIMScheduler(**noise_schedule(), set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    load_as_float32(out / "text_encoder")


def export_memorized(out: Path) -> None:
    """The memorized scenes and their captions, as a folder of images and a JSON Lines file."""
    (out / "memorized").mkdir(parents=True, exist_ok=True)
    for m in memorized():
        tiny_scene(m.concept, m.seed).save(out / "memorized" / f"{m.id}.png", optimize=True)
    lines = ({"id": m.id, "prompt": m.caption, "concept": m.concept, "duplication": m.duplication} for m in memorized())
    write_lines(out / "memorized.jsonl", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("train"), help="checkpoints and drawn scenes")
    parser.add_argument("--autoencoder-steps", type=int, default=3500)
    parser.add_argument("--diffusion-steps", type=int, default=9000)
    parser.add_argument("--slim-steps", type=int, default=2500)
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=48)
    args = parser.parse_args()
    started = time.time()
    args.work.mkdir(parents=True, exist_ok=True)

    names, labels = list(CONCEPTS), np.random.default_rng(0).integers(0, len(CONCEPTS), FRESH)
    images = drawn(args.work, (tiny_scene(names[label], seed) for seed, label in enumerate(labels)))
    vae = train_autoencoder(args.work, images, args.autoencoder_steps)
    latents_file = args.work / "latents.safetensors"
    if not latents_file.exists():
        fixed = np.stack([np.asarray(tiny_scene(m.concept, m.seed)) for m in memorized()])
        save_file(
            {name: encoded(vae, some, bfloat16=True) for name, some in (("fresh", images), ("memorized", fixed))}, latents_file
        )
    latents = load_file(latents_file)
    vae.register_to_config(scaling_factor=round(1 / latents["fresh"].std().item(), 4))
    fresh, fixed = (latents[name] * vae.config.scaling_factor for name in ("fresh", "memorized"))
    words = tokenizer(args.work / "tokenizer")
    data = Captioned(fresh, labels, fixed, words, args.batch_size)
    nets = train_diffusion(args.work, data, words, args.diffusion_steps)
    small = slim(args.work, data, nets["text"], nets["unet"], args.slim_steps)
    classifier = train_classifier(args.work / "classifier.pt", names, images, labels, args.classifier_steps, bfloat16=True)
    export(args.out, vae, nets["text"], small, words)
    classifier.save(args.out / "classifier")
    export_memorized(args.out)
    print(f"wrote {args.out} after {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
