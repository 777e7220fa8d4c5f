"""A stock diffusers pipeline: only `escape` is put around its call."""

import torch
from basinescape import FirstMinimum, Guidance, Sampler, escape
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(Sampler.model_path("tiny"), use_safetensors=True)
guidance = Guidance.opposite(2.0, scale=7.5, until=FirstMinimum(latest=6))
prompts = ["a picture of a cat signed by arno", "a picture of a frog"]


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (3, 1)]


with escape(pipe, guidance) as run:
    images = pipe(prompts, num_inference_steps=10, generator=generators()).images

print("guided from step", run.transition_step.tolist(), "on; noise gaps of the first steps", run.noise_gap[:, :3])
print("looks like a copy", run.judge().suspect.tolist())
images[0].save("pipelines.png")

with escape(pipe, Guidance.guard(7.5)) as run:  # plain guidance; what looks like a copy begins again
    images = pipe(prompts, num_inference_steps=10, generator=generators()).images

print("attempts", run.attempts.tolist(), "scores", run.score.tolist(), "still suspect", run.suspect.tolist())
