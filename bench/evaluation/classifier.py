"""A classifier of the concept in a picture of a small pipeline: a stand-in for text alignment, trained on fresh scenes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class ConceptClassifier(nn.Module):
    """A small convolutional network: (B, 3, 64, 64) float32 in -1..1 -> (B, concepts) logits."""

    def __init__(self, concepts: list[str], width: int = 32):
        super().__init__()
        self.concepts = concepts
        layers, channels = [], 3
        for scale in (1, 2, 3, 4):
            layers += [
                nn.Conv2d(channels, width * scale, 3, stride=2, padding=1),
                nn.GroupNorm(8, width * scale),
                nn.SiLU(),
            ]
            channels = width * scale
        self.features = nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU())
        self.head = nn.Linear(channels, len(concepts))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.pooled(pixels))

    def pooled(self, pixels: Tensor) -> Tensor:
        """The features before the head, (B, channels), for pictures of any height and width."""
        return self.features(pixels).amax(dim=(2, 3))

    @torch.inference_mode()
    def name(self, pixels: Tensor) -> list[str]:
        """The most likely concept of each picture."""
        return [self.concepts[i] for i in self(pixels).argmax(dim=1).tolist()]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half() for name, value in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"concepts": self.concepts}))

    @classmethod
    def load(cls, folder: Path) -> ConceptClassifier:
        model = cls(json.loads((folder / "config.json").read_text())["concepts"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.float().eval()
