"""An InvokeAI node: put the folder `basin_escape`, or a link to it, into `nodes`, and basinescape into InvokeAI's environment.

It denoises Stable Diffusion 1, 2 and XL as InvokeAI's own node does, in its modular way, whatever USE_MODULAR_DENOISE says.
Written against InvokeAI 6.14.2: `app/invocations/denoise_latents.py` and `backend/stable_diffusion`.
"""
