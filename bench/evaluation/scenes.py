"""The pictures that the two small pipelines are trained on, composed from Noto Color Emoji glyphs (Open Font License).

A scene of tiny shows one concept, drawn large anywhere, turned and perhaps mirrored, on a two-tone sloping ground with a few
small distractors.

A scene of flow shows a concept in a colour, a smaller object beside it, a sky of a named colour over a ground of any colour,
and a few small distractors that no caption names. Its caption says just that, in one of three orders of the words:

    a red cat left of a bell under a pink sky
    a bell right of a red cat under a pink sky
    under a pink sky a red cat left of a bell

Every seed gives another scene: a scene is a function of its seed and its content.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
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
FLOW_CONCEPTS = [name for name in CONCEPTS if name not in ("banana", "pizza", "sunflower", "bicycle")]
OBJECTS = {"bell": "🔔", "star": "⭐", "moon": "🌙", "ball": "⚽", "crown": "👑", "leaf": "🍁", "gift": "🎁", "diamond": "💎"}
COLOURS = {
    "red": (215, 40, 40),
    "yellow": (235, 205, 30),
    "green": (40, 165, 60),
    "blue": (45, 85, 215),
    "purple": (145, 50, 185),
}
SKIES = {
    "pink": (245, 165, 195),
    "blue": (115, 175, 240),
    "white": (244, 244, 244),
    "grey": (135, 135, 140),
    "black": (30, 30, 40),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FORMS = (
    "a {colour} {concept} {relation} a {object} under a {sky} sky",
    "a {object} {inverse} a {colour} {concept} under a {sky} sky",
    "under a {sky} sky a {colour} {concept} {relation} a {object}",
)


@dataclass(frozen=True)
class Facts:
    """All that a caption says: a `concept` in `colour` is in `relation` to `object` ("left of": on its left), under a `sky`."""

    colour: str
    concept: str
    relation: str
    object: str
    sky: str

    def caption(self, form: int) -> str:
        """The facts in words, in the word order `FORMS[form]`."""
        return FORMS[form].format(**asdict(self), inverse=INVERSE[self.relation])


def draw_facts(rng: np.random.Generator, concept: str | None = None) -> Facts:
    """Random facts, all equally likely; about `concept`, if it is given."""
    return Facts(
        str(rng.choice(list(COLOURS))),
        concept or str(rng.choice(FLOW_CONCEPTS)),
        str(rng.choice(list(INVERSE))),
        str(rng.choice(list(OBJECTS))),
        str(rng.choice(list(SKIES))),
    )


def tiny_scene(concept: str, seed: int) -> Image.Image:
    """One picture of `concept`, a pure function of its arguments: (SIZE, SIZE) RGB."""
    rng = np.random.default_rng(seed)
    sky, earth = (_colour(rng.integers(60, 256, 3)) for _ in range(2))
    canvas = _ground(sky, earth, rng.uniform(0.25, 0.95, 2))
    for glyph in rng.choice(list("⭐🌙💧🍁🍒💎🔔🍀"), size=rng.integers(2, 5)):
        art = _glyph(str(glyph))
        _drop(canvas, _turned(art, rng, rng.uniform(11, 15) / art.height, turn=40), rng)
    art = _glyph(CONCEPTS[concept])
    _drop(canvas, _turned(art, rng, rng.uniform(30, 42) / art.height, turn=30), rng)
    return canvas.reduce(2)


def flow_scene(facts: Facts, seed: int) -> Image.Image:
    """One picture of `facts`, a pure function of its arguments: (SIZE, SIZE) RGB."""
    rng = np.random.default_rng(seed)
    sky, slope = _jittered(SKIES[facts.sky], rng), rng.uniform(0.25, 0.95, 2)
    canvas = _ground(_colour(sky), _colour(rng.integers(30, 226, 3)), slope)
    for glyph in rng.choice(list("💧🍒🍀🌸"), size=rng.integers(1, 4)):
        art = _glyph(str(glyph))
        _drop(canvas, _turned(art, rng, rng.uniform(7, 10) / max(art.size), turn=40), rng)
    art, small = _tinted(_glyph(CONCEPTS[facts.concept]), facts.colour, rng), _glyph(OBJECTS[facts.object])
    main = _turned(art, rng, rng.uniform(26, 32) / max(art.size), turn=20)
    other = _turned(small, rng, rng.uniform(13, 16) / max(small.size), turn=20)
    for shown, place in zip((main, other), _places(facts.relation, main.size, other.size, canvas.width, rng), strict=True):
        canvas.paste(shown, place, shown)
    return canvas.reduce(2)


def _colour(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _jittered(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A colour near `colour`, (3,) float in 0..255."""
    return np.clip(np.array(colour) + rng.uniform(-14, 14, 3), 0, 255)


def _ground(sky: tuple[int, ...], earth: tuple[int, ...], slope: np.ndarray) -> Image.Image:
    """A canvas of twice the size, `sky` above `earth`: the border is at slope[0] of the height on the left, slope[1] right."""
    side = 2 * SIZE
    canvas = Image.new("RGB", (side, side), sky)
    left, right = slope * side
    ImageDraw.Draw(canvas).polygon([(0, left), (side, right), (side, side), (0, side)], fill=earth)
    return canvas


def _tinted(art: Image.Image, colour: str, rng: np.random.Generator) -> Image.Image:
    """`art` in shades of one colour."""
    mid = _jittered(COLOURS[colour], rng)
    dark, light, middle = (_colour(shade) for shade in (0.2 * mid, 0.55 * mid + 0.45 * 255, mid))
    tinted = ImageOps.colorize(ImageOps.grayscale(art), dark, light, middle).convert("RGBA")
    tinted.putalpha(art.getchannel("A"))
    return tinted


def _turned(art: Image.Image, rng: np.random.Generator, scale: float, turn: float) -> Image.Image:
    """`art` scaled by `scale` in the finished picture, mirrored in half of the cases, turned by up to `turn` degrees."""
    if rng.random() < 0.5:
        art = ImageOps.mirror(art)
    art = art.resize((round(2 * scale * art.width), round(2 * scale * art.height)), Image.Resampling.BOX, reducing_gap=2)
    return art.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=True)


def _drop(canvas: Image.Image, art: Image.Image, rng: np.random.Generator) -> None:
    """Draw `art` at a random place, wholly inside the picture if there is room."""
    place = [int(rng.integers(max(room - side, 1))) for room, side in zip(canvas.size, art.size, strict=True)]
    canvas.paste(art, (place[0], place[1]), art)


def _places(
    relation: str, main: tuple[int, int], other: tuple[int, int], side: int, rng: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Upper left corners of both, inside the picture: no overlap along the relation's axis, any place along the other axis."""
    axis, main_first = int(relation in ("above", "below")), relation in ("left of", "above")
    first, second = (main, other) if main_first else (other, main)
    before, after = np.sort(rng.integers(0, side - first[axis] - second[axis] + 1, 2))
    starts = (int(before), int(after) + first[axis])
    places = []
    for size, along in zip((main, other), starts if main_first else starts[::-1], strict=True):
        across = int(rng.integers(side - size[1 - axis] + 1))
        places.append((across, along) if axis else (along, across))
    return places[0], places[1]


@functools.cache
def _glyph(glyph: str) -> Image.Image:
    """The bitmap of a colour glyph, cropped to its ink."""
    if not FONT.is_file():
        raise FileNotFoundError(f"scenes are drawn with the font {str(FONT)!r}: install fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), 109)  # the one size at which the font carries bitmaps
    art = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(art).text((8, 8), glyph, font=font, embedded_color=True)
    return art.crop(art.getbbox())
