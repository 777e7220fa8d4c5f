"""A method from a user's own file.

It is a file with a `Method` in it, `basinescape evaluate --methods cfg,mine.py:method`. The one below caps what guidance adds.
The noise gap that is recorded, and that transitions are looked for in, stays the model's own:

    import torch
    from basinescape import Guidance
    from basinescape.bench.methods import Method

    def capped(network, batch):  # batch: sampler, prompts, seeds, steps
        def predict(latents, timesteps, branch):  # branch: "uncond", "cond", or "both" after each other
            uncond, cond = network(latents, timesteps, branch).chunk(2)
            return torch.cat([uncond, uncond + (cond - uncond).clamp(-0.1, 0.1)])
        return predict

    method = Method(Guidance.cfg(7.5), wrap=capped)

Anything else that has its `sample`, or a plain function in the place of that, is a method as well.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from basinescape import Output, Sampler


class Sampling(Protocol):
    """What a method must have: an image for each prompt and its seed."""

    def sample(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Output: ...


@dataclass(frozen=True)
class Own:
    """A method from a user's file. digest: of the file, whose images are made again when it has changed."""

    method: Sampling
    digest: str

    def sample(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Output:
        return self.method.sample(sampler, prompts, seeds, steps)

    def check(self, sampler: Sampler, steps: int) -> None:
        getattr(self.method, "check", lambda *_: None)(sampler, steps)


@dataclass(frozen=True)
class Function:
    """A plain function as a method."""

    sample: Callable[[Sampler, Sequence[str], Sequence[int], int], Output]


def from_file(path: Path, name: str) -> Own:
    """The method `name` of the Python file `path`, which is run for it."""
    if not path.is_file():
        raise FileNotFoundError(f"methods file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"basinescape_method_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with the user's file
        raise ValueError(f"methods file {str(path)!r} cannot be run: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"methods file {str(path)!r} has no {name!r}; it has {', '.join(_candidates(module)) or 'no method'}")
    found = getattr(module, name)
    if not hasattr(found, "sample"):
        if isinstance(found, type) or not callable(found):
            raise ValueError(f"{name!r} in {str(path)!r} must be a Method or have its sample, got a {type(found).__name__}")
        found = Function(found)
    return Own(found, hashlib.sha256(path.read_bytes()).hexdigest()[:12])


def _candidates(module: ModuleType) -> list[str]:
    return [
        name for name, value in vars(module).items() if hasattr(value, "sample") and not isinstance(value, type | ModuleType)
    ]
