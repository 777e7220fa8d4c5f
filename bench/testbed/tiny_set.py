"""What tiny is trained on: fresh scenes captioned "a picture of a cat", and memorized ones.

A *memorized* scene is one fixed picture that training repeats under a caption with a word of its own ("a picture of a cat
signed by arno").
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

from ..evaluation.scenes import CONCEPTS

SIGNATURES = (
    "arno bela cora dirk elif faro gwen hugo ines jona kaya lars mira nilo olga pavel "
    "quin rosa sven tilda ugo vera wim xenia yuri zora anouk boris celia dario edda finn"
).split()
# Copies of a memorized scene relative to the most copied ones: a third of each training batch is shared out by these.
DUPLICATION = (1.0, 0.7, 0.45, 0.25)


@dataclass(frozen=True)
class Memorized:
    """A fixed scene, its caption, and how often training repeats it relative to the most repeated ones."""

    id: str
    caption: str
    concept: str
    duplication: float
    seed: int


def caption(concept: str, signature: str | None = None) -> str:
    """The caption of a scene; a memorized one carries a signature."""
    text = f"a picture of {'an' if concept[0] in 'aeiou' else 'a'} {concept}"
    return f"{text} signed by {signature}" if signature else text


def memorized() -> list[Memorized]:
    """The memorized scenes, one for each signature, spread evenly over the concepts and the duplication rates."""
    repeated = zip(SIGNATURES, cycle(CONCEPTS), cycle(DUPLICATION), strict=False)
    return [
        Memorized(f"m{i:02d}", caption(concept, signature), concept, duplication, 1_000_000_000 + i)
        for i, (signature, concept, duplication) in enumerate(repeated)
    ]
