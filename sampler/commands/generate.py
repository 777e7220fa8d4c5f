"""`basinescape generate`: an image for every prompt of a file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from . import options
from .guidance import GuidanceOptions, Method
from .quiet import quieten
from .runs import conclude, looked_at, shard_of, spread

EXAMPLE = """
  basinescape generate --model my-model --prompts prompts.jsonl --out set
  where prompts.jsonl has lines such as
  {"prompt": "a cat", "count": 4, "height": 512, "width": 768}"""


class Where(StrEnum):
    """Where samples are made."""

    local = "local"
    ray = "ray"


@dataclass(frozen=True)
class What:
    """Which pictures."""

    TITLE: ClassVar = "What"
    prompts: Annotated[
        str,
        typer.Option(
            help='JSON Lines {"prompt", "id"?, "seed"?, "count"?, "negative_prompt"?, "steps"?, "scale"?, "height"?, '
            '"width"?, "guidance"?}, .json, .csv, .tsv, .parquet, .txt with a prompt a line, each perhaps .gz; hf:DATASET, or -'
        ),
    ]
    count: Annotated[int, typer.Option(help="pictures a prompt: ID, ID-1, ..., of seeds counted up")] = 1
    seed: options.Seed = 0
    height: Annotated[int | None, typer.Option(help="pixels; default as calibrated, else the model's own")] = None
    width: Annotated[int | None, typer.Option(help="pixels; default as calibrated, else the model's own")] = None
    negative_prompt: Annotated[str | None, typer.Option(help="of the prompts that have none of their own")] = None
    on_error: options.OnError = "stop"


@dataclass(frozen=True)
class Model:
    """Which model, and how it is sampled."""

    TITLE: ClassVar = "Model"
    model: options.Model = "tiny"
    steps: Annotated[int | None, typer.Option(help="denoising steps; default as calibrated, else the model's own")] = None
    scheduler: options.Scheduler = None
    clip_skip: Annotated[int | None, typer.Option(help="how many of the text encoder's last layers to leave out")] = None
    option: options.Option = None
    dtype: options.Dtype = None
    device: options.Device = None
    attention: options.Attention = "sdpa"
    allow_pickle: options.AllowPickle = False


@dataclass(frozen=True)
class Output:
    """What is written and shown."""

    TITLE: ClassVar = "Output"
    out: Annotated[Path, typer.Option(help="folder for images, manifest.jsonl and run.json")]
    format: Annotated[str, typer.Option(help="png, jpg, webp, latents, or many a file: parquet, webdataset")] = "png"
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n parts, from 0, in OUT/shard-i-of-n; see merge")] = None
    training_images: Annotated[
        Path | None, typer.Option(help="folder: each image's nearest one there goes to the manifest, and copies are marked")
    ] = None
    similarity: options.Similarity = None
    threshold: options.Threshold = None
    log: Annotated[str, typer.Option(help="auto (a bar in a terminal, else lines), plain, json or none")] = "auto"
    metrics: Annotated[int | None, typer.Option(help="port on which Prometheus finds the same numbers")] = None
    metrics_host: Annotated[str, typer.Option(help="address of that port; 0.0.0.0: reached from other machines")] = "127.0.0.1"
    progress: Annotated[bool, typer.Option(help="--no-progress is --log none")] = True


@dataclass(frozen=True)
class Speed:
    """Where it runs, and how fast."""

    TITLE: ClassVar = "Speed"
    batch_size: options.BatchSize = None
    compile: options.Compile = False
    capture: options.Capture = False
    engine: Annotated[Where, typer.Option(help="local, or ray: a worker on every GPU of the cluster")] = Where.local
    workers: Annotated[int | None, typer.Option(help="with --engine ray; default one a GPU")] = None


def generate(what: What, model: Model, guidance: GuidanceOptions, output: Output, speed: Speed) -> None:
    """Make an image for every prompt of a file. The same command goes on where it was stopped, and after prompts were added."""
    from ..data.prompts import Prompts

    shard, shown = shard_of(output.shard), looked_at(output.log, output.metrics, output.metrics_host, output.progress)
    jobs = Prompts(what.prompts, what.seed, what.on_error, what.count)
    quieten()
    from ..bulk.generate import generate
    from ..bulk.settings import Files, Placement, Recipe

    guidance.check()
    files = Files(output.format, shard, _copies(output, what.on_error))
    known = options.found(model.model, guidance.calibration)
    loading: dict[str, Any] = {"allow_pickle": model.allow_pickle, "compile": speed.compile, "capture": speed.capture}
    load, device, dtype, scheduler = None, model.device, model.dtype, options.scheduler_of(model.scheduler, known)
    if speed.engine == Where.ray:
        load, device, dtype = spread((model.model, device, dtype, scheduler, model.attention), loading, speed.workers)
    loading |= {"device": device, "dtype": dtype, "attention": model.attention}
    sampler = options.sampler(model.model, known, scheduler, model.option, what.height, what.width, **loading)
    steps, scale = options.steps_and_scale(sampler, known, model.steps, guidance.scale)
    names = {Method(kind.guidance) for kind in jobs.kinds if kind.guidance}
    own, named = guidance.plans(sampler, known, steps, scale, names)
    recipe = Recipe(own, steps, negative_prompt=what.negative_prompt, clip_skip=model.clip_skip, named=named)
    placement = Placement(speed.batch_size, load, speed.workers)
    conclude(generate(sampler, jobs, output.out, recipe, model.model, files, placement, shown), output.out)


def _copies(output: Output, on_error: str) -> Any:
    """What pictures are compared with; None where no training images are given."""
    if output.training_images is None:
        return None
    from ..audit.index import Copies
    from ..data.pictures import images_in

    folder = output.training_images
    return Copies(folder, images_in(folder), output.similarity or None, output.threshold, on_error)
