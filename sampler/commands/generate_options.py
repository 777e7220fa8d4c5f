"""The options of `basinescape generate`, beside those of its guidance."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from . import options


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
