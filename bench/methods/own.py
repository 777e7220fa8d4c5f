"""A method from a user's own file: `basinescape evaluate --methods cfg,mine.py:method`, where `method` in mine.py is one of

    a Guidance or a guard, as `Guidance.delayed(7.5, until=At(600))` or `Guidance.guard(7.5, threshold=0.25)`;
    a function (sampler, prompts, seeds) or (sampler, prompts, seeds, steps) that returns an `Output`, as the sampler does, of
    Pillow's images;
    a `Method`, or any object with `sample(sampler, prompts, seeds, steps)`, which returns an `Output`.

A `Method` can change the network, the noise or the prompts of a run. This one caps what guidance adds. The noise gap, which is
recorded and in which transitions are found, is still that of the model's own predictions:

    import torch
    from basinescape import Guidance
    from basinescape.bench.methods import Method

    def capped(network, batch):  # batch: sampler, prompts, seeds, steps
        def predict(latents, timesteps, branch):  # branch: "uncond", "cond", or "both" after each other
            uncond, cond = network(latents, timesteps, branch).chunk(2)
            return torch.cat([uncond, uncond + (cond - uncond).clamp(-0.1, 0.1)])
        return predict

    method = Method(Guidance.cfg(7.5), wrap=capped)
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

from basinescape import Guard, Guidance, Output, Sampler
from PIL import Image

from .method import Method

CONTRACT = (
    "a Guidance or a guard, a function (sampler, prompts, seeds[, steps]) -> Output, "
    "or an object with sample(sampler, prompts, seeds, steps) -> Output"
)


class Sampling(Protocol):
    """The interface of a method: `sample` returns an image for each prompt and its seed."""

    def sample(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Output: ...


@dataclass(frozen=True)
class Own:
    """A method from a user's file. digest: the file's SHA-256, 12 digits; if it has changed, images are made again."""

    method: Sampling
    digest: str

    def sample(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Output:
        """The method's output. Raises TypeError unless it is an `Output` with one image of Pillow's for each prompt."""
        made = self.method.sample(sampler, prompts, seeds, steps)
        images: Any = made.images if isinstance(made, Output) else made
        if not isinstance(images, list) or [isinstance(image, Image.Image) for image in images] != [True] * len(prompts):
            given = f"a list of {len(images)}" if isinstance(images, list) else type(images).__name__
            raise TypeError(f"a method must return an Output of {len(prompts)} images (output='pil'), got {given}")
        return made

    def check(self, sampler: Sampler, steps: int) -> None:
        """Call the method's own `check`, if it has one. Raises ValueError if the method does not suit sampler or steps."""
        getattr(self.method, "check", lambda *_: None)(sampler, steps)


def from_file(path: Path, name: str) -> Own:
    """Run the Python file `path`, and return its method `name`.

    Raises FileNotFoundError for a missing file, ValueError if it cannot be run or `name` is not a method.
    """
    if not path.is_file():
        raise FileNotFoundError(f"methods file {str(path)!r} does not exist")
    module = _run(path)
    if not hasattr(module, name):
        raise ValueError(f"methods file {str(path)!r} has no {name!r}; it has {', '.join(_candidates(module)) or 'no method'}")
    found = _method(getattr(module, name))
    if found is None:
        raise ValueError(f"{name!r} in {str(path)!r} must be {CONTRACT}; got {_described(getattr(module, name))}")
    return Own(found, hashlib.sha256(path.read_bytes()).hexdigest()[:12])


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"basinescape_method_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"methods file {str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with the user's file
        raise ValueError(f"methods file {str(path)!r} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _method(given: Any) -> Sampling | None:
    """A value of a user's file as a method; None if it is not a method."""
    if isinstance(given, Guidance | Guard):
        return Method(given)
    if isinstance(given, type | ModuleType):
        return None
    if hasattr(given, "sample"):
        return given if _takes(given.sample, 4) else None
    if not callable(given):
        return None
    count = next((count for count in (4, 3) if _takes(given, count)), 0)
    return SimpleNamespace(sample=lambda *asked: given(*asked[:count])) if count else None


def _takes(function: Any, count: int) -> bool:
    """Whether a function can be called with `count` positional arguments and no others."""
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _described(given: Any) -> str:
    """A value in words, for an error: its type or, for a function, its arguments."""
    called = given.sample if hasattr(given, "sample") else given
    if inspect.isroutine(called):
        return f"one that is called with {inspect.signature(called)}"
    return f"a {type(given).__name__}"


def _candidates(module: ModuleType) -> list[str]:
    """The names of a module's methods, without functions, because not every function is meant as a method."""
    return [name for name, value in vars(module).items() if not inspect.isroutine(value) and _method(value) is not None]
