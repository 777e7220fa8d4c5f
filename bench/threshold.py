"""The similarity above which a picture of the small pipeline counts as a copy: `python -m basinescape.bench.threshold`.

The null distribution: fresh scenes, which nobody copied, against the memorized scene of their concept. Needs the glyph font,
as training does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .metrics import Similarity
from .scenes import memorized, scene

FIRST = 2_000_000_000  # seeds that neither training nor the memorized scenes use


def null_distribution(scenes: int) -> np.ndarray:
    """Similarities of `scenes` fresh scenes a memorized scene, all together."""
    found = []
    for i, fixed in enumerate(tqdm(memorized(), desc="scenes")):
        fresh = [scene(fixed.concept, FIRST + scenes * i + k) for k in range(scenes)]
        found.append(Similarity("pixels", [scene(fixed.concept, fixed.seed)])(fresh)[:, 0].numpy())
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=200, help="fresh scenes for each memorized one")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    values = null_distribution(args.scenes)
    levels = {f"{100 * level:g}%": round(float(np.quantile(values, level)), 4) for level in (0.5, 0.9, 0.99, 0.999, 1.0)}
    found = {"scenes": len(values), "quantiles": levels}
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
