"""The settings of a run: how its pictures are made, how they are written, and where they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import checks
from ..data.prompts import Job
from ..data.signing import Signer
from ..guidance.guard import Guard
from ..guidance.guidance import Guidance
from ..sampler import Sampler


@dataclass(frozen=True)
class Recipe:
    """How pictures are made, unless their job says otherwise.

    guidance: for jobs that name none. named: the guidance that jobs may name, by name; see `data.prompts.GUIDANCES`.
    height, width: pixels; None: the model's own size.
    clip_skip: how many of the text encoder's last layers are left out, as in diffusers; the same for all jobs.

    Raises ValueError for guidance of another type.
    """

    guidance: Guidance | Guard
    steps: int = 50
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    clip_skip: int | None = None
    named: Mapping[str, Guidance | Guard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, one in {"guidance": self.guidance, **self.named}.items():
            if not isinstance(one, Guidance | Guard):
                raise ValueError(f"{name} must be a Guidance or a Guard, such as Guidance.guard(), got {one!r}")

    def guidance_of(self, name: str | None) -> Guidance | Guard:
        """Return the guidance that a job names; None: the run's own. Raises ValueError for a name that `named` lacks."""
        if name is None:
            return self.guidance
        if name not in self.named:
            raise ValueError(f"guidance is {name!r}, and the run has {', '.join(self.named) or 'none'} by name")
        return self.named[name]

    def negative_of(self, job: Job) -> str | None:
        return self.negative_prompt if job.negative_prompt is None else job.negative_prompt

    def settings(self) -> dict[str, Any]:
        """Return the recipe's fields of run.json."""
        own = {name: getattr(self, name) for name in ("steps", "height", "width", "clip_skip", "negative_prompt")}
        own |= {"guidance": self.guidance.to_dict()}
        named = {name: one.to_dict() for name, one in sorted(self.named.items())}
        return own | ({"named": named} if named else {})


class Copies(Protocol):
    """Compares an image with others. A call returns fields for the image's manifest line; `settings` go into run.json."""

    settings: Mapping[str, Any]

    def __call__(self, image: Any) -> dict[str, Any]: ...


class Duplicates(Protocol):
    """Compares a run's pictures with each other. A call returns fields for manifest lines, by id; `settings` go into run.json.

    names: the fields that a call may return. Pictures are given as (id, bytes of the file), in the order of the prompts.
    """

    settings: Mapping[str, Any]
    names: Sequence[str]

    def __call__(self, pictures: Iterable[tuple[str, bytes]]) -> Mapping[str, Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Files:
    """How pictures are written.

    format: "png", "jpg" or "webp" pictures, "latents" in safetensors, or files that hold many, "parquet" or "webdataset".
    shard:  (i, n): every n-th job from the i-th on, in the folder OUT/shard-i-of-n, whatever the format. The other parts of the
            run may be made elsewhere, see `merge`. None: all jobs.
    captions: put each prompt into a .txt file beside its picture.
    prompt_metadata: whether a picture's file records its prompt, seed and settings. It always says that a machine made it.
    signer: signs pictures, see `data.signing`.
    copies: compares each picture with others, such as training images, for its manifest line; not on a cluster.
    duplicates: compares the set's pictures with each other for their manifest lines; each run reads all of them at its end.

    Raises ValueError for signer, copies or duplicates with the format "latents", because they need pictures.
    """

    format: str = "png"
    shard: tuple[int, int] | None = None
    captions: bool = False
    prompt_metadata: bool = True
    signer: Signer | None = None
    copies: Copies | None = None
    duplicates: Duplicates | None = None

    def __post_init__(self) -> None:
        for name in ("signer", "copies", "duplicates"):
            if getattr(self, name) is not None and self.format == "latents":
                raise ValueError(f"{name} needs pictures, and format is 'latents': leave one of them out")

    def folder(self, out: str | Path) -> Path:
        return Path(out) / f"shard-{self.shard[0]}-of-{self.shard[1]}" if self.shard else Path(out)

    def settings(self) -> dict[str, Any]:
        """Return these settings' fields of run.json."""
        own: dict[str, Any] = {"format": self.format, "shard": self.shard and list(self.shard)}
        own |= {"captions": True} if self.captions else {}
        own |= {"prompt_metadata": self.prompt_metadata} if self.format != "latents" else {}
        own |= self.signer.settings if self.signer else {}
        own |= {"training_images": dict(self.copies.settings)} if self.copies else {}
        return own | ({"duplicates": dict(self.duplicates.settings)} if self.duplicates else {})


@dataclass(frozen=True)
class Placement:
    """Where pictures are computed.

    batch_size: the most pictures that are denoised together, fewer if that saves padding; None: as many as the device holds.
        The last bits of a picture may depend on it, so a resumed run keeps the number that it began with, `slots` in its
        run.json. If memory runs short, fewer are denoised together, and a grey level may differ.
    load, workers: if `load` is given, a Ray cluster does the work; see `ray`. Each worker calls `load` for its sampler.
        workers: how many; None: one per GPU. This process's sampler then makes no pictures.

    Raises ValueError for a batch size that is not a whole number of at least 1.
    """

    batch_size: int | None = None
    load: Callable[[], Sampler] | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            checks.at_least_one("batch_size", self.batch_size)
