"""Options that commands share: their names and help, and the sampler that they make together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from basinescape import Sampler

Model = Annotated[str, typer.Option(help="a folder in diffusers' format, a hub id, or 'tiny', which ships")]
Scheduler = Annotated[str, typer.Option(help="own (the model's), ddim, dpmsolver++, euler, unipc, ...")]
Scale = Annotated[float, typer.Option(help="guidance scale")]
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
Progress = Annotated[bool, typer.Option(help="show a progress bar")]
Similarity = Annotated[
    list[str] | None,
    typer.Option(help="pixels, sscd, dino or clip; may be repeated; default all that are installed"),
]
Threshold = Annotated[float | None, typer.Option(help="similarity above which an image is a copy; default each measure's own")]


def found(model: str, calibration: str | None) -> str | Path | None:
    """The calibration that is given, or that lies beside the model; None without one."""
    from basinescape import Calibration

    return calibration or Calibration.beside(model)


def batch_size(sampler: Sampler, given: int | None, height: int | None = None, width: int | None = None) -> int:
    """The batch size that is given, or what the device holds of images of this size."""
    from basinescape import arguments, batches

    pixels = sampler.size(height, width)
    return batches.size(sampler.model, *pixels) if given is None else arguments.at_least_one("batch_size", given)
