"""A loop of your own: between your network and your solver, one call of `Escape` a step."""

import torch
from basinescape import At, Escape, Guidance, Sampler
from basinescape.hosts.own_loop import judge
from diffusers import DDIMScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(Sampler.model_path("tiny"), use_safetensors=True)
cond, uncond = pipe.encode_prompt("a picture of a cat signed by arno", "cpu", 1, True)
solver = DDIMScheduler.from_config(pipe.scheduler.config)
solver.set_timesteps(10)


def network(latents, t):
    return pipe.unet(torch.cat([latents, latents]), t, torch.cat([uncond, cond])).sample.chunk(2)


latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))
state = Escape(Guidance.delayed(7.5, until=At(timestep=680)), solver.timesteps, batch=1)
with torch.no_grad():
    for t in solver.timesteps:
        latents = solver.step(state(*network(latents, t)), t, latents).prev_sample
    verdict = judge(lambda x, t: network(x, t[0]), solver, latents, seeds=3)
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample

print("guided from step", state.transition_step.tolist(), "on; looks like a copy", verdict.suspect.tolist())
pipe.image_processor.postprocess(image)[0].save("any_loop.png")
