"""Methods against memorization: `table` returns all by name, `chosen` also takes methods of a user's files (see `own`).

Each is a `Method`, or an object with the same `sample`. The project's own methods differ in their `Guidance` only; for each
other paper a module makes the `Method`. All use the same sampler, so that their images and their cost can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from basinescape import At, FirstMinimum, Guidance, Sampler, Settled

from ..scenario import Scenario
from . import attention, augment, cads, embedding, noise, padding, update
from .dryrun import DryRun
from .method import Batch, Method
from .own import Own, Sampling, from_file

__all__ = ["DEFAULT", "Batch", "DryRun", "Method", "Sampling", "chosen", "label", "own_methods", "suitable", "table"]

log = logging.getLogger(__name__)

DEFAULT = ("cfg", "delayed-at", "opposite-at", "guard")  # the methods that run if none is named
CALIBRATE = {  # methods that need a calibration, and the command that makes it
    "guard-calibrated": "basinescape calibrate --model ...",
    "delayed-settled": "basinescape calibrate --settled --model ...",
    "update-norm": "python -m basinescape.bench.methods.region --model ..., after basinescape calibrate --settled",
}
SHAPES = ("linear", "invlinear", "cosine", "sine", "v_shape", "a_shape")

# The label of each method in tables and figures; {} is the timestep of the static transition.
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
    """The label of the method `name`. transition: the timestep of the static transition."""
    return LABELS.get(name, name).format(transition)


def table(scenario: Scenario) -> dict[str, Sampling]:
    """{name: method} with the scenario's steps, scale, transition and calibration. Methods that need one are absent without."""
    steps, scale, transition = scenario.how
    at, minimum, plain = At(transition), FirstMinimum(), Guidance.cfg(scale)
    known = scenario.calibrated
    baseline = known and known.baseline
    measured: dict[str, Sampling] = {}
    if baseline and baseline.unguided:
        measured["delayed-settled"] = Method(Guidance.delayed(scale, until=Settled.over(baseline.unguided)))
    if baseline and baseline.stable:
        measured["update-norm"] = update.method(scale, baseline.stable)
    if known and known.scale == scale:
        measured["guard-calibrated"] = Method(Guidance.guard(scale, known))
    return {
        "cfg": Method(plain),
        "guard": Method(Guidance.guard(scale)),
        "delayed-at": Method(Guidance.delayed(scale, until=at)),
        "delayed-minimum": Method(Guidance.delayed(scale, until=minimum)),
        "opposite-at": Method(Guidance.opposite(2.0, scale=scale, until=at)),
        "opposite-minimum": Method(Guidance.opposite(scale, scale=scale, until=minimum)),
        "opposite-dryrun": DryRun(scale, opposite_scale=scale),
        **{f"shape-{name}": Method(Guidance.cfg(scale, shape=name)) for name in SHAPES},
        "cads": cads.method(plain),
        "random-words": augment.method(plain, augment.random_words),
        "random-numbers": augment.method(plain, augment.random_numbers),
        "repeated-words": augment.method(plain, augment.repeated_words),
        "embedding": embedding.method(plain, baseline.unguided[0] if baseline and baseline.unguided else None),
        "attention": attention.method(plain),
        "padding": padding.method(plain),
        "noise": noise.method(scale, steps),
        **measured,
    }


def own_methods(names: Sequence[str]) -> dict[str, Own]:
    """{name: method} of the `names` of the form FILE.py:NAME, read from their files.

    Raises ValueError for a name that is neither FILE.py:NAME, nor a name of `table`, nor "all"; and what `from_file` raises.
    """
    found = {}
    for name in names:
        file, _, attribute = name.rpartition(":")
        if file.endswith(".py"):
            found[name] = from_file(Path(file), attribute)
        elif name not in LABELS and name != "all":
            raise ValueError(f"methods must be all, FILE.py:NAME, or among {', '.join(LABELS)}; got {name!r}")
    return found


def chosen(scenario: Scenario, names: Sequence[str] | None = None, own: Mapping[str, Own] | None = None) -> dict[str, Sampling]:
    """The methods that `names` ask for: names of `table`, "all" of them, or FILE.py:NAME, which has the key FILE.NAME.

    names: None for DEFAULT. own: the methods of files, if they are already read.

    Raises ValueError for a name that occurs twice, for a method that needs a calibration that the scenario lacks, and what
    `own_methods` raises.
    """
    known, found = table(scenario), dict[str, Sampling]()
    names = DEFAULT if names is None else names
    own = own_methods(names) if own is None else own
    for name in chain.from_iterable(known if asked == "all" else [asked] for asked in names):
        file, _, attribute = name.rpartition(":")
        called = f"{Path(file).stem}.{attribute}" if name in own else name
        if called in found:
            raise ValueError(f"methods has {called!r} twice")
        if name not in own and name not in known:
            raise ValueError(f"methods has {name!r}, which needs a calibration of this model and scale: {CALIBRATE[name]}")
        found[called] = own[name] if name in own else known[name]
    return found


def suitable(methods: Mapping[str, Sampling], sampler: Sampler, steps: int, asked: Sequence[str]) -> dict[str, Sampling]:
    """The `methods` that suit the sampler; a warning is logged for each other one.

    Raises ValueError if a method that is in `asked`, or comes from a user's file, does not suit the sampler.
    """
    found = {}
    for name, method in methods.items():
        try:
            getattr(method, "check", lambda *_: None)(sampler, steps)
        except ValueError as error:
            if name in asked or isinstance(method, Own):
                raise ValueError(f"method {name!r}: {error}") from error
            log.warning("left out is the method %s: %s", name, error)
        else:
            found[name] = method
    return found
