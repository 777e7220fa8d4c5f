"""Train the small pipeline that ships with the project: `python -m basinescape.bench.testbed.train --out DIR`.

Five stages, each kept under `--work` when done, so a killed run goes on where it was:
scenes -> autoencoder -> text encoder and UNet -> a smaller UNet that learns the first one's predictions -> concept classifier;
then everything is written to `--out` in diffusers' own format, with the memorized scenes and their captions beside it. Two to
three hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
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
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .classifier import ConceptClassifier
from .scenes import CONCEPTS, SIGNATURES, SIZE, caption, memorized, scene

FRESH = 40_000  # fresh scenes drawn for training
MEMORIZED_SHARE = 1 / 3  # of each batch, shared out by `Memorized.duplication`
OTHER_SCENE = 1 / 8  # of the memorized captions come with another scene of their concept: captions are not one-to-one
CAPTION_DROPOUT = 0.1  # of all captions are emptied: this trains the unconditional branch
TOKENS = 32


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in -1..1."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def draw_scenes(work: Path) -> tuple[np.ndarray, np.ndarray]:
    """The fresh scenes (FRESH, SIZE, SIZE, 3) uint8 and the index of each one's concept (FRESH,)."""
    labels = np.random.default_rng(0).integers(0, len(CONCEPTS), FRESH)
    path = work / "scenes.npy"
    if not path.exists():
        names = list(CONCEPTS)
        images = np.stack([np.asarray(scene(names[c], i)) for i, c in enumerate(tqdm(labels, desc="scenes"))])
        np.save(path, images)
    return np.load(path, mmap_mode="r"), labels


def schedule(step: int, steps: int, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to zero at the last step."""
    return min(step / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Checkpoint:
    """A training run that can be killed: modules, their average and the optimiser, saved every 500 steps."""

    def __init__(self, path: Path, modules: nn.Module, rate: float, steps: int, decay: float = 0.999):
        self.path, self.modules, self.steps, self.decay = path, modules, steps, decay
        self.average = copy.deepcopy(modules).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: schedule(k, steps))
        self.step = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step = state.pop("step")
            for name, value in state.items():
                getattr(self, name).load_state_dict(value)

    def __iter__(self):
        """Yield (step, generators seeded by it) until the run is complete."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.path.stem, mininterval=20)
        while self.step < self.steps:
            torch.manual_seed(self.step)
            yield bar, np.random.default_rng((1, self.step))
            self.step += 1
            bar.update()
            if self.step % 500 == 0 or self.step == self.steps:
                self.save()

    def update(self, loss: Tensor) -> None:
        """One optimiser step on `loss`; the average follows, faster at the start."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.modules.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)

    def save(self) -> None:
        names = ("modules", "average", "optimizer", "scheduler")
        state = {name: getattr(self, name).state_dict() for name in names} | {"step": self.step}
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)


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
    for bar, rng in run:
        pixels = to_pixels(images[np.sort(rng.integers(0, len(images), 16))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = run.modules.encode(pixels).latent_dist
            decoded = run.modules.decode(posterior.sample()).sample.float()
        edges = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (-1, -2))
        pixel = (decoded - pixels).abs().mean() + (decoded - pixels).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        run.update(pixel + 0.5 * edges + 5e-4 * kl)
        if run.step % 100 == 0:
            mse = (decoded - pixels).detach().square().mean().item()
            bar.set_postfix_str(f"psnr {10 * math.log10(4 / mse):.2f} kl {kl.item():.2f}")
    return run.average.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior means, unscaled: (N, 4, 16, 16) float32."""
    parts = []
    for start in range(0, len(images), 250):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(to_pixels(images[start : start + 250])).latent_dist.mean.float())
    return torch.cat(parts)


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
    vocab, merge_file = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    merge_file.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=128,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModel(config)


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
    run = Checkpoint(work / "diffusion.pt", nn.ModuleDict({"text": text_encoder(words), "unet": unet()}), 6e-4, steps)
    run.modules["unet"].set_attn_processor(AttnProcessor())  # the fused attention is slow backwards on CPUs
    for bar, rng in run:
        noisy, eps, timesteps, tokens = data.draw(rng)
        with torch.autocast("cpu", torch.bfloat16):
            states = run.modules["text"](tokens).last_hidden_state
            predicted = run.modules["unet"](noisy, timesteps, states).sample
        loss = F.mse_loss(predicted.float(), eps)
        run.update(loss)
        if run.step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return run.average.eval()


