"""A run: prompts in, a folder of images out, with a manifest that grows as images are finished.

The folder gets the images (see `writers`), `manifest.jsonl` (a line per image), `jobs.jsonl` (all images that are asked for)
and `run.json` (all that is needed to make them again). To resume a stopped run, start it again with the same settings; prompts
may be added. A resumed run reads each image and compares it with its SHA-256. Images that failed, or that are missing or
changed, are made again. Memory never holds all prompts, lines or images.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.prompts import Job, Prompts
from ..data.writers import Writer, writer_of
from ..guidance.guard import Guard
from ..models import memory
from ..runs.environment import own_numbers
from ..runs.jsonl_journal import Journal
from ..runs.jsontext import json_bytes
from ..runs.manifest import MANIFEST, note
from ..runs.progress import Progress, Summary
from ..runs.provenance import weights_sha256
from ..runs.run_folder import differences, open_folder, read_settings
from ..sampler import Sampler
from .cost_forecast import Forecast
from .executor import Executor, LocalExecutor
from .job_order import JobShare, Placed, by_size, grown
from .job_plans import Plans
from .settings import Duplicates, Files, Placement, Recipe
from .stop import Stop

log = logging.getLogger(__name__)
# Settings that may differ in a run that goes on: prompts may be added, and `_grown` compares guidance.
GROWING = ("prompts", "prompts_sha256", "guidance", "named")


@own_numbers()
def generate(
    sampler: Sampler,
    prompts: Prompts | str | Path | Sequence[Job | str],
    out: str | Path,
    recipe: Recipe,
    model: str | None = None,
    files: Files = Files(),
    placement: Placement = Placement(),
    progress: bool | Progress = True,
) -> Summary:
    """Make every job's image in the folder `out`; returns a summary.

    prompts: a file, or a list of prompts or jobs. recipe: how pictures are made. files: how they are written.
    model: what run.json calls the sampler's model; None: where it was loaded from. placement: where pictures are computed.
    progress: whether to show progress, or a display for it.

    A job's own steps, scale, size, negative prompt and guidance override the recipe's. Jobs of one size are made together, see
    `job_order.by_size`. An image depends on the number of slots, but on no other job (without a guard, up to rounding).

    A manifest line has what was asked (id, prompt, seed, the job's own settings, and further columns of the prompts' file),
    `transition_step`, `transition_timestep`, `transition_log_snr`, `noise_gap`, and `status`: "ok" if the image was written and
    its pixels were finite, else "failed: " and the reason. The line of an image also has its `file` and `sha256`, and how it
    was made; see `Plans.facts`. Under a guard it has `attempts`, `score` and `suspect`. Some fields are there only if they
    apply: `nsfw_content_detected` if the pipeline has a safety checker; `truncated`, the text that was cut off, if a prompt
    exceeded the text encoder's limit; `retried` if the sample was not finite and was made again in float32. Scores are of
    latents. `judge` scores the decoded picture, so its score differs, near the threshold by up to 0.2.

    A fault of one sample costs only that sample: its line says so, and the next start of the run makes it again. If the prompts
    cannot be read to their end, or change meanwhile, the images of the prompts before are finished, and then the error is
    raised; prompts that are added meanwhile are left to the next start. After SIGINT or SIGTERM the samples in flight are
    finished and no more begun; a second signal ends the run at once.

    Raises ValueError, before any sampling: for bad settings; for a job that cannot be made, naming its place (with the prompts'
    on_error "skip" it is left out); for a folder that holds something else, a run of other settings, or a run of prompts that
    are not the first of these. Raises ImportError for a format whose library is missing, and OSError if the disk is full,
    after which the run can be resumed. Logs a warning for a guard that was calibrated on another model or size.
    """
    prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
    if files.copies is not None and placement.load is not None:
        raise ValueError("copies are looked for among pictures that this process makes, not on a cluster")
    options = dict(sampler.options)
    sampler = sampler.using(recipe.height, recipe.width, clip_skip=recipe.clip_skip)  # raises for what the model cannot do
    height, width = sampler.size()
    recipe = replace(recipe, height=height, width=width)
    model = sampler.source if model is None else model
    plans = Plans(sampler, recipe, model)
    prompts.check(plans.of)
    _compare_calibrations(sampler, recipe)
    out = files.folder(out)
    writes = writer_of(out, files.settings())
    slots = _slots(out, placement, plans, prompts)
    settings = {"model": model, "slots": slots, **_settings(sampler, recipe, files, prompts, options)}
    open_folder(out, settings, GROWING, partial(_grown, out, settings, prompts))
    executor = _executor(plans, slots, files, placement)
    shown = progress if isinstance(progress, Progress) else Progress("auto" if progress else "none")
    part, forecast = JobShare(prompts, files.shard), Forecast(plans, prompts.kinds, files.format == "latents", out, shown)
    _fill(writes, files, executor, part, plans, forecast, shown)
    if part.fault is not None:
        raise part.fault
    return shown.summary


def _settings(sampler: Sampler, recipe: Recipe, files: Files, prompts: Prompts, options: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json says of a run beside its model's name and slots. options: the sampler's, before the recipe's."""
    own = {"options": options} if options else {}
    made_by = {"weights": weights_sha256(sampler.pipe), **sampler.provenance}
    return {**recipe.settings(), **files.settings(), **own, **prompts.settings, **made_by}


