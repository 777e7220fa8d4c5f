"""k-diffusion: a denoiser for its samplers."""

import torch
from basinescape import At, EscapeDenoiser, Guidance, Sampler
from diffusers import StableDiffusionPipeline
from k_diffusion.external import DiscreteEpsDDPMDenoiser
from k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m

pipe = StableDiffusionPipeline.from_pretrained(Sampler.model_path("tiny"), use_safetensors=True)
cond, uncond = pipe.encode_prompt("a picture of a cat signed by arno", "cpu", 1, True)


def network(x, t, cond):
    return pipe.unet(x, t, cond).sample


denoiser = DiscreteEpsDDPMDenoiser(network, pipe.scheduler.alphas_cumprod, quantize=False)
sigmas = get_sigmas_karras(10, denoiser.sigma_min.item(), denoiser.sigma_max.item())
guided = EscapeDenoiser(denoiser, Guidance.delayed(7.5, until=At(timestep=680)))
noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3)) * sigmas[0]
with torch.no_grad():
    latents = sample_dpmpp_2m(guided, noise, sigmas, extra_args={"cond": cond, "uncond": uncond}, disable=True)
    verdict = guided.judge(latents, cond=cond, uncond=uncond, seeds=3)
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample

print("guided from step", guided.transition_step.tolist(), "on; looks like a copy", verdict.suspect.tolist())
pipe.image_processor.postprocess(image)[0].save("kdiffusion.png")
