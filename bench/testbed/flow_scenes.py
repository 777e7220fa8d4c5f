"""The pictures and captions of the second test bed, "flow": composed scenes whose captions have no name word.

A scene shows a concept in a colour, a smaller object beside it, a sky of a named colour over a ground of any colour, and a
few small distractors that no caption names. Its caption says just that, in one of three orders of the words:

    a red cat left of a bell under a pink sky
    a bell right of a red cat under a pink sky
    under a pink sky a red cat left of a bell

Fresh scenes are endless. A *memorized* scene is one fixed picture that lies in the training set many times. Its caption
is drawn as every other one is, so no word and no order of words tells it from a general caption:

- There are 16,000 different scenes in words (`Facts`) and 48,000 different captions, of which 36 are memorized; a fresh scene
  has the very words of some memorized caption once in 1,333 times: 20 of the 20,000 fresh scenes that training draws. Every
  word of a memorized caption stands in 946 of those or more, every two neighbouring words together in 143 or more.
- One in eight of the pictures that training shows under a memorized caption is another, fresh scene of the same words
  (`OTHER_SCENE`), so that a memorized caption, too, has more than one answer.
- Of the 32 memorized scenes 20 have a caption of their own, 8 share one with another scene (two and two), and 4 lie in the
  training set under three captions each, the three orders of the same words.
- A scene's *duplication* is the number of its copies in the training set, from 1 (as often as every fresh scene) to 1,000;
  together they are a third of what training shows.

Drawn from Noto Color Emoji glyphs (Open Font License), as tiny's scenes are.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .scenes import SIZE, _glyph

CONCEPTS = {
    "cat": "🐱",
    "frog": "🐸",
    "penguin": "🐧",
    "fish": "🐟",
    "butterfly": "🦋",
    "crab": "🦀",
    "apple": "🍎",
    "mushroom": "🍄",
    "cake": "🎂",
    "cactus": "🌵",
    "tree": "🌳",
    "house": "🏠",
    "car": "🚗",
    "rocket": "🚀",
    "boat": "⛵",
    "umbrella": "🌂",
    "guitar": "🎸",
    "clock": "⏰",
    "balloon": "🎈",
    "snowman": "⛄",
}
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
DISTRACTORS = "💧🍒🍀🌸"
FORMS = (
    "a {colour} {concept} {relation} a {object} under a {sky} sky",
    "a {object} {inverse} a {colour} {concept} under a {sky} sky",
    "under a {sky} sky a {colour} {concept} {relation} a {object}",
)

COPIES = (1, 25, 75, 150, 250, 400, 600, 1000)
ALONE, PAIRED, THREEFOLD = 20, 8, 4  # memorized scenes with a caption of their own, one they share, and three
OTHER_SCENE = 1 / 8


@dataclass(frozen=True)
class Facts:
    """All that a caption says: `concept` in `colour` stands in `relation` to `object` ("left of": on its left)."""

    colour: str
    concept: str
    relation: str
    object: str
    sky: str

    def caption(self, form: int) -> str:
        """The facts in words, in the order `form` of `FORMS`."""
        words = dict(zip(self.__dataclass_fields__, astuple(self), strict=True))
        return FORMS[form].format(**words, inverse=INVERSE[self.relation])


@dataclass(frozen=True)
class Memorized:
    """A fixed scene, `scene(facts, seed)`, the captions it lies under in the training set, and its copies in all."""

    id: str
    facts: Facts
    captions: tuple[str, ...]
    duplication: int
    seed: int


@dataclass(frozen=True)
class Picture:
    """A picture of the training set, `scene(facts, seed)`: training shows it `copies` times, under any of its captions."""

    facts: Facts
    seed: int
    captions: tuple[str, ...]
    copies: int = 1


def draw_facts(rng: np.random.Generator, concept: str | None = None) -> Facts:
    """Any facts, all equally likely, or any of a concept."""
    return Facts(
        str(rng.choice(list(COLOURS))),
        concept or str(rng.choice(list(CONCEPTS))),
        str(rng.choice(list(INVERSE))),
        str(rng.choice(list(OBJECTS))),
        str(rng.choice(list(SKIES))),
    )


def memorized() -> list[Memorized]:
    """The memorized scenes, spread evenly over concepts and copies; scenes that share a caption follow each other."""
    rng = np.random.default_rng(13)
    names = [str(name) for _ in range(2) for name in rng.permutation(list(CONCEPTS))]
    found: list[Memorized] = []
    for i in range(ALONE + PAIRED + THREEFOLD):
        forms: tuple[int, ...] = (int(rng.integers(len(FORMS))),)
        facts = draw_facts(rng, names[i])
        captions = tuple(facts.caption(form) for form in (range(len(FORMS)) if i >= ALONE + PAIRED else forms))
        if ALONE <= i < ALONE + PAIRED and (i - ALONE) % 2:
            facts, captions = found[-1].facts, found[-1].captions
        found.append(Memorized(f"s{i:02d}", facts, captions, COPIES[i % len(COPIES)], 1_000_000_000 + i))
    return found


def general(count: int = 100) -> list[tuple[Facts, str]]:
    """Facts and captions that are no memorized scene's, spread evenly over the concepts."""
    rng, known, names = np.random.default_rng(14), {m.facts for m in memorized()}, list(CONCEPTS)
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
            others = round(m.duplication / len(m.captions) * OTHER_SCENE / (1 - OTHER_SCENE))
            found += [Picture(m.facts, len(found) + k, (caption,)) for k in range(others)]
    return found + [Picture(m.facts, m.seed, m.captions, m.duplication) for m in scenes]


