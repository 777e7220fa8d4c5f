"""The similarity above which a picture of the small pipeline counts as a copy.

python -m basinescape.bench.testbed.threshold [--json FILE]

It has to lie between two distributions. Fresh scenes, which nobody copied, against the memorized scene of their concept; and
the memorized scenes themselves after the pipeline's autoencoder, the best copies it can make. Needs the glyph font, as training
does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from basinescape import Sampler
from basinescape.auditing.measures import Similarity
from tqdm import tqdm

from ..evaluation.scenes import tiny_scene
from .tiny_set import memorized

FIRST = 2_000_000_000  # seeds that neither training nor the memorized scenes use


def fresh(measure: str, scenes: int) -> np.ndarray:
    """Similarities of `scenes` fresh scenes a memorized scene, all together."""
    found = []
    for i, fixed in enumerate(tqdm(memorized(), desc="scenes")):
        drawn = [tiny_scene(fixed.concept, FIRST + scenes * i + k) for k in range(scenes)]
        found.append(Similarity(measure, [tiny_scene(fixed.concept, fixed.seed)])(drawn)[:, 0].numpy())
    return np.concatenate(found)


@torch.inference_mode()
def autoencoded(measure: str) -> np.ndarray:
    """Similarity of each memorized scene to what the autoencoder makes of it."""
    pipe = Sampler.from_pretrained(Sampler.model_path("tiny"), "cpu", "float32").pipe
    scenes = [tiny_scene(fixed.concept, fixed.seed) for fixed in memorized()]
    latents = pipe.vae.encode(pipe.image_processor.preprocess(scenes)).latent_dist.mode()
    copies = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)
    return Similarity(measure, scenes)(copies).diagonal().numpy()


def quantiles(values: np.ndarray, levels: tuple[float, ...]) -> dict[str, float]:
    return {f"{100 * level:g}%": round(float(np.quantile(values, level)), 4) for level in levels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--similarity", default="pixels", help="pixels, sscd, clip or dino")
    parser.add_argument("--scenes", type=int, default=200, help="fresh scenes for each memorized one")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    values, copies = fresh(args.similarity, args.scenes), autoencoded(args.similarity)
    found = {
        "similarity": args.similarity,
        "scenes": len(values),
        "quantiles": quantiles(values, (0.5, 0.9, 0.99, 0.999, 1.0)),
        "autoencoded": quantiles(copies, (0.0, 0.1, 0.5, 0.9)),
    }
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
