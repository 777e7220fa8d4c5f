"""`basinescape generate`: an image for every prompt of a file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from . import options
from .guidance import GuidanceOptions, Method
from .quiet import quieten
from .runs import conclude, looked_at, shard_of, spread, stoppable

if TYPE_CHECKING:
    from ..bulk.settings import Files

log = logging.getLogger(__name__)
EXAMPLE = """
  basinescape generate --model my-model --prompts prompts.jsonl --out set
  where prompts.jsonl has lines such as
  {"prompt": "a cat", "count": 4, "height": 512, "width": 768}"""


class Where(StrEnum):
    """Where samples are made."""

    local = "local"
    ray = "ray"


@dataclass(frozen=True)
class Most:
    """What most runs say."""

    TITLE: ClassVar = "Most used"
    prompts: Annotated[
        str,
        typer.Option(
            help=".txt with a prompt a line; .jsonl, .json, .csv, .tsv or .parquet with prompt and perhaps id, seed, count, "
            "negative_prompt, steps, scale, height, width, guidance; each perhaps .gz; hf:DATASET; or -, "
            "standard input, JSON Lines or a prompt a line"
        ),
    ]
    out: Annotated[Path, typer.Option(help="folder for images, manifest.jsonl and run.json")]
    model: Annotated[
        str | None,
        typer.Option(help="a folder in diffusers' format, a hub id, or 'tiny' or 'flow', which ship; default tiny"),
    ] = None
    count: Annotated[int, typer.Option(help="pictures a prompt: ID, ID-1, ..., of seeds counted up")] = 1
    seed: options.Seed = 0
    steps: Annotated[int | None, typer.Option(help="denoising steps; default as calibrated, else the model's own")] = None


@dataclass(frozen=True)
class Pictures:
    """What pictures are like, beside their prompts."""

    TITLE: ClassVar = "Pictures"
    height: Annotated[int | None, typer.Option(help="pixels; default as calibrated, else the model's own")] = None
    width: Annotated[int | None, typer.Option(help="pixels; default as calibrated, else the model's own")] = None
    negative_prompt: Annotated[str | None, typer.Option(help="of the prompts that have none of their own")] = None
    scheduler: options.Scheduler = None
    clip_skip: Annotated[int | None, typer.Option(help="how many of the text encoder's last layers to leave out")] = None
    option: options.Option = None


@dataclass(frozen=True)
class Speed:
    """Where it runs, and how fast."""

    TITLE: ClassVar = "Speed"
    batch_size: options.BatchSize = None
    device: options.Device = None
    dtype: options.Dtype = None
    compile: options.Compile = False
    capture: options.Capture = False
    attention: options.Attention = "sdpa"
    engine: Annotated[Where, typer.Option(help="local, or ray: a worker on every GPU of the cluster")] = Where.local
    workers: Annotated[int | None, typer.Option(help="with --engine ray; default one a GPU")] = None
    allow_pickle: options.AllowPickle = False


@dataclass(frozen=True)
class Copies:
    """Which pictures are marked beside those that a guard finds."""

    TITLE: ClassVar = "Copies"
    training_images: Annotated[
        Path | None, typer.Option(help="folder: each image's nearest one there goes to the manifest, and copies are marked")
    ] = None
    dedup: Annotated[
        bool, typer.Option(help="mark near-duplicates among the images: duplicate_of in the manifest", show_default=False)
    ] = False
    similarity: options.Similarity = None
    threshold: options.Threshold = None


@dataclass(frozen=True)
class Output:
    """What is written, and said meanwhile."""

    TITLE: ClassVar = "Output"
    format: Annotated[str, typer.Option(help="png, jpg, webp, latents, or many a file: parquet, webdataset")] = "png"
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n parts, from 0, in OUT/shard-i-of-n; see merge")] = None
    on_error: options.OnError = "stop"
    captions: Annotated[bool, typer.Option(help="put each prompt into a .txt file beside its picture", show_default=False)] = (
        False
    )
    prompt_metadata: Annotated[
        bool,
        typer.Option(help="tell prompt, seed and settings in a picture's XMP, not only that a machine made it"),
    ] = True
    c2pa_certificate: Annotated[
        Path | None, typer.Option(help="PEM file with the chain of a certificate: sign each picture's origin by C2PA")
    ] = None
    c2pa_key: Annotated[Path | None, typer.Option(help="PEM file with the certificate's key, without a password")] = None
    log: Annotated[str, typer.Option(help="auto (a bar in a terminal, else lines), plain, json or none")] = "auto"
    progress: Annotated[bool, typer.Option(help="--no-progress is --log none", show_default=False)] = True
    metrics: Annotated[int | None, typer.Option(help="port on which Prometheus finds the same numbers")] = None
    metrics_host: Annotated[str, typer.Option(help="address of that port; 0.0.0.0: reached from other machines")] = "127.0.0.1"


def generate(most: Most, guidance: GuidanceOptions, pictures: Pictures, output: Output, copies: Copies, speed: Speed) -> None:
    """Make an image for every prompt of a file. The same command goes on where it was stopped, and after prompts were added."""
    from ..data.prompts import Prompts

    shard, shown = shard_of(output.shard), looked_at(output.log, output.metrics, output.metrics_host, output.progress)
    jobs = Prompts(most.prompts, most.seed, output.on_error, most.count)
    if most.model is None:
        log.warning("no --model is given: the pictures are of 'tiny', a small one that ships, to try things out")
    model = most.model or "tiny"
    with stoppable():
        quieten()
        from ..bulk.generate import generate
        from ..bulk.settings import Placement, Recipe
        from ..calibration.calibration import steps_and_scale

        guidance.check()
        files = _files(output, shard, copies)
        known = options.found(model, guidance.calibration)
        if guidance.method == Method.guard:
            known = options.of_enough(known, guidance.calibration)
        loading: dict[str, Any] = {"allow_pickle": speed.allow_pickle, "compile": speed.compile, "capture": speed.capture}
        load, device, dtype, scheduler = None, speed.device, speed.dtype, options.scheduler_of(pictures.scheduler, known)
        if speed.workers is not None and speed.engine == Where.local:
            raise ValueError(f"workers is {speed.workers}, and this process works alone: give --engine ray, too")
        if speed.engine == Where.ray:
            load, device, dtype = spread((model, device, dtype, scheduler, speed.attention), loading, speed.workers)
        loading |= {"device": device, "dtype": dtype, "attention": speed.attention}
        sampler = options.sampler(model, known, scheduler, pictures.option, pictures.height, pictures.width, **loading)
        steps, scale = steps_and_scale(sampler, known, most.steps, guidance.scale)
        names = {Method(kind.guidance) for kind in jobs.kinds if kind.guidance}
        own, named = guidance.plans(sampler, known, steps, scale, names)
        recipe = Recipe(own, steps, negative_prompt=pictures.negative_prompt, clip_skip=pictures.clip_skip, named=named)
        placement = Placement(speed.batch_size, load, speed.workers)
        conclude(generate(sampler, jobs, most.out, recipe, model, files, placement, shown), files.folder(most.out), model)


def _files(output: Output, shard: tuple[int, int] | None, copies: Copies) -> Files:
    """How pictures are written. Raises ValueError for options of which one needs another."""
    from ..bulk.settings import Files
    from ..data.signing import Signer

    given: dict[str, Any] = {"captions": output.captions, "prompt_metadata": output.prompt_metadata}
    folder, measures = copies.training_images, (copies.similarity or None, copies.threshold)
    if folder is not None or copies.dedup:
        from ..auditing import index

        given |= {"copies": index.Copies(folder, *measures, output.on_error)} if folder is not None else {}
        given |= {"duplicates": index.Duplicates(*measures)} if copies.dedup else {}
    elif measures != (None, None):
        raise ValueError("similarity and threshold compare pictures: give --training-images or --dedup, too")
    if (output.c2pa_certificate is None) != (output.c2pa_key is None):
        raise ValueError("c2pa_certificate and c2pa_key need each other: give both, or neither")
    if output.c2pa_certificate is not None and output.c2pa_key is not None:
        given["signer"] = Signer(output.c2pa_certificate, output.c2pa_key, output.format)
    return Files(output.format, shard, **given)
