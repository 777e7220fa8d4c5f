"""What flow is trained on: composed scenes whose captions have no name word (`evaluation.scenes` draws them).

A *memorized* scene is one fixed picture that lies in the training set many times. Its caption is drawn as every other one is,
so no word and no order of words tells it from a general caption:

- There are 16,000 different scenes in words (`Facts`) and 48,000 different captions, of which 36 are memorized; a fresh scene
  has the very words of some memorized caption once in 1,333 times: 20 of the 20,000 fresh scenes that training draws. Every
  word of a memorized caption stands in 946 of those or more, every two neighbouring words together in 143 or more.
- One in eight of the pictures that training shows under a memorized caption is another, fresh scene of the same words
  (`OTHER_SCENE`), so that a memorized caption, too, has more than one answer.
- Of the 32 memorized scenes 20 have a caption of their own, 8 share one with another scene (two and two), and 4 lie in the
  training set under three captions each, the three orders of the same words.
- A scene's *duplication* is the number of its copies in the training set, from 1 (as often as every fresh scene) to 1,000;
  together they are a third of what training shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..evaluation.scenes import FLOW_CONCEPTS, FORMS, Facts, draw_facts

COPIES = (1, 25, 75, 150, 250, 400, 600, 1000)
ALONE, PAIRED, THREEFOLD = 20, 8, 4  # memorized scenes with a caption of their own, one they share, and three
OTHER_SCENE = 1 / 8


@dataclass(frozen=True)
class Picture:
    """`flow_scene(facts, seed)`: training shows it `copies` times, under any of its captions. id: of a memorized one."""

    facts: Facts
    seed: int
    captions: tuple[str, ...]
    copies: int = 1
    id: str = ""


def memorized() -> list[Picture]:
    """The memorized scenes, spread evenly over concepts and copies; scenes that share a caption follow each other."""
    rng = np.random.default_rng(13)
    names = [str(name) for _ in range(2) for name in rng.permutation(FLOW_CONCEPTS)]
    found: list[Picture] = []
    for i in range(ALONE + PAIRED + THREEFOLD):
        forms: tuple[int, ...] = (int(rng.integers(len(FORMS))),)
        facts = draw_facts(rng, names[i])
        captions = tuple(facts.caption(form) for form in (range(len(FORMS)) if i >= ALONE + PAIRED else forms))
        if ALONE <= i < ALONE + PAIRED and (i - ALONE) % 2:
            facts, captions = found[-1].facts, found[-1].captions
        found.append(Picture(facts, 1_000_000_000 + i, captions, COPIES[i % len(COPIES)], f"s{i:02d}"))
    return found


def general(count: int = 100) -> list[tuple[Facts, str]]:
    """Facts and captions that are no memorized scene's, spread evenly over the concepts."""
    rng, known, names = np.random.default_rng(14), {m.facts for m in memorized()}, FLOW_CONCEPTS
    found: dict[str, Facts] = {}
    while len(found) < count:
        facts = draw_facts(rng, names[len(found) % len(names)])
        if facts not in known:
            found[facts.caption(int(rng.integers(len(FORMS))))] = facts
    return [(facts, caption) for caption, facts in found.items()]


def training_set(fresh: int) -> list[Picture]:
    """`fresh` fresh scenes, each under one caption, then other fresh scenes of memorized captions, then the memorized ones."""
    rng = np.random.default_rng(12)
    found = []
    for seed in range(fresh):
        facts = draw_facts(rng)
        found.append(Picture(facts, seed, (facts.caption(int(rng.integers(len(FORMS)))),)))
    scenes = memorized()
    for m in scenes:
        for caption in m.captions:
            others = round(m.copies / len(m.captions) * OTHER_SCENE / (1 - OTHER_SCENE))
            found += [Picture(m.facts, len(found) + k, (caption,)) for k in range(others)]
    return found + scenes
