"""The evaluation: run every method on every prompt and seed of a scenario, measure each image, and write a table.

The output folder gets `run.json` (the settings), `results.jsonl` (one line for each image, written when it is done),
`images/<method>/<prompt id>-<seed>.png` and `table.csv`, which `table` computes from `results.jsonl` alone. The same command
continues a run that was stopped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from basinescape import Output, Sampler, checks
from basinescape.data.pictures import images_in
from basinescape.data.tables import write_csv
from basinescape.runs.atomic import files_sha256, save_image
from basinescape.runs.batch_retry import halving
from basinescape.runs.jsonl_journal import Journal, read_lines
from basinescape.runs.provenance import weights_sha256
from basinescape.runs.run_folder import open_folder, read_settings
from torch import nn
from tqdm import tqdm

from ..methods import Sampling, chosen, own_methods, suitable
from ..scenario import Prompt, Scenario, limited, loaded, prompts
from .measure import Measure
from .metrics import interval

log = logging.getLogger(__name__)

RECORDED = "cfg"  # the method whose noise gaps are written, for detection; those of a user's own methods are written, too
Line = dict[str, Any]  # of results.jsonl


class Task(NamedTuple):
    """One image to make and to measure."""

    method: str
    group: str
    prompt: Prompt
    seed: int


class Incomplete(RuntimeError):
    """Some images failed. rows: the table's rows of the other images."""

    def __init__(self, failed: Sequence[tuple[Task, Exception]], rows: list[dict[str, Any]]):
        task, error = failed[-1]
        why = f"{type(error).__name__}: {error} (method {task.method}, prompt {task.prompt.id}, seed {task.seed})"
        super().__init__(f"{len(failed)} images failed, the last of them: {why}. The same command tries them again")
        self.rows = rows


def evaluate(
    scenario: Scenario,
    methods: Sequence[str] | None,
    out: str | Path,
    seeds: int = 4,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
    first_seed: int = 0,
) -> list[dict[str, Any]]:
    """Run `methods` on `scenario`, write the results into the folder `out`, and return the rows of `table.csv`.

    methods: as for `methods.chosen`. A method that does not suit the sampler is skipped with a warning, unless it is named.
    seeds: images for each prompt; their seeds are counted up from `first_seed`.

    A batch that fails is tried again in halves, so only images that fail alone are missing; then `Incomplete` is raised at
    the end. Raises ValueError, before any work, for no method, an unknown one, a named one that does not suit the sampler, a
    bad number, or a folder that holds another run.
    """
    _check(methods, seeds, limit, batch_size, first_seed)
    own = own_methods(methods or ())
    every = prompts(scenario)
    measure = Measure(scenario, every)
    scenario, sampler = loaded(scenario, device, dtype)
    steps = scenario.how[0]
    known = suitable(chosen(scenario, methods, own), sampler, steps, methods or ())
    groups, out = limited(every, limit), Path(out)
    run = {"scenario": asdict(scenario), "seeds": seeds, "first_seed": first_seed, "limit": limit, "batch_size": batch_size}
    run |= _digests(scenario, every) | {"weights": weights_sha256(sampler.pipe), **sampler.provenance}
    open_folder(out, run)

    def finished(line: Line) -> tuple[str, str, str, int] | None:
        same = line["method"] not in known or line.get("digest") == getattr(known[line["method"]], "digest", None)
        there = same and image_path(out, line).is_file()
        return (line["method"], line["group"], line["id"], line["seed"]) if there else None

    tasks = _tasks(known, groups, range(first_seed, first_seed + seeds))
    make, failed = partial(_made, sampler, known, steps, measure, out), list[tuple[Task, Exception]]()
    with Journal(out / "results.jsonl", finished) as journal:
        lines = list(read_lines(out / "results.jsonl"))
        waiting = [task for task in tasks if (task.method, task.group, task.prompt.id, task.seed) not in journal]
        with tqdm(total=len(tasks), initial=len(tasks) - len(waiting), unit="image", disable=not progress) as bar:
            for batch in _batches(waiting, batch_size):
                bar.set_description(batch[0].method)
                for some, made in halving(make, batch):
                    if isinstance(made, Exception):
                        failed.append((some[0], made))
                    else:
                        journal.append(*made)
                        lines += made
                    bar.update(len(some))
    rows = table(lines)
    if rows:
        write_csv(out / "table.csv", rows)
    if failed:
        raise Incomplete(failed, rows)
    return rows