def _compare_calibrations(sampler: Sampler, recipe: Recipe) -> None:
    """Log a warning for each guard of a run that was calibrated on another model or size."""
    for guidance in (recipe.guidance, *recipe.named.values()):
        if isinstance(guidance, Guard):
            sampler.measured_on(guidance.model, guidance.size)


def _executor(plans: Plans, slots: int, files: Files, placement: Placement) -> Executor:
    if placement.load is None:
        return LocalExecutor(plans, slots, files)
    from .ray import RayExecutor

    return RayExecutor(plans, slots, files, placement)


def _fill(
    writes: Writer, files: Files, executor: Executor, part: JobShare, plans: Plans, forecast: Forecast, shown: Progress
) -> None:
    """Make the images that a run's folder lacks."""
    with Journal(writes.out / MANIFEST, writes.finished) as journal, shown, Stop() as stop, closing(executor):
        part.record(writes.out)

        def waiting() -> Iterator[Placed]:
            for position, job in part.recorded(writes.out):
                if job.id not in journal:
                    yield position, replace(job, negative_prompt=plans.recipe.negative_of(job))

        def keep(lines: Iterable[dict[str, Any]]) -> None:
            journal.append(*lines)
            for line in lines:
                shown.update(line, executor.calls)

        shown.begin(len(part), len(journal), part.prompts.skipped)

        def stepped(under_way: float) -> None:
            shown.moved(under_way)
            forecast.step()

        try:
            for made in executor.made(forecast.first_of(by_size(waiting(), plans.size)), stop, stepped):
                keep(writes.add(files.signer(made) if files.signer else made))
        except OSError:  # such as that of a full disk, which takes no more files
            raise
        except Exception:
            keep(writes.flush())
            raise
        keep(writes.flush())
        shown.summary.signal = stop.signal if shown.summary.left else None
        if files.duplicates is not None and shown.summary.signal is None:
            shown.summary.mark("duplicates", _note(writes, files.duplicates))
        writes.finish()


def _note(writes: Writer, duplicates: Duplicates) -> list[str]:
    """Compare a folder's pictures with each other and write the notes into its manifest; returns the ids of near-duplicates."""
    notes = duplicates(image for path in writes.files() for image in writes.contents(path))
    writes.note(notes, duplicates.names)
    note(writes.out, notes, duplicates.names)
    return [id for id, said in notes.items() if "duplicate_of" in said]


def _grown(out: Path, settings: Mapping[str, Any], prompts: Prompts, known: Mapping[str, Any]) -> None:
    """Raises ValueError unless the settings differ from a folder's `known` ones only because prompts were added."""

    def decisive(run: Mapping[str, Any]) -> dict[str, Any]:
        """The known guidances without what no picture depends on and earlier versions did not record."""

        def own(one: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in one.items() if name not in ("model", "size")}

        named = {name: own(one) for name, one in run.get("named", {}).items() if name in known.get("named", {})}
        return {"guidance": own(run["guidance"]), "named": named}

    if said := differences(decisive(known), decisive(json.loads(json_bytes(settings)))):  # as run.json reads back
        raise ValueError(f"output folder {str(out)!r} holds another run ({said}): choose another")
    if known["prompts_sha256"] != prompts.sha256:
        grown(out, known, prompts)


def _slots(out: Path, placement: Placement, plans: Plans, prompts: Prompts) -> int:
    """Return the number of slots: the one that the folder's run began with, else as many as the placement and the device allow.

    Raises ValueError if the run began with more than the placement's batch size.
    """
    if placement.batch_size is None:
        sizes = (plans.size(kind) for kind in prompts.kinds)
        most = memory.batch_size(plans.sampler.model, *max(sizes, key=math.prod))
    else:
        most = placement.batch_size
    wanted = balanced(most, len(prompts))
    known = read_settings(out).get("slots") if (out / "run.json").is_file() else None
    if known is None or known == wanted:
        return wanted
    if placement.batch_size is not None and known > most:
        raise ValueError(
            f"{str(out)!r} holds a run of {known} samples at a time, on which its images depend; got batch_size {most}"
        )
    if known < wanted:
        log.warning("the run goes on with %d samples at a time, as it began; a new one would have %d", known, wanted)
    return known


def balanced(most: int, jobs: int) -> int:
    """Return a number of slots, at most `most`, that the jobs fill evenly: for 9 jobs and 8 slots it is 5, filled twice."""
    return math.ceil(jobs / math.ceil(jobs / most)) if jobs else most
