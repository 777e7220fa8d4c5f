"""Options that commands share: their names, their help, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

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
        """The keyword arguments for `Sampler.from_pretrained`."""
        return {"allow_pickle": self.allow_pickle, "device": self.device, "dtype": self.dtype}


def named(option: str, given: Sequence[str] | None, read: Callable[[str], Any]) -> dict[str, Any]:
    """Return the values of a repeated option, each given as name=value, by name. Raises ValueError for any other form."""
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
    """Return options of the pipeline's call, given as name=value. A value is read as JSON, or else as text."""

    def read(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return named("option", given, read)