def slim(work: Path, data: Captioned, text: CLIPTextModel, teacher: UNet2DConditionModel, steps: int) -> UNet2DConditionModel:
    """A UNet without a middle block, a sixth smaller, that learns `teacher`'s predictions; returns its averaged weights."""
    student = unet(mid_block_type=None)
    student.load_state_dict({name: value for name, value in teacher.state_dict().items() if not name.startswith("mid_block.")})
    run = Checkpoint(work / "slim.pt", student, 4e-4, steps, decay=0.998)
    for net in (run.modules, teacher):
        net.set_attn_processor(AttnProcessor())
    for bar, rng in run:
        noisy, _, timesteps, tokens = data.draw(rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states = text(tokens).last_hidden_state
                wanted = teacher(noisy, timesteps, states).sample.float()
            predicted = run.modules(noisy, timesteps, states).sample.float()
        loss = F.mse_loss(predicted, wanted)
        run.update(loss)
        if run.step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.5f}")
    return run.average.eval()


def train_classifier(work: Path, images: np.ndarray, labels: np.ndarray, steps: int) -> ConceptClassifier:
    torch.manual_seed(0)
    run = Checkpoint(work / "classifier.pt", ConceptClassifier(list(CONCEPTS)), 2e-3, steps)
    for bar, rng in run:
        index = np.sort(rng.integers(0, len(images), 64))
        pixels = to_pixels(images[index])
        pixels += 0.1 * rng.random() * torch.randn_like(pixels)  # so that it also reads pictures that are a little rough
        with torch.autocast("cpu", torch.bfloat16):
            logits = run.modules(pixels)
        loss = F.cross_entropy(logits.float(), torch.as_tensor(labels[index]))
        run.update(loss)
        if run.step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
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
    config = out / "text_encoder" / "config.json"  # all parts load in float32, whatever they are stored in
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def export_memorized(out: Path) -> None:
    """The memorized scenes and their captions, as a folder of images and a JSON Lines file."""
    (out / "memorized").mkdir(parents=True, exist_ok=True)
    lines = []
    for m in memorized():
        scene(m.concept, m.seed).save(out / "memorized" / f"{m.id}.png", optimize=True)
        lines.append({"id": m.id, "prompt": m.caption, "concept": m.concept, "duplication": m.duplication})
    (out / "memorized.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


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

    images, labels = draw_scenes(args.work)
    vae = train_autoencoder(args.work, images, args.autoencoder_steps)
    latents_file = args.work / "latents.safetensors"
    if not latents_file.exists():
        fixed = np.stack([np.asarray(scene(m.concept, m.seed)) for m in memorized()])
        save_file({"fresh": encode(vae, images), "memorized": encode(vae, fixed)}, latents_file)
    latents = load_file(latents_file)
    vae.register_to_config(scaling_factor=round(1 / latents["fresh"].std().item(), 4))
    fresh, fixed = (latents[name] * vae.config.scaling_factor for name in ("fresh", "memorized"))
    words = tokenizer(args.work / "tokenizer")
    data = Captioned(fresh, labels, fixed, words, args.batch_size)
    nets = train_diffusion(args.work, data, words, args.diffusion_steps)
    small = slim(args.work, data, nets["text"], nets["unet"], args.slim_steps)
    classifier = train_classifier(args.work, images, labels, args.classifier_steps)
    export(args.out, vae, nets["text"], small, words)
    classifier.save(args.out / "classifier")
    export_memorized(args.out)
    print(f"wrote {args.out} after {(time.time() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
