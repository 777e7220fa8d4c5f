"""A sampler's `callback_on_step_end`: what it finds in the pipeline, and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..types import Pipeline

Callback = Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
FOUND = ("_num_timesteps", "_guidance_scale", "_interrupt")  # where a pipeline keeps what callbacks read or set


def check(callback: Callback | None, tensor_inputs: Sequence[str]) -> None:
    """Raise ValueError unless `callback` is a function or None, and both it and the call ask for latents alone."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be a function, got {callback!r}")
    if list(tensor_inputs) != ["latents"]:
        raise ValueError(f"callback_on_step_end_tensor_inputs must be ['latents'], got {tensor_inputs!r}")
    asked = [name for name in getattr(callback, "tensor_inputs", ()) if name != "latents"]
    if asked:
        raise ValueError(
            f"callback_on_step_end {type(callback).__name__} asks for {', '.join(asked)}, which the sampler does not hand out: "
            "guidance that ends early is Guidance's interval, or a factor for each step"
        )


@contextmanager
def found(pipe: Pipeline, calls: int, scale: float) -> Iterator[None]:
    """A context in which `pipe` has diffusers' fields for callbacks: number of network calls, guidance scale, no interrupt."""
    own: dict[str, Any] = pipe.__dict__
    before = {name: own[name] for name in FOUND if name in own}
    for name, value in zip(FOUND, (calls, scale, False), strict=True):
        setattr(pipe, name, value)
    try:
        yield
    finally:
        for name in FOUND:
            own.pop(name, None)
        own.update(before)


def tell(callback: Callback, pipe: Pipeline, call: int, timestep: Tensor, latents: Tensor, scale: float) -> Tensor:
    """Call `callback` after a network call, and return the latents to continue with.

    Raises ValueError where the callback returns anything but latents of the same shape, or sets another guidance scale.
    """
    result = callback(pipe, call, timestep, {"latents": latents})
    result = {} if result is None else result
    if not isinstance(result, dict):
        raise ValueError(f"callback_on_step_end must return a dict or None, got a {type(result).__name__}")
    other = sorted(result.keys() - {"latents"})
    if other:
        raise ValueError(f"callback_on_step_end returned {', '.join(other)}, which the sampler cannot follow: latents alone")
    if (changed := vars(pipe)["_guidance_scale"]) != scale:
        raise ValueError(
            f"callback_on_step_end set the guidance scale to {changed!r}, which the sampler cannot follow: "
            "guidance that varies over time is Guidance's shape and interval"
        )
    returned = result.get("latents", latents)
    if not isinstance(returned, Tensor) or returned.shape != latents.shape:
        got = tuple(returned.shape) if isinstance(returned, Tensor) else f"a {type(returned).__name__}"
        raise ValueError(f"callback_on_step_end must return latents of the shape {tuple(latents.shape)}, got {got}")
    return returned
