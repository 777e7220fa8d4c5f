"""The benchmarks and the checks on a GPU at the smallest sizes at which each of their lines runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from basinescape.bench.gpu import cases, checks, checks_sampler
from basinescape.bench.speed import command, engine, images, kernel, shapes, step
from basinescape.bulk import ray
from basinescape.kernels.tiles import Tiles
from tiled import SMALL

Put = Callable[[object, str, object], None]  # setattr, or a test's own that takes it back

LATENTS = {checks.SD: (4, 8, 8), checks.SDXL: (4, 9, 8), checks.SD3: (5, 9, 8), checks.VIDEO: (4, 3, 6, 8)}
KEPT = "one block, first minimum", "one prediction", "tiles, weight known", "tiles, first minimum, SDXL"  # of the modes
MODES = {name: replace(mode, shape=LATENTS[mode.shape]) for name, mode in cases.MODES.items() if name in KEPT}
UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "sample_size": 8,
    "cross_attention_dim": 32,
}
UNETS = {
    "sd15": {**UNET, "attention_head_dim": 4},
    "sdxl": {
        **UNET,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
}
VAE = {
    "block_out_channels": (16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
}


def small_checks(put: Put) -> None:
    """Samples of a few tiles, one dtype and one rule."""
    put(Tiles, "of", SMALL.of)
    put(checks, "MODES", MODES)
    put(checks, "SIZES", ((1,), (5, 7), (4, 8, 8), (4, 9, 8)))
    put(checks, "DTYPES", {torch.float16: 4e-3})
    put(checks, "RULES", ("apg",))
    put(checks, "LAYOUTS", ("channels last", "spread"))


def small_sampler_checks(put: Put) -> None:
    """Two steps and one method."""
    put(checks_sampler, "STEPS", 2)
    put(checks_sampler, "METHODS", {"delayed, first minimum": images.METHODS["delayed, first minimum"]})


def small_benches(put: Put) -> None:
    """One case of each, of every kind of peer; the pipelines of the public shapes become small ones."""
    put(kernel, "SIZES", dict(zip(kernel.SIZES, ((4, 8, 8), (4, 9, 8), (5, 9, 8), (4, 3, 6, 8)), strict=True)))
    put(kernel, "REPEATS", 2)
    fast = kernel.Cases(("SD", "SDXL"), (2,), ("float32",), 2, 0.0, ("SD",))
    put(kernel, "CASES", dict.fromkeys(kernel.CASES, fast))
    put(step, "SHORT", 3)
    put(step, "LONG", 5)
    put(step, "CASES", {name: step.Cases(("ddim",), ((m, s),), (1,), (1, 2), (2, 3), 2) for name, m, s in STEPS})
    put(images, "SIDE", {"cpu": 8, "cuda": 8})
    put(images, "CASES", {name: tuple(small_case(case) for case in found) for name, found in images.CASES.items()})
    put(shapes, "UNETS", UNETS)
    put(shapes, "VAE", VAE)
    put(command, "BATCH", 2)
    put(engine, "SLOTS", 2)
    put(engine, "SECONDS", 0.001)
    put(ray, "ROUNDS", 1)
    put(engine, "JUDGED", 2)
    for name in ("STAND_IN", "TINY", "COMMAND", "OVERHEAD", "BUSY"):
        put(engine, name, (2, 5))
    put(engine, "ROUNDS", dict.fromkeys(engine.ROUNDS, 2))
    put(engine, "MEMORY", dict.fromkeys(engine.MEMORY, (2,)))


STEPS = ("cpu", "tiny", 64), ("cuda", "sdxl", 16), ("quick", "sd15", 16)


def small_case(case: images.Case) -> images.Case:
    return replace(case, steps=3, batches=case.batches[:1], rounds=2)