def _check(methods: Sequence[str] | None, seeds: int, limit: int | None, batch_size: int, first_seed: int) -> None:
    for name, value in (("seeds", seeds), ("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
        checks.at_least_one(name, value)
    if methods is not None and not methods:
        raise ValueError("methods must name at least one")
    checks.at_least("first_seed", first_seed, 0)


def _tasks(methods: Iterable[str], groups: Mapping[str, Sequence[Prompt]], seeds: Iterable[int]) -> list[Task]:
    every = product(methods, groups.items(), seeds)
    return [Task(method, group, prompt, seed) for method, (group, found), seed in every for prompt in found]


def _digests(scenario: Scenario, groups: dict[str, list[Prompt]]) -> dict[str, str]:
    """SHA-256 of prompts, training images, calibration and classifier: files that may change under the same names."""
    prompts = [(group, prompt.id, prompt.text, prompt.concept) for group, found in groups.items() for prompt in found]
    images = {prompt.image for found in groups.values() for prompt in found if prompt.image}
    images |= set(images_in(scenario.folder)) if scenario.folder else set()
    calibration = asdict(scenario.calibrated) if scenario.calibrated else None
    return {
        "prompts_sha256": _sha256(prompts),
        "training_images_sha256": files_sha256(images),
        "calibration_sha256": _sha256(calibration),
        "classifier_sha256": files_sha256(path for path in (Path(scenario.source) / "classifier").glob("*") if path.is_file()),
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def read_run(folder: Path) -> tuple[dict[str, Any], list[Line]]:
    """(settings, lines) of a folder that `evaluate` wrote. Lines are read from results.jsonl, else from results.jsonl.gz.

    Raises FileNotFoundError or ValueError, naming the folder, if it holds no evaluation or no image yet.
    """
    plain, packed = folder / "results.jsonl", folder / "results.jsonl.gz"
    for path, other in ((folder / "run.json", None), (plain, packed)):
        if not path.is_file() and not (other and other.is_file()):
            raise FileNotFoundError(f"run folder {str(folder)!r} has no {path.name}")
    run = read_settings(folder)
    if plain.is_file():
        lines = list(read_lines(plain))
    else:
        with gzip.open(packed, "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    if "scenario" not in run:
        raise ValueError(f"run folder {str(folder)!r} holds no evaluation: its run.json names no scenario")
    if not lines:
        raise ValueError(f"run folder {str(folder)!r} holds no image yet: its results.jsonl is empty")
    return run, lines


def image_path(folder: Path, line: Line) -> Path:
    """The path of the image of a line of results.jsonl in its run folder."""
    return folder / "images" / line["method"] / f"{line['id']}-{line['seed']}.png"


def _batches(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Batches of at most `size` tasks. A batch has one method and group, so that its time is theirs alone."""
    for _, same in groupby(tasks, key=lambda task: (task.method, task.group)):
        part = list(same)
        yield from (part[i : i + size] for i in range(0, len(part), size))


def _made(
    sampler: Sampler, methods: Mapping[str, Sampling], steps: int, measure: Measure, out: Path, batch: Sequence[Task]
) -> list[Line]:
    """Make, save and measure one batch."""
    method, calls = methods[batch[0].method], 0

    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += len(arguments[0])

    hook = sampler.model.net.register_forward_pre_hook(count)
    start = time.perf_counter()
    try:
        made: Output = method.sample(sampler, [task.prompt.text for task in batch], [task.seed for task in batch], steps)
    finally:
        hook.remove()
    seconds = (time.perf_counter() - start) / len(batch)
    digest = getattr(method, "digest", None)
    lines = []
    for i, (task, measured) in enumerate(zip(batch, measure(made.images, [task.prompt for task in batch]), strict=True)):
        line = {
            "id": task.prompt.id,
            "method": task.method,
            "group": task.group,
            "prompt": task.prompt.text,
            "seed": task.seed,
            **measured,
            "transition_step": made.transition_step[i].item(),
            **made.judged(i),
            "network_calls": calls / len(batch) if made.calls is None else made.calls[i].item(),
            "seconds": round(seconds, 4),
        }
        if task.method == RECORDED or digest is not None:
            line["noise_gap"] = [round(gap, 4) for gap in made.noise_gap[i].tolist()]
        if digest is not None:
            line["digest"] = digest
        path = image_path(out, line)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(made.images[i], path)
        lines.append(line)
    return lines


def table(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each method and group, from the lines of results.jsonl; intervals are 95% bootstraps over prompts.

    A column that was not measured is None: the similarity without training images, the concept without a classifier.
    """
    rows = []
    for method, group in dict.fromkeys((line["method"], line["group"]) for line in lines):
        part = [line for line in lines if (line["method"], line["group"]) == (method, group)]
        similar = [line["similarity"] for line in part if line["similarity"] is not None]
        unmarked = [line["memorized"] and not line.get("suspect", False) for line in part if line["memorized"] is not None]
        rows.append(
            {
                "method": method,
                "group": group,
                "n": len(part),
                **_share(part, "memorized", "memorized"),
                "similarity_mean": _rounded(np.mean(similar)) if similar else None,
                "similarity_p95": _rounded(np.quantile(similar, 0.95)) if similar else None,
                **_share(part, "concept_ok", "concept"),
                "suspect_share": _rounded(np.mean([line.get("suspect", False) for line in part])),
                "unmarked_copies": _rounded(np.mean(unmarked)) if unmarked else None,
                "network_calls": round(float(np.mean([line["network_calls"] for line in part])), 2),
                "seconds": _rounded(np.median([line["seconds"] for line in part])),
            }
        )
    return rows


def _share(lines: Sequence[Line], field: str, name: str) -> dict[str, float | None]:
    """The columns of `name`: the share of lines whose `field` is true, and its 95% interval. Lines with None do not count."""
    known = [line for line in lines if line[field] is not None]
    columns = (f"{name}_share", f"{name}_low", f"{name}_high")
    if not known:
        return dict.fromkeys(columns)
    values = [float(line[field]) for line in known]
    found = (float(np.mean(values)), *interval(values, [line["id"] for line in known]))
    return dict(zip(columns, map(_rounded, found), strict=True))


def _rounded(value: float | np.floating) -> float:
    return round(float(value), 4)
