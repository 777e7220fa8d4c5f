"""Methods against memorization, side by side: each takes a sampler, prompts and seeds, and gives images.

`table` has them all by name. Ours differ in their `Guidance` alone; a peer is a module of its own. All go through the same
sampler, so their images and their cost compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from basinescape import At, FirstMinimum, Guidance, Output, Sampler, Settled

from ..scenario import Scenario
from . import attention, augment, cads, dryrun, embedding, padding, update

Method = Callable[[Sampler, Sequence[str], Sequence[int], int], Output]


def guided(guidance: Guidance) -> Method:
    """The sampler itself under `guidance`."""

    def sample(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Output:
        return sampler(prompts, seeds, steps, guidance, progress=False)

    return sample


# The rule `Settled` as chosen on half of the small pipeline's memorized prompts: see `basinescape analyze`.
SETTLED = {"factor": 1.5, "wait": 8, "latest": 24}


def table(scenario: Scenario) -> dict[str, Method]:
    """All methods by name, as `scenario` parametrises them."""
    scale = scenario.scale
    at, minimum, plain = At(scenario.transition), FirstMinimum(), Guidance.cfg(scale)
    delayed = Guidance.delayed(scale, until=at)
    measured = {}
    if scenario.ordinary:
        until = Settled(scenario.ordinary, **SETTLED)
        measured["delayed-settled"] = guided(Guidance.delayed(scale, until=until))
    if scenario.stable:
        measured["update-norm"] = update.method(scale, scenario.stable)
    if scenario.guard:
        measured["guard"] = guided(Guidance.guard(delayed, *scenario.guard))
    shapes = ("linear", "invlinear", "cosine", "sine", "v_shape", "a_shape")
    return {
        "cfg": guided(plain),
        "delayed-at": guided(delayed),
        "delayed-minimum": guided(Guidance.delayed(scale, until=minimum)),
        "opposite-at": guided(Guidance.opposite(2.0, scale=scale, until=at)),
        "opposite-minimum": guided(Guidance.opposite(scale, scale=scale, until=minimum)),
        "opposite-dryrun": dryrun.method(scale, opposite_scale=scale),
        **{f"shape-{name}": guided(Guidance.cfg(scale, shape=name)) for name in shapes},
        "cads": cads.method(plain),
        "random-words": augment.method(plain, augment.random_words),
        "random-numbers": augment.method(plain, augment.random_numbers),
        "repeated-words": augment.method(plain, augment.repeated_words),
        "embedding": embedding.method(plain, scenario.ordinary[0] if scenario.ordinary else None),
        "attention": attention.method(plain),
        "padding": padding.method(plain),
        **measured,
    }
