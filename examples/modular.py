"""diffusers' modular pipelines: a guider."""

import torch
from basinescape import BasinEscapeGuidance, FirstMinimum, Guidance
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from small import xl_components

pipe = StableDiffusionXLAutoBlocks().init_pipeline()  # or ModularPipeline.from_pretrained("your/model"), load_components()
pipe.update_components(**xl_components(), force_zeros_for_empty_prompt=True)
guider = BasinEscapeGuidance(Guidance.delayed(7.5, until=FirstMinimum(latest=5)))
pipe.update_components(guider=guider)
generator = torch.Generator().manual_seed(3)
options = {"height": 32, "width": 32, "num_inference_steps": 8, "generator": generator, "output": ["images", "latents"]}
images, latents = pipe(prompt="a cat", **options).values()
verdict = guider.judge(latents, pipe.scheduler, seeds=3)

print("guided from step", guider.run.transition_step.tolist(), "on; looks like a copy", verdict.suspect.tolist())
images[0].save("modular.png")
guider.save_pretrained("guider")  # BasinEscapeGuidance.from_pretrained("guider")
