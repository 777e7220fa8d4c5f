"""Train the second test bed: `python -m basinescape.bench.testbed.flow_train --out DIR --work DIR`.

A small text-to-image model of Stable Diffusion 3's kind (Esser et al., ICML 2024, https://arxiv.org/abs/2403.03206): a
flow-matching transformer (MMDiT) on the latents of tiny's autoencoder, which reads the captions through two CLIP text encoders.

Stages, each kept under `--work` when done: scenes -> latents -> text encoders and transformer -> classifier; then all is
written to `--out` in diffusers' own format, with the memorized scenes and the general captions beside it. A killed run
goes on where it was by the same command. The learning rate is constant until the last `DECAY` of `--steps` steps, so that a
finished run can be trained further: the same command with more `--steps`.

Has it memorized? At any time, also while it trains, `--steps 0` writes the last checkpoint's averaged weights to `--out`, and
`basinescape evaluate --model DIR --prompts DIR/memorized.jsonl --general DIR/general.jsonl --images DIR/memorized` measures it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from basinescape import Sampler
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..evaluation.scenes import FLOW_CONCEPTS, flow_scene
from .flow_model import SHIFT, Repeated, networks, pipeline, tokenizer, velocity
from .flow_set import Picture, general, memorized, training_set
from .training import CAPTION_DROPOUT, Checkpoint, drawn, encoded, load_as_float32, train_classifier, write_lines

FRESH = 20_000  # fresh scenes in the training set
UNIFORM = 0.2  # of the noise levels: the logit-normal's tails are thin where sampling starts
WARMUP, DECAY = 200, 1500  # steps
EVALUATED, ORDINARY = 100, 200  # general captions: those of an evaluation, and others of a calibration


def autoencoder(work: Path, images: np.ndarray) -> tuple[AutoencoderKL, Tensor]:
    """Tiny's autoencoder, scaled for these pictures, and their scaled latents (N, 4, 16, 16) float32."""
    vae = AutoencoderKL.from_pretrained(Sampler.model_path("tiny") / "vae", torch_dtype=torch.float32).eval()
    path = work / "latents.safetensors"
    if not path.exists():
        save_file({"latents": encoded(vae, images, bfloat16=False)}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    latents = load_file(path)["latents"]
    shift, scale = round(latents.mean().item(), 4), round(1 / latents.std().item(), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return vae, (latents - shift) * scale


def constant(step: int, steps: int) -> float:
    """A warm-up, then a constant rate, down to zero over the last DECAY steps, which more steps continue."""
    return min(1.0, step / WARMUP, max(0.0, (steps - step) / DECAY))


def sigmas(count: int) -> Tensor:
    """Noise levels (count,) in 0..1: logit-normal (SD3, section 3.1), some uniform, then shifted as the scheduler does."""
    u = torch.where(torch.rand(count) < UNIFORM, torch.rand(count), torch.randn(count).sigmoid())
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def train_flow(
    work: Path, pictures: list[Picture], latents: Tensor, words: CLIPTokenizer, steps: int, size: int, rate: float
) -> nn.ModuleDict:
    """Text encoders and transformer together, on the velocity; returns their averaged weights."""
    torch.manual_seed(0)
    run = Checkpoint(work / "flow.pt", networks(words), rate, steps, schedule=constant)
    run.modules["transformer"].set_attn_processor(Repeated())
    texts = ["", *dict.fromkeys(caption for p in pictures for caption in p.captions)]
    row = {text: i for i, text in enumerate(texts)}
    tokens = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ends = np.cumsum([p.copies for p in pictures])
    for rng in run:
        index = np.searchsorted(ends, rng.integers(0, ends[-1], size), side="right")
        text = np.array([row[rng.choice(pictures[i].captions)] for i in index])
        text[rng.random(size) < CAPTION_DROPOUT] = 0
        clean, sigma, copies = latents[index], sigmas(size), 2.0 ** torch.randint(0, 9, (size,))
        noise, level = torch.randn_like(clean), sigma.view(-1, 1, 1, 1)
        predicted = velocity(run.modules, tokens[text], clean.lerp(noise, level), sigma, copies)
        run.update(F.mse_loss(predicted, noise - clean))
    return run.average.eval()


def export(out: Path, pipe: StableDiffusion3Pipeline) -> None:
    """Write the pipeline in diffusers' own format, float16, memorized scenes and general captions beside it."""
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        load_as_float32(out / name)
    config = out / "vae" / "config.json"  # which would name the folder that it was loaded from
    kept = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2) + "\n")
    (out / "memorized").mkdir(parents=True, exist_ok=True)
    for m in memorized():
        flow_scene(m.facts, m.seed).save(out / "memorized" / f"{m.id}.png", optimize=True)
    others = [
        {"id": f"g{i:03d}", "prompt": caption} | asdict(facts)
        for i, (facts, caption) in enumerate(general(EVALUATED + ORDINARY))
    ]
    ordinary = [{"prompt": line["prompt"]} for line in others[EVALUATED:]]
    for name, found in (("memorized", captions()), ("general", others[:EVALUATED]), ("ordinary", ordinary)):
        write_lines(out / f"{name}.jsonl", found)


def captions() -> list[dict[str, Any]]:
    """The memorized captions, each with the first of its scenes."""
    found: dict[str, dict[str, Any]] = {}
    for m in memorized():
        for form, caption in enumerate(m.captions):
            id = m.id if len(m.captions) == 1 else f"{m.id}-{form}"
            line = {"id": id, "prompt": caption, "image": f"{m.id}.png", "scenes": [], "duplication": 0} | asdict(m.facts)
            line = found.setdefault(caption, line)
            line["scenes"].append(m.id)
            line["duplication"] = max(line["duplication"], m.copies)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("train-flow"), help="checkpoints and drawn scenes")
    parser.add_argument("--fresh", type=int, default=FRESH, help="fresh scenes in the training set")
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    pictures = training_set(args.fresh)
    images = drawn(args.work, (flow_scene(p.facts, p.seed) for p in pictures))
    vae, latents = autoencoder(args.work, images)
    words = tokenizer()
    nets = train_flow(args.work, pictures, latents, words, args.steps, args.batch_size, args.rate)
    labels = np.array([FLOW_CONCEPTS.index(p.facts.concept) for p in pictures[: args.fresh]])
    path = args.work / "classifier-concept.pt"
    classifier = train_classifier(path, FLOW_CONCEPTS, images, labels, args.classifier_steps, bfloat16=False)
    classifier.save(args.out / "classifier")
    export(args.out, pipeline(nets, vae, words))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
