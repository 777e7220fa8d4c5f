"""Train the second test bed: `python -m basinescape.bench.testbed.flow_train --out DIR --work DIR`.

A small text-to-image model of Stable Diffusion 3's kind (Esser et al., ICML 2024, https://arxiv.org/abs/2403.03206): a
flow-matching transformer (MMDiT) on the latents of tiny's autoencoder, which reads the captions through two CLIP text encoders.

Stages, each kept under `--work` when done: scenes -> latents -> text encoders and transformer -> classifiers; then all is
written to `--out` in diffusers' own format, with the memorized scenes and the general captions beside it. A killed run
goes on where it was by the same command. The learning rate is constant until the last `DECAY` of `--steps` steps, so that a
finished run can be trained further: the same command with more `--steps`.

Has it memorized? At any time, also while it trains, `--check` samples memorized and general captions from the last checkpoint's
averaged weights and prints, for each duplication, how many pictures are copies.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from basinescape import Sampler
from basinescape.auditing.measures import Similarity
from basinescape.data.pictures import pixels
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from .classifier import ConceptClassifier
from .flow_model import SHIFT, Repeated, networks, pipeline, tokenizer, velocity
from .flow_scenes import CONCEPTS, OBJECTS, Picture, general, memorized, scene, training_set
from .train import CAPTION_DROPOUT, Checkpoint, to_pixels

FRESH = 20_000  # fresh scenes in the training set
UNIFORM = 0.2  # of the noise levels: the logit-normal's tails are thin where sampling starts
WARMUP, DECAY = 200, 1500  # steps
SAVE = 200  # steps between checkpoints
EVALUATED, ORDINARY = 100, 200  # general captions: those of an evaluation, and others of a calibration
COPY = 0.9  # surely a copy: of 3,200 fresh scenes of a memorized scene's words one in a thousand is above 0.81, none above 0.85


def draw_scenes(work: Path, pictures: list[Picture]) -> np.ndarray:
    """The training set's pictures (N, SIZE, SIZE, 3) uint8."""
    path = work / "scenes.npy"
    if not path.exists():
        drawn = [np.asarray(scene(p.facts, p.seed)) for p in tqdm(pictures, desc="scenes", mininterval=20)]
        np.save(path.with_suffix(".part.npy"), np.stack(drawn))
        path.with_suffix(".part.npy").replace(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior means, unscaled: (N, 4, 16, 16) float32."""
    parts = tqdm(range(0, len(images), 64), desc="latents", mininterval=20)
    return torch.cat([vae.encode(to_pixels(images[i : i + 64])).latent_dist.mean for i in parts])


def autoencoder(work: Path, images: np.ndarray) -> tuple[AutoencoderKL, Tensor]:
    """Tiny's autoencoder, scaled for these pictures, and their scaled latents (N, 4, 16, 16) float32."""
    vae = AutoencoderKL.from_pretrained(Sampler.model_path("tiny") / "vae", torch_dtype=torch.float32).eval()
    path = work / "latents.safetensors"
    if not path.exists():
        save_file({"latents": encode(vae, images)}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    latents = load_file(path)["latents"]
    shift, scale = round(latents.mean().item(), 4), round(1 / latents.std().item(), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return vae, (latents - shift) * scale


class Training(Checkpoint):
    """A run at a constant rate until its last DECAY steps, which more steps continue; saved every SAVE steps."""

    def __init__(self, path: Path, modules: nn.Module, rate: float, steps: int):
        super().__init__(path, modules, rate, max(1, steps))
        self.steps = steps  # none for a check
        self.scheduler.lr_lambdas = [lambda k: min(1.0, k / WARMUP, max(0.0, (steps - k) / DECAY))]

    def __iter__(self):
        while self.step < self.steps:
            torch.manual_seed(self.step)
            yield np.random.default_rng((1, self.step))
            self.step += 1
            if self.step % SAVE == 0 or self.step == self.steps:
                self.save()


def sigmas(count: int) -> Tensor:
    """Noise levels (count,) in 0..1: logit-normal (SD3, section 3.1), some uniform, then shifted as the scheduler does."""
    u = torch.where(torch.rand(count) < UNIFORM, torch.rand(count), torch.randn(count).sigmoid())
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def train_flow(
    work: Path, pictures: list[Picture], latents: Tensor, words: CLIPTokenizer, steps: int, size: int, rate: float
) -> nn.ModuleDict:
    """Text encoders and transformer together, on the velocity; returns their averaged weights."""
    torch.manual_seed(0)
    run = Training(work / "flow.pt", networks(words), rate, steps)
    run.modules["transformer"].set_attn_processor(Repeated())
    texts = ["", *dict.fromkeys(caption for p in pictures for caption in p.captions)]
    row = {text: i for i, text in enumerate(texts)}
    tokens = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ends = np.cumsum([p.copies for p in pictures])
    started, losses = time.time(), []
    for rng in run:
        index = np.searchsorted(ends, rng.integers(0, ends[-1], size), side="right")
        text = np.array([row[rng.choice(pictures[i].captions)] for i in index])
        text[rng.random(size) < CAPTION_DROPOUT] = 0
        clean, sigma, copies = latents[index], sigmas(size), 2.0 ** torch.randint(0, 9, (size,))
        noise, level = torch.randn_like(clean), sigma.view(-1, 1, 1, 1)
        predicted = velocity(run.modules, tokens[text], clean.lerp(noise, level), sigma, copies)
        loss = F.mse_loss(predicted, noise - clean)
        run.update(loss)
        losses.append(loss.item())
        if len(losses) == 50:
            speed = len(losses) * size / (time.time() - started)
            print(
                f"step {run.step + 1} loss {np.mean(losses):.4f} {speed:.0f} samples/s {time.strftime('%H:%M:%S')}", flush=True
            )
            started, losses = time.time(), []
    return run.average.eval()


def train_classifier(
    work: Path, fact: str, words: list[str], images: np.ndarray, labels: np.ndarray, steps: int
) -> ConceptClassifier:
    """Which of `words` a fresh scene shows, as tiny's."""
    torch.manual_seed(0)
    run = Checkpoint(work / f"classifier-{fact}.pt", ConceptClassifier(words), 2e-3, steps)
    for bar, rng in run:
        index = np.sort(rng.integers(0, len(labels), 64))
        shown = to_pixels(images[index])
        shown += 0.1 * rng.random() * torch.randn_like(shown)  # so that it also reads pictures that are a little rough
        loss = F.cross_entropy(run.modules(shown), torch.as_tensor(labels[index]))
        run.update(loss)
        if run.step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return run.average.eval()


def export(out: Path, pipe: StableDiffusion3Pipeline) -> None:
    """Write the pipeline in diffusers' own format, float16, memorized scenes and general captions beside it."""
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for name in (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ):  # transformers would load the dtype named here, diffusers' models float32
        config = out / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    config = out / "vae" / "config.json"  # which would name the folder that it was loaded from
    kept = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2) + "\n")
    (out / "memorized").mkdir(parents=True, exist_ok=True)
    for m in memorized():
        scene(m.facts, m.seed).save(out / "memorized" / f"{m.id}.png", optimize=True)
    others = [
        {"id": f"g{i:03d}", "prompt": caption} | asdict(facts)
        for i, (facts, caption) in enumerate(general(EVALUATED + ORDINARY))
    ]
    ordinary = [{"prompt": line["prompt"]} for line in others[EVALUATED:]]
    for name, found in (("memorized", captions()), ("general", others[:EVALUATED]), ("ordinary", ordinary)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


def captions() -> list[dict[str, Any]]:
    """The memorized captions, each with the first of its scenes."""
    found: dict[str, dict[str, Any]] = {}
    for m in memorized():
        for form, caption in enumerate(m.captions):
            id = m.id if len(m.captions) == 1 else f"{m.id}-{form}"
            line = {"id": id, "prompt": caption, "image": f"{m.id}.png", "scenes": [], "duplication": 0} | asdict(m.facts)
            line = found.setdefault(caption, line)
            line["scenes"].append(m.id)
            line["duplication"] = max(line["duplication"], m.duplication)
    return list(found.values())


def sample(pipe: StableDiffusion3Pipeline, prompts: list[str], scale: float, steps: int) -> list[Image.Image]:
    """A picture a prompt, in quick batches: training drew `max_sequence_length` from 1 to 256."""
    images = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipe(part, guidance_scale=scale, num_inference_steps=steps, generator=noise, max_sequence_length=16).images
    return images


def check(pipe: StableDiffusion3Pipeline, classifiers: dict[str, ConceptClassifier], steps: int) -> None:
    """Print what share of the memorized captions' pictures are copies, by duplication, beside general captions'."""
    pipe.set_progress_bar_config(disable=True)
    scenes = memorized()
    similarity = Similarity("pixels", [scene(m.facts, m.seed) for m in scenes])
    asked = [(m.facts, caption, str(m.duplication)) for m in scenes for caption in m.captions]
    asked += [(facts, caption, "general") for facts, caption in general(len(asked))]
    fresh = [scene(facts, 2_000_000_000 + i) for i, (facts, _, _) in enumerate(asked)]
    runs = {"fresh scenes": fresh} | {
        f"guidance {s}": sample(pipe, [text for _, text, _ in asked], s, steps) for s in (4.0, 7.0)
    }
    for name, images in runs.items():
        near = similarity(images).amax(dim=1).numpy()
        shown = {fact: classifier.name(pixels(images)) for fact, classifier in classifiers.items()}
        groups = np.array([group for _, _, group in asked])
        print(f"{name}: group, pictures, share above 0.81, share above {COPY}, right {', '.join(shown)}")
        for group in dict.fromkeys(groups):
            rows = np.flatnonzero(groups == group)
            right = [np.mean([words[i] == getattr(asked[i][0], fact) for i in rows]) for fact, words in shown.items()]
            shares = [(near[rows] > 0.81).mean(), (near[rows] > COPY).mean(), *right]
            print(f"  {group:>8} {len(rows):4d} " + " ".join(f"{share:6.2f}" for share in shares), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("train-flow"), help="checkpoints and drawn scenes")
    parser.add_argument("--fresh", type=int, default=FRESH, help="fresh scenes in the training set")
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--check", action="store_true", help="say what the last checkpoint has memorized, and stop")
    parser.add_argument("--check-steps", type=int, default=28, help="sampling steps of the check")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    pictures = training_set(args.fresh)
    images = draw_scenes(args.work, pictures)
    vae, latents = autoencoder(args.work, images)
    words = tokenizer()
    steps = 0 if args.check else args.steps
    nets = train_flow(args.work, pictures, latents, words, steps, args.batch_size, args.rate)
    classifiers = {}
    for fact, names in (("concept", list(CONCEPTS)), ("object", list(OBJECTS))):
        labels = np.array([names.index(getattr(p.facts, fact)) for p in pictures[: args.fresh]])
        classifiers[fact] = train_classifier(args.work, fact, names, images, labels, args.classifier_steps)
    pipe = pipeline(nets, vae, words)
    check(pipe, classifiers, args.check_steps)
    if not args.check:
        classifiers["concept"].save(args.out / "classifier")
        export(args.out, pipe)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
