"""The evaluation: every method on every prompt and seed of a scenario, a line an image, and the table made of the lines.

The output folder gets `run.json` (the settings), `results.jsonl` (a line an image, written when it is done),
`images/<method>/<prompt id>-<seed>.png` and `table.csv`, which `table` makes of `results.jsonl` alone. A run that was stopped
goes on where it was.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from basinescape import Output, Sampler
from basinescape.folder import Journal, open_folder, read_lines, read_settings, save_image, settings_of, whole
from tqdm import tqdm

from ..methods import DryRun, Method
from ..methods import table as method_table
from ..scenario import Prompt, Scenario, limited, prompts
from .measure import Measure
from .metrics import interval

RECORDED = "cfg"  # the method whose noise gaps are kept, for detection


@dataclass(frozen=True)
class Task:
    """One image to make and to measure."""

    method: str
    group: str
    prompt: Prompt
    seed: int

    @property
    def id(self) -> str:
        return f"{self.prompt.id}-{self.seed}"


def evaluate(
    scenario: Scenario,
    methods: Sequence[str],
    out: str | Path,
    seeds: int = 4,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
    first_seed: int = 0,
) -> list[dict[str, Any]]:
    """Run `methods` on `scenario` into the folder `out`; returns the rows of `table.csv`.

    seeds: images a prompt, their seeds counted up from `first_seed`.

    Raises ValueError for an unknown method, a bad number, or a folder that holds another run, before any work.
    """
    known = method_table(scenario)
    for name in methods:
        if name not in known:
            raise ValueError(f"methods must be among {', '.join(known)}; got {name!r}")
    for name, value in (("seeds", seeds), ("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    groups = limited(prompts(scenario), limit)
    measure = Measure(scenario, groups)
    model = Sampler.model_path("tiny") if scenario.model == "tiny" else scenario.model
    sampler = Sampler.from_pretrained(model, device, dtype, scenario.scheduler)
    out = Path(out)
    run = {
        "scenario": json.loads(json.dumps(asdict(scenario))),
        "seeds": seeds,
        "first_seed": first_seed,
        "limit": limit,
        "batch_size": batch_size,
        **settings_of(sampler),
    }
    open_folder(out, run)

    def finished(line: dict[str, Any]) -> tuple[str, str, str] | None:
        return (line["method"], line["group"], f"{line['id']}-{line['seed']}") if image_path(out, line).is_file() else None

    tasks = [
        Task(method, group, prompt, seed)
        for method in methods
        for group, found in groups.items()
        for seed in range(first_seed, first_seed + seeds)
        for prompt in found
    ]
    with Journal(out / "results.jsonl", finished) as journal:
        lines = list(read_lines(out / "results.jsonl"))
        waiting = [task for task in tasks if (task.method, task.group, task.id) not in journal]
        with tqdm(total=len(tasks), initial=len(tasks) - len(waiting), unit="image", disable=not progress) as bar:
            for batch in _batches(waiting, batch_size):
                bar.set_description(batch[0].method)
                for line in _run(sampler, known[batch[0].method], batch, scenario.steps, measure, out):
                    journal.append(line)
                    lines.append(line)
                    bar.update()
    rows = table(lines)
    write_csv(out / "table.csv", rows)
    return rows


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and the lines of a folder that `evaluate` wrote.

    Raises FileNotFoundError or ValueError, naming the folder, where it holds no evaluation or no image yet.
    """
    for name in ("run.json", "results.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"run folder {str(folder)!r} has no {name}")
    run, lines = read_settings(folder), list(read_lines(folder / "results.jsonl"))
    if "scenario" not in run:
        raise ValueError(f"run folder {str(folder)!r} holds no evaluation: its run.json names no scenario")
    if not lines:
        raise ValueError(f"run folder {str(folder)!r} holds no image yet: its results.jsonl is empty")
    return run, lines


def image_path(folder: Path, line: dict[str, Any]) -> Path:
    """Where the image of a line of results.jsonl lies in its run folder."""
    return folder / "images" / line["method"] / f"{line['id']}-{line['seed']}.png"


def _batches(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Tasks of one method and group at a time, which keeps their seconds apart."""
    batch: list[Task] = []
    for task in tasks:
        if batch and (len(batch) == size or (task.method, task.group) != (batch[0].method, batch[0].group)):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def _run(
    sampler: Sampler, method: Method | DryRun, batch: Sequence[Task], steps: int, measure: Measure, out: Path
) -> list[dict[str, Any]]:
    """Make, save and measure one batch."""
    calls = 0

    def count(module, arguments) -> None:
        nonlocal calls
        calls += len(arguments[0])

    hook = sampler.pipe.unet.register_forward_pre_hook(count)
    start = time.perf_counter()
    try:
        made: Output = method.sample(sampler, [task.prompt.text for task in batch], [task.seed for task in batch], steps)
    finally:
        hook.remove()
    seconds = (time.perf_counter() - start) / len(batch)
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
            "network_calls": calls / len(batch),
            "seconds": round(seconds, 4),
        }
        if task.method == RECORDED:
            line["noise_gap"] = [round(gap, 4) for gap in made.noise_gap[i].tolist()]
        path = image_path(out, line)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(made.images[i], path)
        lines.append(line)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and group, from the lines of results.jsonl; intervals are 95% bootstraps over prompts."""
    rows = []
    for method, group in dict.fromkeys((line["method"], line["group"]) for line in lines):
        part = [line for line in lines if (line["method"], line["group"]) == (method, group)]
        ids = [line["id"] for line in part]
        similar = np.array([line["similarity"] for line in part])
        right = [line["concept_ok"] for line in part if line["concept_ok"] is not None]
        low, high = interval([line["memorized"] for line in part], ids)
        rows.append(
            {
                "method": method,
                "group": group,
                "n": len(part),
                "memorized_share": round(float(np.mean([line["memorized"] for line in part])), 4),
                "memorized_low": round(low, 4),
                "memorized_high": round(high, 4),
                "similarity_mean": round(float(similar.mean()), 4),
                "similarity_p95": round(float(np.quantile(similar, 0.95)), 4),
                "concept_share": round(float(np.mean(right)), 4) if right else None,
                "suspect_share": round(float(np.mean([line.get("suspect", False) for line in part])), 4),
                "unmarked_copies": round(
                    float(np.mean([line["memorized"] and not line.get("suspect", False) for line in part])), 4
                ),
                "network_calls": round(float(np.mean([line["network_calls"] for line in part])), 2),
                "seconds": round(float(np.median([line["seconds"] for line in part])), 4),
            }
        )
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
