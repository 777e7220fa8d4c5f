"""Methods against memorization, side by side: `table` has them all by name, `chosen` also those of a user's own files.

Each is a `Method`, or has its `sample`. Ours differ in their `Guidance` alone; a peer is a module that makes one. All go
through the same sampler, so their images and their cost compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from basinescape import At, Calibration, FirstMinimum, Guidance, Settled

from ..scenario import Scenario
from . import attention, augment, cads, embedding, noise, padding, update
from .dryrun import DryRun
from .method import Batch, Method
from .own import Sampling, from_file

__all__ = ["DEFAULT", "Batch", "DryRun", "Method", "Sampling", "chosen", "label", "table"]

DEFAULT = ("cfg", "delayed-at", "opposite-at", "guard")  # where nobody chooses
SHAPES = ("linear", "invlinear", "cosine", "sine", "v_shape", "a_shape")

# Names as a reader knows them; {} is the static transition's timestep.
LABELS = {
    "cfg": "plain guidance",
    "guard": "guard",
    "guard-calibrated": "guard, calibrated",
    "delayed-at": "delayed until t = {:g}",
    "delayed-minimum": "delayed until the first minimum",
    "delayed-settled": "delayed until settled",
    "opposite-at": "opposite -2 until t = {:g}",
    "opposite-minimum": "opposite until the first minimum",
    "opposite-dryrun": "opposite, dry run",
    **{f"shape-{shape}": f"weight {shape.replace('_', ' ')}" for shape in SHAPES},
    "cads": "CADS",
    "random-words": "random words in the prompt",
    "random-numbers": "random numbers in the prompt",
    "repeated-words": "repeated words in the prompt",
    "embedding": "embedding optimised (Wen et al.)",
    "attention": "attention re-weighted (Ren et al.)",
    "padding": "padding masked",
    "noise": "initial noise adjusted (Han et al.)",
    "update-norm": "stable region (Huang et al.)",
}


def label(name: str, transition: float) -> str:
    """What a reader calls the method `name` where the static transition is at the timestep `transition`."""
    return LABELS.get(name, name).format(transition)


def table(scenario: Scenario) -> dict[str, Sampling]:
    """All methods by name, as `scenario` parametrises them."""
    scale = scenario.scale
    at, minimum, plain = At(scenario.transition), FirstMinimum(), Guidance.cfg(scale)
    delayed = Guidance.delayed(scale, until=at)
    measured = {}
    if scenario.ordinary:
        measured["delayed-settled"] = Method(Guidance.delayed(scale, until=Settled.over(scenario.ordinary)))
    if scenario.stable:
        measured["update-norm"] = update.method(scale, scenario.stable)
    if scenario.calibration:
        measured["guard-calibrated"] = Method(Guidance.guard(scale, Calibration.load(scenario.calibration)))
    return {
        "cfg": Method(plain),
        "guard": Method(Guidance.guard(scale)),
        "delayed-at": Method(delayed),
        "delayed-minimum": Method(Guidance.delayed(scale, until=minimum)),
        "opposite-at": Method(Guidance.opposite(2.0, scale=scale, until=at)),
        "opposite-minimum": Method(Guidance.opposite(scale, scale=scale, until=minimum)),
        "opposite-dryrun": DryRun(scale, opposite_scale=scale),
        **{f"shape-{name}": Method(Guidance.cfg(scale, shape=name)) for name in SHAPES},
        "cads": cads.method(plain),
        "random-words": augment.method(plain, augment.random_words),
        "random-numbers": augment.method(plain, augment.random_numbers),
        "repeated-words": augment.method(plain, augment.repeated_words),
        "embedding": embedding.method(plain, scenario.ordinary[0] if scenario.ordinary else None),
        "attention": attention.method(plain),
        "padding": padding.method(plain),
        "noise": noise.method(scale, scenario.steps),
        **measured,
    }


def chosen(scenario: Scenario, names: Sequence[str] | None = None) -> dict[str, Sampling]:
    """The methods that `names` ask for: names of `table`, "all", or FILE.py:NAME, called FILE.NAME then; None: DEFAULT.

    Raises ValueError for a name that there is not or that comes twice, FileNotFoundError for a file.
    """
    known, found = table(scenario), {}
    if names is None:
        return {name: known[name] for name in DEFAULT if name in known}
    for name in chain.from_iterable(known if asked == "all" else [asked] for asked in names):
        file, _, attribute = name.rpartition(":")
        own = file.endswith(".py")
        if not own and name not in known:
            why = " without a calibration" if name == "guard-calibrated" else ""
            raise ValueError(f"methods must be all, FILE.py:NAME, or among {', '.join(known)}; got {name!r}{why}")
        called = f"{Path(file).stem}.{attribute}" if own else name
        if called in found:
            raise ValueError(f"methods has {called!r} twice")
        found[called] = from_file(Path(file), attribute) if own else known[name]
    return found
