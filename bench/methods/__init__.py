"""Methods against memorization, side by side: `table` has them all by name.

Each is a `Method`, or has its `sample`. Ours differ in their `Guidance` alone; a peer is a module that makes one. All go
through the same sampler, so their images and their cost compare.
"""

from __future__ import annotations

from basinescape import At, Calibration, FirstMinimum, Guidance, Settled

from ..scenario import Scenario
from . import attention, augment, cads, embedding, padding, update
from .dryrun import DryRun
from .method import Batch, Method

__all__ = ["Batch", "DryRun", "Method", "table"]

# The rule `Settled` as chosen on half of the small pipeline's memorized prompts: see `basinescape analyze`.
SETTLED = {"factor": 1.5, "wait": 8, "latest": 24}


def table(scenario: Scenario) -> dict[str, Method | DryRun]:
    """All methods by name, as `scenario` parametrises them."""
    scale = scenario.scale
    at, minimum, plain = At(scenario.transition), FirstMinimum(), Guidance.cfg(scale)
    delayed = Guidance.delayed(scale, until=at)
    measured = {}
    if scenario.ordinary:
        until = Settled(scenario.ordinary, **SETTLED)
        measured["delayed-settled"] = Method(Guidance.delayed(scale, until=until))
    if scenario.stable:
        measured["update-norm"] = update.method(scale, scenario.stable)
    if scenario.calibration:
        measured["guard"] = Method(Guidance.guard(scale, Calibration.load(scenario.calibration)))
    shapes = ("linear", "invlinear", "cosine", "sine", "v_shape", "a_shape")
    return {
        "cfg": Method(plain),
        "delayed-at": Method(delayed),
        "delayed-minimum": Method(Guidance.delayed(scale, until=minimum)),
        "opposite-at": Method(Guidance.opposite(2.0, scale=scale, until=at)),
        "opposite-minimum": Method(Guidance.opposite(scale, scale=scale, until=minimum)),
        "opposite-dryrun": DryRun(scale, opposite_scale=scale),
        **{f"shape-{name}": Method(Guidance.cfg(scale, shape=name)) for name in shapes},
        "cads": cads.method(plain),
        "random-words": augment.method(plain, augment.random_words),
        "random-numbers": augment.method(plain, augment.random_numbers),
        "repeated-words": augment.method(plain, augment.repeated_words),
        "embedding": embedding.method(plain, scenario.ordinary[0] if scenario.ordinary else None),
        "attention": attention.method(plain),
        "padding": padding.method(plain),
        **measured,
    }
