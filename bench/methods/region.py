"""The stable region that the method "update-norm" needs, measured on ordinary prompts and added to a model's calibration.

python -m basinescape.bench.methods.region --model tiny
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from basinescape import Calibration, Sampler
from basinescape.calibration.baseline import ordinary_prompts
from basinescape.data.prompts import read_prompts
from basinescape.runs.batch_retry import parts
from basinescape.runs.progress import FORMAT
from tqdm import tqdm

from . import update


def measured(
    sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int, scale: float, size: int = 16
) -> dict[str, list[list[float]]]:
    """Mean and standard deviation of the norms of each plainly guided step. Raises ValueError as `update.alphas`."""
    update.alphas(sampler, steps)
    found = []
    for part in tqdm(parts(len(prompts), size), desc="stable region", unit=" batches", bar_format=FORMAT):
        texts, own = [prompts[i] for i in part], [seeds[i] for i in part]
        found.append(update.measured(sampler, texts, own, steps, scale))
    norms = torch.cat(found, dim=2)
    region = torch.stack([norms.mean(dim=2), norms.std(dim=2)], dim=-1)
    return {name: [[round(v, 4) for v in step] for step in of.tolist()] for name, of in zip(update.NORMS, region, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder with a calibration made with --settled, or tiny or flow")
    args = parser.parse_args()
    path = Calibration.beside(args.model)
    known = path and Calibration.load(path)
    if not path or not known or known.baseline is None:
        parser.error(f"{args.model!r} has no calibration made with --settled")
    sampler = Sampler.from_pretrained(args.model, scheduler=known.scheduler)
    jobs = read_prompts(ordinary_prompts(args.model))
    stable = measured(sampler, [job.prompt for job in jobs], [job.seed for job in jobs], known.steps, known.scale)
    replace(known, baseline=replace(known.baseline, stable=stable)).save(path)


if __name__ == "__main__":
    main()
