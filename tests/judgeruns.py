"""Folders of pictures, judged by `judge`."""

from dataclasses import replace

import numpy as np
from basinescape.auditing.set_verdicts import Settings, judge
from PIL import Image


def kept(root, count=5, sizes=((16, 16), (24, 16))):
    """A folder of pictures with .txt files."""
    root.mkdir()
    rng = np.random.default_rng(1)
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a cat {i}")
    return root


def judged(sampler, images, out, **options):
    settings = replace(options.pop("settings", Settings()), batch_size=options.pop("batch_size", 2))
    return judge(sampler, images, out, settings, "small", **{"progress": False} | options)
