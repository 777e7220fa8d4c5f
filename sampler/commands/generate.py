"""`basinescape generate`: an image for every prompt of a file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from . import options
from .guidance import GuidanceOptions, Method
from .quiet import quieten
from .runs import conclude, looked_at, shard_of, spread

if TYPE_CHECKING:
    from ..bulk.settings import Files

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
    dedup: Annotated[bool, typer.Option(help="mark near-duplicates among the images, too: duplicate_of in the manifest")] = (
        False
    )
    similarity: options.Similarity = None
    threshold: options.Threshold = None
    captions: Annotated[bool, typer.Option(help="put each prompt into a .txt file beside its picture, too")] = False
    prompt_metadata: Annotated[
        bool, typer.Option(help="tell prompt, seed and settings in each picture's XMP, not only that a machine made it")
    ] = True
    c2pa_certificate: Annotated[
        Path | None, typer.Option(help="PEM file with the chain of a certificate: sign each picture's origin by C2PA, too")
    ] = None
    c2pa_key: Annotated[Path | None, typer.Option(help="PEM file with the certificate's private key, without a password")] = (
        None
    )
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
    from ..bulk.settings import Placement, Recipe
    from ..calibration.calibration import steps_and_scale

    guidance.check()
    files = _files(output, shard, what.on_error)
    known = options.found(model.model, guidance.calibration)
    if guidance.method == Method.guard:
        known = options.of_enough(known, guidance.calibration)
    loading: dict[str, Any] = {"allow_pickle": model.allow_pickle, "compile": speed.compile, "capture": speed.capture}
    load, device, dtype, scheduler = None, model.device, model.dtype, options.scheduler_of(model.scheduler, known)
    if speed.engine == Where.ray:
        load, device, dtype = spread((model.model, device, dtype, scheduler, model.attention), loading, speed.workers)
    loading |= {"device": device, "dtype": dtype, "attention": model.attention}
    sampler = options.sampler(model.model, known, scheduler, model.option, what.height, what.width, **loading)
    steps, scale = steps_and_scale(sampler, known, model.steps, guidance.scale)
    names = {Method(kind.guidance) for kind in jobs.kinds if kind.guidance}
    own, named = guidance.plans(sampler, known, steps, scale, names)
    recipe = Recipe(own, steps, negative_prompt=what.negative_prompt, clip_skip=model.clip_skip, named=named)
    placement = Placement(speed.batch_size, load, speed.workers)
    conclude(generate(sampler, jobs, output.out, recipe, model.model, files, placement, shown), output.out, model.model)


def _files(output: Output, shard: tuple[int, int] | None, on_error: str) -> Files:
    """How pictures are written. Raises ValueError for options of which one needs another."""
    from ..bulk.settings import Files
    from ..data.signing import Signer

    given: dict[str, Any] = {"captions": output.captions, "prompt_metadata": output.prompt_metadata}
    folder, measures = output.training_images, (output.similarity or None, output.threshold)
    if folder is not None or output.dedup:
        from ..auditing.index import Copies, Duplicates

        given |= {"copies": Copies(folder, *measures, on_error)} if folder is not None else {}
        given |= {"duplicates": Duplicates(*measures)} if output.dedup else {}
    if (output.c2pa_certificate is None) != (output.c2pa_key is None):
        raise ValueError("c2pa_certificate and c2pa_key need each other: give both, or neither")
    if output.c2pa_certificate is not None and output.c2pa_key is not None:
        given["signer"] = Signer(output.c2pa_certificate, output.c2pa_key, output.format)
    return Files(output.format, shard, **given)