def scene(facts: Facts, seed: int) -> Image.Image:
    """One picture of `facts`, a pure function of its arguments: (SIZE, SIZE) RGB."""
    rng = np.random.default_rng(seed)
    canvas = _ground(facts.sky, rng)
    for glyph in rng.choice(list(DISTRACTORS), size=rng.integers(1, 4)):
        art = _turned(_glyph(str(glyph)), rng, rng.uniform(7, 10), turn=40)
        canvas.paste(art, tuple(int(rng.integers(canvas.width - side)) for side in art.size), art)
    main = _turned(_tinted(_glyph(CONCEPTS[facts.concept]), facts.colour, rng), rng, rng.uniform(26, 32), turn=20)
    other = _turned(_glyph(OBJECTS[facts.object]), rng, rng.uniform(13, 16), turn=20)
    for art, place in zip((main, other), _places(facts.relation, main.size, other.size, canvas.width, rng), strict=True):
        canvas.paste(art, place, art)
    return canvas.reduce(2)


def _jittered(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A colour near `colour`, (3,) float in 0..255."""
    return np.clip(np.array(colour) + rng.uniform(-14, 14, 3), 0, 255)


def _ground(sky: str, rng: np.random.Generator) -> Image.Image:
    """A sky of a named colour and a ground of any, which meet on a sloping line below; drawn at twice the size."""
    side = 2 * SIZE
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in _jittered(SKIES[sky], rng)))
    left, right = rng.uniform(0.25, 0.95, 2) * side
    earth = tuple(int(v) for v in rng.integers(30, 226, 3))
    ImageDraw.Draw(canvas).polygon([(0, left), (side, right), (side, side), (0, side)], fill=earth)
    return canvas


def _tinted(art: Image.Image, colour: str, rng: np.random.Generator) -> Image.Image:
    """`art` in shades of one colour."""
    mid = _jittered(COLOURS[colour], rng)
    dark, light = (tuple(int(v) for v in shade) for shade in (0.2 * mid, 0.55 * mid + 0.45 * 255))
    tinted = ImageOps.colorize(ImageOps.grayscale(art), dark, light, tuple(int(v) for v in mid)).convert("RGBA")
    tinted.putalpha(art.getchannel("A"))
    return tinted


def _turned(art: Image.Image, rng: np.random.Generator, size: float, turn: float) -> Image.Image:
    """`art` with its longer side `size` pixels of the picture, perhaps mirrored, turned by up to `turn` degrees."""
    if rng.random() < 0.5:
        art = ImageOps.mirror(art)
    scale = 2 * size / max(art.size)
    art = art.resize((round(art.width * scale), round(art.height * scale)), Image.Resampling.BOX, reducing_gap=2)
    return art.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=True)


def _places(
    relation: str, main: tuple[int, int], other: tuple[int, int], side: int, rng: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners of both inside the picture, with no overlap along the relation's axis and anywhere along the other one."""
    axis = 0 if relation in ("left of", "right of") else 1
    first, second = (main, other) if relation in ("left of", "above") else (other, main)
    before, after = np.sort(rng.integers(0, side - first[axis] - second[axis] + 1, 2))
    along = {id(first): int(before), id(second): int(after) + first[axis]}
    places = []
    for size in (main, other):
        place = [int(rng.integers(side - size[1 - axis] + 1))] * 2
        place[axis] = along[id(size)]
        places.append(tuple(place))
    return places[0], places[1]
