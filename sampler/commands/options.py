"""Options that commands share: their names and help, and the sampler that they make together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from .. import Calibration, Sampler

Model = Annotated[str, typer.Option(help="a folder in diffusers' format, a hub id, or 'tiny' or 'flow', which ship")]
Scheduler = Annotated[
    str | None, typer.Option(help="own (the model's), ddim, dpmsolver++, euler, unipc, ...; default as calibrated, else own")
]
Seed = Annotated[int, typer.Option(help="seed of the first prompt, counted up from there")]
BatchSize = Annotated[
    int | None, typer.Option(help="images sampled together; default what the GPU's memory holds, 16 on a CPU")
]
Attention = Annotated[str, typer.Option(help="sdpa or xformers")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default float16 on a GPU")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")]
AllowPickle = Annotated[bool, typer.Option(help="load weights that are not safetensors; they can run code")]
Compile = Annotated[bool, typer.Option(help="compile the network first; takes minutes, pays for many images")]
Capture = Annotated[bool, typer.Option(help="record each step as a CUDA graph")]
Option = Annotated[
    list[str] | None,
    typer.Option(help="of the pipeline's own call, as height=768 or max_sequence_length=128; may be repeated"),
]
OnError = Annotated[
    str, typer.Option(help="what a prompt, caption or training image that is wrong does: stop, or skip, which leaves it out")
]
Progress = Annotated[bool, typer.Option(help="show a progress bar")]
Similarity = Annotated[
    list[str] | None,
    typer.Option(help="pixels, sscd, dino or clip; may be repeated; default all that are installed"),
]
Threshold = Annotated[float | None, typer.Option(help="similarity above which an image is a copy; default each measure's own")]
EXAMPLES = {"option": "height=768", "rule_option": "phi=0.5"}


def found(model: str, calibration: str | None) -> Calibration | None:
    """The calibration that is given, or that lies beside the model; None without one."""
    from .. import Calibration

    path = calibration or Calibration.beside(model)
    return None if path is None else Calibration.load(path)


def of_enough(known: Calibration | None, given: str | None) -> Calibration | None:
    """The calibration for thresholds; None where nobody gave it and its pictures are too few for them, which is said."""
    from ..calibration.calibration import FEW

    if known is None or given or known.images >= FEW:
        return known
    typer.echo(
        f"the model's calibration is of {known.images} pictures, and thresholds need {FEW}: it is left out; calibrate again "
        "with more prompts and --force",
        err=True,
    )
    return None


def sampler(
    model: str,
    known: Calibration | None,
    scheduler: str | SchedulerMixin | None,
    option: Sequence[str] | None,
    height: int | None = None,
    width: int | None = None,
    **loading: Any,
) -> Sampler:
    """The sampler that the options ask for; scheduler, size and options of the call that they leave open are as calibrated."""
    from .. import Sampler

    made = Sampler.from_pretrained(model, scheduler=scheduler_of(scheduler, known), **loading)
    settings = {} if known is None else known.settings
    if known is not None:
        how = f"{known.steps} steps, scale {known.scale:g}, {type(made.scheduler).__name__}"
        typer.echo(f"calibrated: what no option says is as in the model's calibration ({how})", err=True)
    given = {"height": height, "width": width, **of_call(option)}
    calibrated = dict(zip(("height", "width"), settings.get("size", ()), strict=False)) | settings.get("options", {})
    return made.using(**calibrated | {name: value for name, value in given.items() if value is not None})


@contextmanager
def going_on(out: Path) -> Iterator[None]:
    """Inside, Ctrl-C exits with 130 and a word about how the work goes on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what was done is in {out}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    TITLE: ClassVar = "Model"
    model: Model = "tiny"
    scheduler: Scheduler = None
    option: Option = None
    dtype: Dtype = None
    device: Device = None
    allow_pickle: AllowPickle = False

    @property
    def loading(self) -> dict[str, Any]:
        """What `Sampler.from_pretrained` is given by name."""
        return {"allow_pickle": self.allow_pickle, "device": self.device, "dtype": self.dtype}


def scheduler_of(given: str | SchedulerMixin | None, known: Calibration | None) -> str | SchedulerMixin:
    """The scheduler that is given, else the calibration's, else the model's own."""
    if given is not None or known is None:
        return given or "own"
    return known.scheduler or "own"


def named(option: str, given: Sequence[str] | None, read: Callable[[str], Any]) -> dict[str, Any]:
    """What an option that may be repeated says, given as name=value. Raises ValueError for what is no such thing."""
    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        try:
            if not (name and equals):
                raise ValueError
            found[name] = read(value)
        except ValueError as error:
            kind = "a number" if read is float else "a value"
            raise ValueError(f"{option} must be a name and {kind}, as {EXAMPLES[option]}; got {text!r}") from error
    return found


def of_call(given: Sequence[str] | None) -> dict[str, Any]:
    """Options of the pipeline's call, given as name=value: JSON, or else text."""

    def read(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return named("option", given, read)
