"""Images for a file of prompts of any length, in one process; start it again after whatever stopped it, and it goes on.

python examples/bulk.py prompts.jsonl out [--model your/model] [--format png|jpg|webp|parquet|webdataset|latents] [--shard 0/8]
"""

import argparse

from basinescape import At, Calibration, Guidance, Sampler
from basinescape.bulk.generate import generate
from basinescape.bulk.settings import Files, Placement, Recipe
from basinescape.data.prompts import Prompts
from basinescape.data.verify import verify
from basinescape.data.writers import FORMATS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", help='JSON Lines {"prompt": "..."}, .csv, .parquet, hf:DATASET, or - for standard input')
parser.add_argument("out", help="the folder of the run")
parser.add_argument("--model", default="tiny", help="a folder in diffusers' format, a hub id, or 'tiny'")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--batch-size", type=int, default=8, help="images sampled together")
parser.add_argument("--format", default="png", choices=FORMATS)
parser.add_argument("--shard", help="i/n: the i-th of n parts of the run, from 0")
given = parser.parse_args()

source = Sampler.model_path(given.model) if given.model == "tiny" else given.model
sampler = Sampler.from_pretrained(source, scheduler="dpmsolver++")
calibration = Calibration.beside(source)
if calibration is None:  # `basinescape calibrate` measures one; without it every prompt is delayed
    guidance = Guidance.delayed(7.5, until=At(timestep=680))
else:
    guidance = Guidance.guard(7.5, Calibration.load(calibration))

summary = generate(
    sampler,
    Prompts(given.prompts, on_error="skip"),  # nothing holds them all
    given.out,
    Recipe(guidance, given.steps),
    given.model,
    Files(given.format, tuple(map(int, given.shard.split("/"))) if given.shard else None),
    Placement(given.batch_size),
)
print(summary)
print(f"still suspect: {summary.ids.get('suspect', [])}, failed: {summary.ids.get('failed', [])}")
if not given.shard:
    for file, what in verify(given.out):
        print(file, what)
