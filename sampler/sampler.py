"""The sampler users hold: a loaded pipeline, a scheduler, and one call that turns prompts into images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from . import guard, models
from .graphs import Graphs
from .guidance import Guidance
from .kernels.state import State
from .loop import Network, Plan, Run, Step, denoise, fused_step, lockstep, scheduler_step
from .solver import Solver, make_scheduler

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUTPUTS = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Output:
    """What a call returns.

    images:          a list of PIL images, or an array or tensor, as `output` asked; the latents for "latent".
    latents:         (B, C, h, w) final latents in the network's dtype.
    transition_step: (B,) int64 on the CPU, the step at which each sample's guidance changed; -1 for none, 0 for plain cfg.
    noise_gap:       (B, steps) float32 on the CPU, ||cond - uncond||_2 at each step, NaN where it was not computed.
    timesteps:       (steps,) float32 on the CPU, in the scheduler's units.
    restarted:       (B,) bool on the CPU, the samples that a guard has started again; None without a guard.
    """

    images: Any
    latents: Tensor
    transition_step: Tensor
    noise_gap: Tensor
    timesteps: Tensor
    restarted: Tensor | None = None


class Sampler:
    """Guided sampling from a Stable Diffusion (1.x, 2.x) or SDXL pipeline, on the device the pipeline is on.

    One call at a time: a sampler is not to be shared between threads.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        scheduler: str | SchedulerMixin | None = None,
        attention: str = "sdpa",
        compile: bool = False,
        capture: bool = False,
    ):
        models.check(pipe)
        if capture and pipe.device.type != "cuda":
            raise ValueError(f"capture records CUDA graphs, and the pipeline is on {pipe.device}; leave it off there")
        self.scheduler = make_scheduler(scheduler, pipe.scheduler)
        models.set_attention(pipe, attention)
        self.pipe = pipe
        self._networks = models.Networks(pipe.unet, compile, lean=compile or capture)
        self._graphs = Graphs() if capture else None
        self._solvers: dict[int, Solver] = {}

    @classmethod
    def from_pipeline(
        cls,
        pipe: DiffusionPipeline,
        scheduler: str | SchedulerMixin | None = None,
        attention: str = "sdpa",
        compile: bool = False,
        capture: bool = False,
    ) -> Sampler:
        """Use a loaded diffusers pipeline as it is, with its own scheduler unless another is named.

        compile: compile the UNet with torch.compile, channels-last, when it is first used (it takes a while).
        capture: record each step, network and all, as a CUDA graph and replay it; see `close`.
        With either, the UNet also runs as `Lean` has it, and what is loaded into it afterwards may not be seen.

        Raises ValueError for a pipeline, scheduler or attention backend that is not supported.
        """
        return cls(pipe, scheduler, attention, compile, capture)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        scheduler: str | SchedulerMixin | None = None,
        attention: str = "sdpa",
        allow_pickle: bool = False,
        compile: bool = False,
        capture: bool = False,
    ) -> Sampler:
        """Load a pipeline from a folder in diffusers' format or a hub id.

        device: default "cuda" where there is a GPU, else "cpu".
        dtype:  default float16 on a GPU, float32 elsewhere.
        allow_pickle: also load weights that are not safetensors. Pickle can run code: only for sources you trust.
        compile, capture: as for `from_pipeline`.

        Raises ValueError for an unknown or unusable argument, FileNotFoundError for a missing folder.
        """
        device = _device(device)
        dtype = _dtype(dtype, device)
        pipe = models.load(path_or_id, dtype, allow_pickle)
        return cls(pipe.to(device), scheduler, attention, compile, capture)

    @staticmethod
    def model_path(name: str) -> Path:
        """The folder of a pipeline that ships with the project ("tiny"), in diffusers' own format.

        Raises ValueError for another name.
        """
        if name != "tiny":
            raise ValueError(f"name must be 'tiny', got {name!r}")
        return Path(str(files("basinescape.bench"))) / name

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int = 50,
        guidance: Guidance = Guidance.cfg(7.5),
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        output: str = "pil",
        progress: bool = True,
        wrap: Callable[[models.GuidedUNet], Network] | None = None,
    ) -> Output:
        """Sample one image a prompt, all in one batch.

        seeds:  one a prompt, or one for the first prompt, counted up from there. An image depends on (model, prompt, seed,
                settings) alone, never on the batch it is made in.
        height, width: pixels; default the model's own size.
        output: "pil", "np", "pt" or "latent", with diffusers' meaning.
        wrap:   makes of the UNet and its encoded prompts the network to sample from, for methods that change either. Such a
                network is not captured.

        Raises ValueError, before any work, for arguments that are not as described.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a string or a non-empty list of strings, got {prompts!r}")
        seeds = _seeds(seeds, len(prompts))
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * len(prompts)
        elif negative_prompt is not None and len(negative_prompt) != len(prompts):
            raise ValueError(f"negative_prompt has {len(negative_prompt)} entries for {len(prompts)} prompts")
        if not isinstance(guidance, Guidance):
            raise ValueError(f"guidance must be a Guidance, got {guidance!r}")
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        height, width = self.size(height, width)
        solver = self.solver(steps)
        if guidance.watch is not None and (solver.coefficients is None or wrap is not None):
            raise ValueError(
                f"guidance {guidance!r} needs a linear scheduler and no wrap; {type(self.scheduler).__name__} given"
            )
        device = self.pipe.device
        planned = guard.plans if guidance.watch else Plan.make
        plan = planned(solver, guidance, device)

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        inputs = models.encode(self.pipe, prompts, negative_prompt, height, width)
        noise = self.noise(generators, height, width) * solver.init_sigma
        noise = noise.to(device, self.pipe.unet.dtype)
        bar = partial(tqdm, desc="sampling", unit="step", disable=not progress, file=sys.stderr)
        if guidance.watch is not None:
            run = self._guarded(inputs, plan, guidance, noise, bar)
        else:
            run = self._run(inputs, plan, noise, generators, solver.coefficients is not None, bar, wrap)
        latents = run.latents.clone()  # a captured step's memory is used again
        images = latents if output == "latent" else models.decode(self.pipe, latents, output)
        restarted = None if guidance.watch is None else run.restarted.cpu()
        transition = run.transition.cpu()
        transition[transition >= run.gaps.shape[1]] = -1  # settled too late to wait
        return Output(images, latents, transition, run.gaps.cpu(), solver.timesteps, restarted)

    def _run(
        self,
        inputs: dict[str, Any],
        plan: Plan,
        noise: Tensor,
        generators: list[torch.Generator],
        linear: bool,
        bar: Callable[..., Iterable],
        wrap: Callable[[models.GuidedUNet], Network] | None,
    ) -> Run:
        """All steps of `plan`, by the fastest way that `linear` (the solver is coefficients) and `wrap` allow."""
        memory_format = models.memory_format(self.pipe.unet)
        if self._graphs is not None and linear and wrap is None:
            take, state = self._graphs.step(self._networks.fast(inputs), plan, noise, memory_format)
        else:
            network = self._networks.fast(inputs) if wrap is None else wrap(self._networks.plain(inputs))
            state = plan.state(noise, memory_format)
            if linear:
                take = lockstep(network, plan, state)
            else:
                take = scheduler_step(network, plan, state, self.scheduler, generators)
        denoise(take, bar(plan.branches))
        return Run.of(state)

    def _guarded(
        self, inputs: dict[str, Any], plans: tuple[Plan, Plan], guidance: Guidance, noise: Tensor, bar: Callable[..., Iterable]
    ) -> Run:
        memory_format = models.memory_format(self.pipe.unet)

        def begin(network: models.GuidedUNet, plan: Plan, noise: Tensor) -> tuple[Step, State]:
            if self._graphs is not None:
                return self._graphs.step(network, plan, noise, memory_format)
            state = plan.state(noise, memory_format)
            return fused_step(network, plan, state), state

        network = self._networks.fast(inputs)
        return guard.denoise(network, *plans, guidance, noise, begin, bar(plans[0].branches))

    def close(self) -> None:
        """Give back the memory of captured graphs. The sampler can still be used, and captures again."""
        if self._graphs is not None:
            self._graphs.clear()

    def solver(self, steps: int) -> Solver:
        """The scheduler's coefficients over `steps` steps, measured once. Raises ValueError unless 1 <= steps."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
        if steps not in self._solvers:
            self._solvers[steps] = Solver.of(self.scheduler, steps)
        return self._solvers[steps]

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels, by default the model's own; raises ValueError unless the autoencoder can make them."""
        factor, sample = self.pipe.vae_scale_factor, self.pipe.unet.config.sample_size
        own = (sample, sample) if isinstance(sample, int) else sample
        for name, pixels in (("height", height), ("width", width)):
            whole = isinstance(pixels, int) and not isinstance(pixels, bool)
            if pixels is not None and (not whole or pixels < 1 or pixels % factor):
                raise ValueError(f"{name} must be a multiple of {factor} pixels, got {pixels!r}")
        return height or factor * own[0], width or factor * own[1]

    def noise(self, generators: Sequence[torch.Generator], height: int, width: int) -> Tensor:
        """The initial noise before its scale, each sample's from its own generator: (B, C, h, w) float32 on the CPU."""
        factor = self.pipe.vae_scale_factor
        shape = (1, self.pipe.unet.config.in_channels, height // factor, width // factor)
        return torch.cat([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])


def _seeds(seeds: int | Sequence[int], count: int) -> list[int]:
    """One seed a prompt, or a ValueError."""
    seeds = list(range(seeds, seeds + count)) if isinstance(seeds, int) else list(seeds)
    if len(seeds) != count:
        raise ValueError(f"seeds must be as many as prompts: got {len(seeds)} seeds for {count} prompts")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seeds must be whole numbers from 0 to 2**63 - 1, got {seed!r}")
    return seeds


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device such as 'cuda' or 'cpu', got {device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch {torch.__version__} sees no CUDA GPU here; use 'cpu'")
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return found
