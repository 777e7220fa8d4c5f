"""What a run is asked for: how its pictures are made, how they are written, and where they are computed."""

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
    """How a picture is made whose job does not say otherwise.

    guidance: of jobs that ask for none by name. named: what the others' names mean, see `data.prompts.GUIDANCES`.
    height, width: pixels; None: the model's own size.
    clip_skip: how many of the text encoder's last layers are left out, as in diffusers; of all jobs.

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
        """The guidance that a job asks for. Raises ValueError for a name that the run has no guidance of."""
        if name is None:
            return self.guidance
        if name not in self.named:
            raise ValueError(f"guidance is {name!r}, and the run has {', '.join(self.named) or 'none'} by name")
        return self.named[name]

    def negative_of(self, job: Job) -> str | None:
        return self.negative_prompt if job.negative_prompt is None else job.negative_prompt

    def settings(self) -> dict[str, Any]:
        """What run.json says of it."""
        own = {name: getattr(self, name) for name in ("steps", "height", "width", "clip_skip", "negative_prompt")}
        own |= {"guidance": self.guidance.to_dict()}
        named = {name: one.to_dict() for name, one in sorted(self.named.items())}
        return own | ({"named": named} if named else {})


class Copies(Protocol):
    """What a run's images are compared with: `settings`, for run.json, and what a manifest line says of an image."""

    settings: Mapping[str, Any]

    def __call__(self, image: Any) -> dict[str, Any]: ...


class Duplicates(Protocol):
    """What compares a run's pictures with each other: `settings`, for run.json, and what manifest lines say, by id.

    names: the fields that these may have. Pictures are given as (id, file), in the order of the prompts.
    """

    settings: Mapping[str, Any]
    names: Sequence[str]

    def __call__(self, pictures: Iterable[tuple[str, bytes]]) -> Mapping[str, Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Files:
    """How pictures are written.

    format: "png", "jpg" or "webp" pictures, "latents" in safetensors, or files of many, "parquet" or "webdataset".
    shard:  (i, n): every n-th job from the i-th on, in the folder OUT/shard-i-of-n, whatever the format. The other parts of the
            run may be made elsewhere, see `merge`. None: all jobs.
    captions: put each prompt into a .txt file beside its picture.
    prompt_metadata: whether a picture's own file tells its prompt, seed and settings; that a machine made it, it always tells.
    signer: signs pictures, see `data.signing`.
    copies: what else a manifest line says of its picture, as how near it is to which training image; not on a cluster.
    duplicates: what manifest lines say of pictures beside the others of the set, all of which are read again at each run's end.

    Raises ValueError for what needs pictures, of a format that has none.
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
        """What run.json says of it."""
        own: dict[str, Any] = {"format": self.format, "shard": self.shard and list(self.shard)}
        own |= {"captions": True} if self.captions else {}
        own |= {"prompt_metadata": self.prompt_metadata} if self.format != "latents" else {}
        own |= self.signer.settings if self.signer else {}
        own |= {"training_images": dict(self.copies.settings)} if self.copies else {}
        return own | ({"duplicates": dict(self.duplicates.settings)} if self.duplicates else {})


@dataclass(frozen=True)
class Placement:
    """Where pictures are computed.

    batch_size: how many are denoised together at most, fewer where that spares padding; None: as many as the device holds. The
        last bits of a picture may depend on it, so a run goes on with as many as it began with, `slots` in its run.json. Where
        memory runs short there are fewer, and a grey level may differ.
    load, workers: have the work done on a Ray cluster, by so many workers (None: one a GPU), each of which calls `load` for its
        sampler; that of this process is looked at alone. See `ray`.

    Raises ValueError for another batch size.
    """

    batch_size: int | None = None
    load: Callable[[], Sampler] | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            checks.at_least_one("batch_size", self.batch_size)
