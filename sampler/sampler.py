"""The sampler: a loaded pipeline and a scheduler, with one call that turns prompts into images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks, models
from .detection import verdict
from .guidance.guard import PROBES, THRESHOLD, Guard
from .guidance.guidance import Guidance
from .models.fingerprint import mismatches
from .runs.environment import own_numbers
from .runs.provenance import settings_of
from .sampling import callbacks
from .sampling.batch import Runner, Wrap
from .sampling.call import Call, Prompts
from .sampling.cuda_graphs import Graphs
from .sampling.output import Output
from .schedulers.schedule import Schedule, configured, make_scheduler
from .schedulers.solver_coefficients import Solver
from .types import Pipeline, Scheduler

log = logging.getLogger(__name__)


class Sampler:
    """Guided sampling from a diffusers pipeline of one of `models.ADAPTERS`, on the device the pipeline is on.

    A sampler takes one call at a time, so threads must not share it.
    """

    def __init__(
        self,
        pipe: Pipeline,
        scheduler: str | Scheduler | None = None,
        attention: str = "sdpa",
        compile: bool = False,
        capture: bool = False,
    ):
        self.model = models.adapt(pipe, compile, lean=compile or capture)
        if capture and self.model.device.type != "cuda":
            raise ValueError(f"capture records CUDA graphs, and the pipeline is on {self.model.device}; leave it off there")
        self.pipe = pipe
        self._scheduler: tuple[tuple, Scheduler] | None = None  # (state of the pipeline's own, the scheduler made for it)
        self.scheduler = scheduler
        self.model.set_attention(attention)
        self.graphs = Graphs() if capture else None
        self._solvers: dict[tuple, Solver] = {}
        self.wrap: Wrap | None = None
        self._size: tuple[int | None, int | None] = (None, None)
        self.options: dict[str, Any] = {}  # defaults of every call, see `using`
        self._warned: set[tuple[str, str]] = set()  # the calibrations that were warned of, and what was said

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"Sampler({type(self.pipe).__name__} on {self.model.device}, {dtype}, {type(self.scheduler).__name__})"

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler in use: the pipeline's current one, or the chosen one with the pipeline's current configuration."""
        own = self.pipe.scheduler
        if self._scheduler is None or self._scheduler[0] != configured(own):
            self._scheduler = configured(own), make_scheduler(self._choice, own)
        return self._scheduler[1]

    @scheduler.setter
    def scheduler(self, choice: str | Scheduler | None) -> None:
        make_scheduler(choice, self.pipe.scheduler)  # raises for an unknown one
        self._choice, self._scheduler = choice, None

    @classmethod
    def from_pipeline(
        cls,
        pipe: Pipeline,
        scheduler: str | Scheduler | None = None,
        attention: str = "sdpa",
        compile: bool = False,
        capture: bool = False,
    ) -> Sampler:
        """Use a loaded diffusers pipeline as it is, with its own scheduler unless another is named.

        compile: compile the network with torch.compile, channels-last, when it is first used (it takes a while).
        capture: record each step, including the network, as a CUDA graph and replay it; see `close`. The first batch of a shape
                 is recorded. Meanwhile, another thread of the process that waits for a GPU gets an exception.
        With either, a network for which there is a `Lean` form runs in it. The next call sees later changes of the pipeline.

        Raises ValueError for a pipeline, scheduler or attention backend that is not supported.
        """
        return cls(pipe, scheduler, attention, compile, capture)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        scheduler: str | Scheduler | None = None,
        attention: str = "sdpa",
        allow_pickle: bool = False,
        compile: bool = False,
        capture: bool = False,
        **loading: Any,
    ) -> Sampler:
        """Load a pipeline from a folder in diffusers' format, a single file of weights, a hub id, or one that ships, by name.

        device: default "cuda" where there is a GPU, else "cpu".
        dtype:  default float16 on a GPU, float32 elsewhere.
        allow_pickle: also load weights that are not safetensors. Pickle can run code, so use it only for sources you trust.
        compile, capture: as for `from_pipeline`.
        loading: options of diffusers' loader, such as variant="fp16", revision, token, device_map, config (the folder with the
                 configuration for a single file), and parts of the pipeline, such as vae=..., or safety_checker=None.

        Raises ValueError for an unknown or unusable argument, FileNotFoundError for a missing path.
        """
        if loading.get("device_map") is not None and device is not None:
            raise ValueError(f"device is {str(device)!r}, and device_map places the parts: give one of the two")
        device = checks.device(device)
        pipe: Pipeline = models.load(path_or_id, checks.dtype(dtype, device), allow_pickle, **loading)
        if loading.get("device_map") is None:
            pipe = pipe.to(device)
        return cls(pipe, scheduler, attention, compile, capture)

    @staticmethod
    def model_path(name: str) -> Path:
        """The folder of a pipeline that ships with the project, in diffusers' format. Raises ValueError for another name."""
        if name not in (ships := models.shipped()):
            raise ValueError(f"name must be {' or '.join(map(repr, ships))}, got {name!r}")
        return ships[name]

    @own_numbers()
    def __call__(
        self,
        # What is drawn, and how it is guided.
        prompts: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: Guidance | Guard | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        # Size and form of the output.
        height: int | None = None,
        width: int | None = None,
        output: str = "pil",
        progress: bool | Callable[[float], None] = True,
        *,
        # The rest of the schedule.
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        denoising_end: float | None = None,
        mu: float | None = None,
        # The rest of diffusers' pipelines.
        guidance_rescale: float = 0.0,
        callback_on_step_end: callbacks.Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        # How much is computed.
        batch_size: int | None = None,
        stop_after: int | None = None,
        **options: Any,
    ) -> Output:
        """Sample `num_images_per_prompt` images for each prompt; the images of one prompt follow each other.

        seeds:  one for each image, or one for the first image, counted up from there. An image depends only on (model, prompt,
                seed, settings). It does not depend on its batch, except for the rounding of float32 on a CPU.
        steps, guidance: default those of the model's own pipeline, whose guidance is plain.
        negative_prompt: one for all prompts, or one or None for each.
        height, width: pixels; default the model's own size.
        output: "pil", "np", "pt" or "latent", with diffusers' meaning.
        progress: whether to show a bar, or a function that is called after every step with the share of all steps that is done.
                Under a guard only the plain attempts' steps count.
        timesteps, sigmas, eta, denoising_end, mu: see `Schedule`. These, and those down to `latents`, have diffusers' meaning.
        guidance_rescale: above 0, the guidance's rule is "rescale" with this phi; cannot be combined with another rule.
        callback_on_step_end: called after every network call with (pipeline, index, timestep, {"latents": latents}). Latents
                that it returns replace the sampler's, and `pipeline._interrupt = True` ends the steps. Not under a guard.
        latents: initial noise of standard deviation 1, used in place of noise drawn from the seeds: (B, C, h, w), or another
                shape if the model's latents have one.
        batch_size: how many samples are denoised together; None: as many as a GPU's free memory holds, 16 on a CPU, and all
                under a callback or a wrapped network, which see the batch.
        stop_after: take only this many of the steps, to measure their noise gaps. The latents stay noisy. Not under a guard.
        options: arguments of the pipeline's own call, with its names and meaning: clip_skip, prompt_embeds (in place of
                prompts), negative_prompt_embeds, cross_attention_kwargs (such as LoRA's "scale"; with them the network is
                neither compiled nor captured), ip_adapter_image, ip_adapter_image_embeds; SDXL's also pooled_prompt_embeds,
                negative_pooled_prompt_embeds, prompt_2, negative_prompt_2, original_size, crops_coords_top_left, target_size
                and the negatives of these three. `sampler.model.options` lists those of other models, such as
                max_sequence_length, or num_frames of a video model. Texts and embeddings are one for all prompts, or one for
                each; an IP-Adapter's images are for all prompts.

        Raises ValueError, before any work, for arguments that are not as described.
        """
        with torch.inference_mode():
            self.model.check()
            options = self._with(options)
            size = self.size(height, width)
            callbacks.check(callback_on_step_end, callback_on_step_end_tensor_inputs)
            steps = self.model.own_steps if steps is None else steps
            guidance = Guidance.cfg(self.model.own_scale) if guidance is None else guidance
            call = Call(
                Prompts.checked(prompts, seeds, num_images_per_prompt, negative_prompt, options),
                guidance.rescaled(guidance_rescale) if isinstance(guidance, Guidance | Guard) else guidance,
                Schedule(steps, timesteps, sigmas, eta, denoising_end, mu),
                size,
                self.model.shape(*size, **options),
                output,
                latents,
                batch_size,
                stop_after,
                callback_on_step_end,
                self.wrap is not None,
            )
            if isinstance(guidance, Guard):
                self.measured_on(guidance.model, guidance.size, size)
            with nullcontext() if self.graphs is None else self.graphs.used():
                made = self.runner.sampled(call, self.solver(call.schedule, *size, **options), progress)
            self.pipe.maybe_free_model_hooks()
        return Output.joined(made)

    @own_numbers()
    def judge(
        self,
        images: Any,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        threshold: float = THRESHOLD,
        probes: int = PROBES,
        negative_prompt: str | Sequence[str | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> verdict.Verdict:
        """Judge whether finished pictures of any origin look like copies of training images; see `basin_score`.

        images:    latents (B, C, h, w), or in the shape of the model's latents, as `Output.latents`; or pictures, as
                   `Output.images`: a list of PIL images, arrays or tensors of any sizes, or an array or tensor of them; for a
                   video model, lists of frames. The autoencoder encodes pictures first.
        prompts:   the prompt that each picture was made with, or one for all.
        seeds:     seeds of the noises that judge a picture. The seed it was made with gives the score that its guard computed.
                   One for each picture, or one for the first, counted up from there.
        threshold: a picture with a score above it is suspect. probes: noises for each picture, each a call of both branches.
        height, width: the size of the latents, or the size to which all pictures are resized; default their own size, or the
                   nearest size that the model can make. If the proportions differ, a picture is cropped at its centre.
        options:   as for a call, without prompt_embeds. batch_size: how many are judged together; None: as for a call.

        A picture's verdict depends only on (model, picture, prompt, seed, settings). A copy that was scaled, down or up, may
        pass. Raises ValueError for arguments that do not fit, and for a scheduler whose noise levels are not known.
        """
        size, options = self._sized(height, width), self._with(options)
        with torch.inference_mode():
            self.model.check()
            given = prompts, seeds, threshold, probes, negative_prompt, size, batch_size, options
            judged = verdict.judge(self.model, self.scheduler, images, *given)
            self.pipe.maybe_free_model_hooks()
        return judged

    def measured_on(self, model: Mapping[str, Any] | None, of: Sequence[int] | None, size: Sequence[int] | None = None) -> bool:
        """Whether a calibration holds for this model and for pictures of this size, (height, width).

        model, of: the `fingerprint` and the size that it was measured on; None: not known. size: None: `size()`. Logs a warning
        for each of the two that differs, once for each calibration.
        """
        found = mismatches(model or {}, self.pipe, of, size or self.size())
        for _, text in sorted(found - self._warned):
            log.warning(text)
        self._warned |= found
        return not found

    @property
    def runner(self) -> Runner:
        """A `Runner` that denoises batches with the current model, scheduler, graphs and wrap."""
        return Runner(self.model, self.scheduler, self.graphs, self.wrap)

    @property
    def source(self) -> str:
        """Where the pipeline was loaded from: a folder or a hub id; "" where diffusers does not say."""
        return str(getattr(self.pipe, "config", {}).get("_name_or_path", ""))

    @property
    def provenance(self) -> dict[str, Any]:
        """The scheduler, dtype, device and versions on which its images depend, as plain data."""
        return settings_of(self.scheduler, self.model.dtype, self.model.device)

    def wrapped(self, wrap: Wrap) -> Sampler:
        """A copy of the sampler that samples from `wrap(network)`, where `network` holds each call's encoded prompts.

        For methods that change the network or the prompts. Such a network is not captured, and a call with it takes no guard.
        Raises ValueError for what is no function, and if the sampler is wrapped already.
        """
        if not callable(wrap):
            raise ValueError(f"wrap must be a function of a network, got {wrap!r}")
        if self.wrap is not None:
            raise ValueError(f"the sampler samples from {self.wrap!r} already: wrap the sampler that it was made from")
        other = copy.copy(self)
        other.wrap = wrap
        return other

    def using(self, height: int | None = None, width: int | None = None, **options: Any) -> Sampler:
        """A copy of the sampler with this size and these options as defaults; arguments of a call override them.
        Raises ValueError for a size or options that the model cannot have."""
        other = copy.copy(self)
        other._size = self._sized(height, width)
        self.model.check_names(options)
        other.options = self.options | {name: value for name, value in options.items() if value is not None}
        with torch.inference_mode():
            self.model.encode([""], *other.size(), **other.options)
        return other

    def close(self) -> None:
        """Give back the memory of captured graphs. The sampler can still be used, and captures again."""
        if self.graphs is not None:
            self.graphs.clear()

    @own_numbers()
    def solver(self, schedule: int | Schedule, height: int | None = None, width: int | None = None, **options: Any) -> Solver:
        """The scheduler's coefficients over a schedule or a number of steps, from a cache. Raises what `Solver.of` does.

        height, width, options: as for a call, because some models take other noise levels for larger pictures.
        """
        schedule = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
        scheduler = self.scheduler
        schedule = self.model.scheduled(schedule, scheduler, *self._sized(height, width), **{**self.options, **options})
        key = type(scheduler), str(scheduler.config), getattr(scheduler, "shift", None), schedule
        if key not in self._solvers:
            self._solvers[key] = Solver.of(scheduler, schedule)
        return self._solvers[key]

    def _with(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a call, with the sampler's own for those that it does not give. Raises ValueError for unknown ones."""
        self.model.check_names(options)
        return {**self.options, **options}

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels; None: as in `using`, or the model's own. Raises ValueError for one it cannot make."""
        return self.model.size(*self._sized(height, width))

    def _sized(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        return self._size[0] if height is None else height, self._size[1] if width is None else width

    def in_float32(self) -> AbstractContextManager[None]:
        """A context in which every call computes in float32, with the network neither compiled nor captured. It restores the
        weights afterwards, bit for bit. For samples that are not finite in half precision."""
        return self.model.in_float32()
