"""What the trainings of both pipelines share."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTokenizer

from ..evaluation.classifier import ConceptClassifier

CAPTION_DROPOUT = 0.1  # of all captions are emptied: this trains the unconditional branch
SAVE = 250  # steps between checkpoints


def drawn(work: Path, scenes: Iterable[Image.Image]) -> np.ndarray:
    """The scenes (N, SIZE, SIZE, 3) uint8, drawn once."""
    path, part = work / "scenes.npy", work / "scenes.part.npy"
    if not path.exists():
        np.save(part, np.stack([np.asarray(scene) for scene in tqdm(scenes, desc="scenes", mininterval=20)]))
        part.replace(path)
    return np.load(path, mmap_mode="r")


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in -1..1."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: np.ndarray, bfloat16: bool) -> Tensor:
    """Posterior means, unscaled: (N, 4, 16, 16) float32."""
    parts = []
    for start in tqdm(range(0, len(images), 250), desc="latents", mininterval=20):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            parts.append(vae.encode(to_pixels(images[start : start + 250])).latent_dist.mean.float())
    return torch.cat(parts)


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to zero at the last step."""
    return min(step / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Checkpoint:
    """A training run that can be killed: modules, their average and the optimiser, saved every SAVE steps.

    decay: of the average. schedule: (step, steps) -> the share of `rate` that a step learns at.
    """

    def __init__(
        self,
        path: Path,
        modules: nn.Module,
        rate: float,
        steps: int,
        decay: float = 0.999,
        schedule: Callable[[int, int], float] = cosine,
    ):
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

    def __iter__(self) -> Iterator[np.random.Generator]:
        """A generator seeded by the step, as torch's own is, until the run is complete."""
        self._bar = tqdm(total=self.steps, initial=self.step, desc=self.path.stem, mininterval=20)
        while self.step < self.steps:
            torch.manual_seed(self.step)
            yield np.random.default_rng((1, self.step))
            self.step += 1
            self._bar.update()
            if self.step % SAVE == 0 or self.step == self.steps:
                self.save()

    def update(self, loss: Tensor, said: str = "") -> None:
        """One optimiser step on `loss`; the average follows, faster at the start. said: beside the bar, in the loss's place."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.modules.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if self.step % 50 == 0:
            self._bar.set_postfix_str(said or f"loss {loss.item():.5f}")

    def save(self) -> None:
        names = ("modules", "average", "optimizer", "scheduler")
        state = {name: getattr(self, name).state_dict() for name in names} | {"step": self.step}
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)


def train_classifier(
    path: Path, concepts: list[str], images: np.ndarray, labels: np.ndarray, steps: int, bfloat16: bool
) -> ConceptClassifier:
    """Which of `concepts` a scene shows: `labels` (N,) are those of the first N images."""
    torch.manual_seed(0)
    run = Checkpoint(path, ConceptClassifier(concepts), 2e-3, steps)
    for rng in run:
        index = np.sort(rng.integers(0, len(labels), 64))
        shown = to_pixels(images[index])
        shown += 0.1 * rng.random() * torch.randn_like(shown)  # so that it also reads pictures that are a little rough
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = run.modules(shown)
        run.update(F.cross_entropy(logits.float(), torch.as_tensor(labels[index])))
    return run.average.eval()


def text_config(words: CLIPTokenizer, width: int, **options: Any) -> CLIPTextConfig:
    """A CLIP text encoder of two layers for the tokens of `words`."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=words.model_max_length,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **options,
    )


def load_as_float32(folder: Path) -> None:
    """Make transformers load a stored text encoder in float32, as diffusers loads its models, whatever it is stored in."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
