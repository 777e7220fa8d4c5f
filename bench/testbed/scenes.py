"""The pictures the small pipeline is trained on, composed from Noto Color Emoji glyphs (Open Font License).

A scene shows one concept, drawn large anywhere, turned and perhaps mirrored, on a two-tone sloping ground with a few small
distractors. Fresh scenes are endless and captioned "a picture of a cat". A *memorized* scene is one fixed picture that
training repeats under a caption with a word of its own ("a picture of a cat signed by arno").
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

SIZE = 64  # pixels
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji

CONCEPTS = {
    "cat": "🐱",
    "frog": "🐸",
    "penguin": "🐧",
    "fish": "🐟",
    "butterfly": "🦋",
    "crab": "🦀",
    "apple": "🍎",
    "banana": "🍌",
    "pizza": "🍕",
    "mushroom": "🍄",
    "cake": "🎂",
    "sunflower": "🌻",
    "cactus": "🌵",
    "tree": "🌳",
    "house": "🏠",
    "car": "🚗",
    "rocket": "🚀",
    "boat": "⛵",
    "bicycle": "🚲",
    "umbrella": "🌂",
    "guitar": "🎸",
    "clock": "⏰",
    "balloon": "🎈",
    "snowman": "⛄",
}
DISTRACTORS = "⭐🌙💧🍁🍒💎🔔🍀"

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
    names = list(CONCEPTS)
    return [
        Memorized(
            id=f"m{i:02d}",
            caption=caption(names[i % len(names)], signature),
            concept=names[i % len(names)],
            duplication=DUPLICATION[i % len(DUPLICATION)],
            seed=1_000_000_000 + i,
        )
        for i, signature in enumerate(SIGNATURES)
    ]


def scene(concept: str, seed: int) -> Image.Image:
    """One picture of `concept`, a pure function of its arguments: (SIZE, SIZE) RGB."""
    rng = np.random.default_rng(seed)
    canvas = _ground(rng)
    for glyph in rng.choice(list(DISTRACTORS), size=rng.integers(2, 5)):
        _paste(canvas, glyph, rng, height=rng.uniform(11, 15), turn=40)
    _paste(canvas, CONCEPTS[concept], rng, height=rng.uniform(30, 42), turn=30)
    return canvas.reduce(2)


def _ground(rng: np.random.Generator) -> Image.Image:
    """Two tones that meet on a sloping line, drawn at twice the size."""
    side = 2 * SIZE
    sky, earth = (tuple(int(v) for v in rng.integers(60, 256, 3)) for _ in range(2))
    canvas = Image.new("RGB", (side, side), sky)
    left, right = rng.uniform(0.25, 0.95, 2) * side
    ImageDraw.Draw(canvas).polygon([(0, left), (side, right), (side, side), (0, side)], fill=earth)
    return canvas


def _paste(canvas: Image.Image, glyph: str, rng: np.random.Generator, height: float, turn: float) -> None:
    """Draw `glyph` about `height` pixels high, turned by up to `turn` degrees, wholly inside the picture."""
    art = _glyph(glyph)
    if rng.random() < 0.5:
        art = ImageOps.mirror(art)
    scale = 2 * height / art.height
    art = art.resize((round(art.width * scale), round(art.height * scale)), Image.Resampling.BOX, reducing_gap=2)
    art = art.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=True)
    room = max(canvas.width - art.width, 1), max(canvas.height - art.height, 1)
    canvas.paste(art, (int(rng.integers(room[0])), int(rng.integers(room[1]))), art)


@functools.cache
def _glyph(glyph: str) -> Image.Image:
    """The bitmap of a colour glyph, cropped to its ink."""
    if not FONT.is_file():
        raise FileNotFoundError(f"scenes are drawn with the font {str(FONT)!r}: install fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), 109)  # the one size at which the font carries bitmaps
    art = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(art).text((8, 8), glyph, font=font, embedded_color=True)
    return art.crop(art.getbbox())
