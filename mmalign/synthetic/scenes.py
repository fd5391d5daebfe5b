"""The one scene specification of the tiny world: canvas, words, captions, splits, and placement.

Everything that draws, describes, asks about or scores the world reads its constants from here, so an image
made for a diffusion pipeline is a valid input of a multimodal language model.

Canvas: the unit square, x to the right, y downwards. A radius is half the side of an object's bounding box.
The canvas is also a 3 x 3 grid of cells (reading order, 0 is top left); scenes with more than one object
put each object in its own cell.

Two tiers of captions:

* ``attributes``: one object, "a large red circle on a white background". The position is free.
* ``relations``: "three blue squares on a black background" (counts two to four) and
  "a red circle left of a blue square on a gray background" (relative position). Sizes are not named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import Literal

import numpy as np

Tier = Literal["attributes", "relations"]
Split = Literal["train", "dev", "heldout"]

TIERS: tuple[Tier, ...] = ("attributes", "relations")
SPLITS: tuple[Split, ...] = ("train", "dev", "heldout")

# Any two colours, and any colour and background, are at least 100 apart in RGB, so that a VAE with a mean
# error of a few grey levels never moves a colour to its neighbour.
COLOURS = MappingProxyType(
    {
        "red": (230, 30, 30),
        "green": (30, 170, 50),
        "blue": (40, 70, 230),
        "yellow": (245, 225, 40),
        "purple": (140, 40, 190),
        "orange": (255, 130, 0),
        "cyan": (30, 205, 225),
        "pink": (255, 120, 190),
    }
)
BACKGROUNDS = MappingProxyType({"white": (245, 245, 245), "black": (12, 12, 12), "gray": (128, 128, 128)})
SHAPES = ("circle", "square", "triangle", "cross")
# Half sides of the bounding box, as a share of the canvas. The two ranges leave a gap around SIZE_THRESHOLD.
SIZES = MappingProxyType({"small": (0.185, 0.225), "large": (0.310, 0.380)})
SIZE_THRESHOLD = 0.2675
COUNT_WORDS = MappingProxyType({"two": 2, "three": 3, "four": 4})
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE_RELATION = MappingProxyType({"left of": "right of", "right of": "left of", "above": "below", "below": "above"})

GRID_CELLS = 3
MARGIN = 0.03
# Objects of the relations tier: no size word, small enough that two neighbours keep a visible gap.
CELL_RADIUS = (0.105, 0.130)
CELL_GAP = 0.02

_PLURALS = MappingProxyType({"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"})
_SINGULARS = MappingProxyType({plural: shape for shape, plural in _PLURALS.items()})
_GLUE = ("a", "an", "on", "background", "left", "right", "of", "above", "below")
VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys((*_GLUE, *SIZES, *COLOURS, *SHAPES, *_SINGULARS, *BACKGROUNDS, *COUNT_WORDS))
)

# Held-out and dev captions per kind; the rest is train. Position captions are a fixed subset of about 11,000.
_NUM_HELDOUT = {"attribute": 64, "count": 32, "position": 32}
_NUM_DEV = {"attribute": 32, "count": 16, "position": 16}
_NUM_POSITION_CAPTIONS = 960
# Of the salts 0-2999 the one whose attribute splits are most even over colours, shapes, sizes and backgrounds.
_SPLIT_SALT = 836


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """What a caption says about one object. `size` is None where the caption does not name it."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True, slots=True)
class SceneSpec:
    """What a caption says about a scene: all of it, and nothing about nuisance variation.

    `relation` holds between the first and the second object ("left of" = the first is left of the second).
    """

    background: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None

    @property
    def tier(self) -> Tier:
        return "attributes" if len(self.objects) == 1 else "relations"


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One placed object: centre (x, y) and `radius` (half bounding box) in canvas units."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    size: str | None = None

    @property
    def cell(self) -> int:
        """Index of the grid cell that holds the centre, in reading order."""
        column = min(int(self.x * GRID_CELLS), GRID_CELLS - 1)
        row = min(int(self.y * GRID_CELLS), GRID_CELLS - 1)
        return row * GRID_CELLS + column


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawable scene: a background and placed objects, drawn in order."""

    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None

    @property
    def spec(self) -> SceneSpec:
        """The scene without its nuisance variation."""
        objects = tuple(ObjectSpec(o.colour, o.shape, o.size) for o in self.objects)
        return SceneSpec(self.background, objects, self.relation)


def caption(scene: Scene | SceneSpec) -> str:
    """The caption of a scene; the inverse of `parse`.

    Raises ValueError for a scene that neither tier can say (no object, or several objects that are neither
    all alike nor two in a named relation).
    """
    spec = scene.spec if isinstance(scene, Scene) else scene
    tail = f"on a {spec.background} background"
    if len(spec.objects) == 1 and spec.relation is None:
        (only,) = spec.objects
        if only.size is None:
            raise ValueError("a scene of one object needs a size to be captioned; allowed: " + ", ".join(SIZES))
        return f"a {only.size} {only.colour} {only.shape} {tail}"
    if len(spec.objects) == 2 and spec.relation is not None:
        first, second = spec.objects
        return (
            f"{article(first.colour)} {first.colour} {first.shape} {spec.relation} "
            f"{article(second.colour)} {second.colour} {second.shape} {tail}"
        )
    kinds = {(o.colour, o.shape) for o in spec.objects}
    for word, number in COUNT_WORDS.items():
        if number == len(spec.objects) and len(kinds) == 1 and spec.relation is None:
            ((colour, shape),) = kinds
            return f"{word} {colour} {_PLURALS[shape]} {tail}"
    raise ValueError(
        f"no caption for a scene of {len(spec.objects)} objects of {len(kinds)} kinds with relation "
        f"{spec.relation!r}; allowed: one object with a size, 2-4 objects alike, or two objects with a relation"
    )


@cache
def parse(text: str) -> SceneSpec:
    """What a caption asks for; the inverse of `caption`.

    Raises ValueError naming the word that is not understood and the words allowed in its place.
    """
    words = _Words(text)
    first_word = words.peek()
    if first_word in COUNT_WORDS:
        number = COUNT_WORDS[words.take(COUNT_WORDS)]
        colour = words.take(COLOURS)
        shape = _SINGULARS[words.take(_SINGULARS)]
        objects: tuple[ObjectSpec, ...] = (ObjectSpec(colour, shape),) * number
        relation = None
    else:
        words.take(("a", "an", *COUNT_WORDS))
        if words.peek() in SIZES:
            size = words.take(SIZES)
            objects = (ObjectSpec(words.take(COLOURS), words.take(SHAPES), size),)
            relation = None
        else:
            first = ObjectSpec(words.take((*SIZES, *COLOURS)), words.take(SHAPES))
            relation = words.take(("left", "right", "above", "below"))
            if relation in ("left", "right"):
                words.take(("of",))
                relation += " of"
            words.take(("a", "an"))
            objects = (first, ObjectSpec(words.take(COLOURS), words.take(SHAPES)))
    words.take(("on",))
    words.take(("a",))
    background = words.take(BACKGROUNDS)
    words.take(("background",))
    words.end()
    return SceneSpec(background, objects, relation)


@cache
def captions(tier: Tier, split: Split) -> tuple[str, ...]:
    """The captions of one tier and split, in a fixed order.

    Splits share no caption, and no meaning either: "A left of B" and "B right of A" are in the same split.
    Every colour, shape, size, background, count and relation occurs in train. The order comes from a hash of
    the caption, so it is the same on every platform and does not move when words are added elsewhere.
    """
    if tier not in TIERS:
        raise ValueError(f"tier {tier!r} is unknown; allowed: {', '.join(TIERS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; allowed: {', '.join(SPLITS)}")
    kinds = ("attribute",) if tier == "attributes" else ("count", "position")
    return tuple(text for kind in kinds for text in _split_captions(kind, split))


def sample_scene(text: str, rng: np.random.Generator) -> Scene:
    """A scene that the caption is true of, with position and exact size drawn from `rng`.

    Raises ValueError (from `parse`) for a caption of neither tier.
    """
    spec = parse(text)
    if spec.tier == "attributes":
        (only,) = spec.objects
        assert only.size is not None
        radius = float(rng.uniform(*SIZES[only.size]))
        low, high = MARGIN + radius, 1.0 - MARGIN - radius
        x, y = (float(v) for v in rng.uniform(low, high, size=2))
        placed: tuple[SceneObject, ...] = (SceneObject(only.colour, only.shape, x, y, radius, only.size),)
    else:
        cells = _draw_cells(spec, rng)
        placed = tuple(place_in_cell(o, c, rng) for o, c in zip(spec.objects, cells, strict=True))
    return Scene(spec.background, placed, spec.relation)


def sample_scenes(texts: Sequence[str], rng: np.random.Generator) -> list[Scene]:
    """One scene per caption, in order; see `sample_scene`."""
    return [sample_scene(text, rng) for text in texts]


def relation_holds(relation: str, dx: float, dy: float) -> bool:
    """Whether a first object displaced by (dx, dy) from a second one stands in `relation` to it.

    The larger displacement decides, so a pair is never both "left of" and "above".
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation {relation!r} is unknown; allowed: {', '.join(RELATIONS)}")
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1.0 if relation in ("left of", "above") else 1.0
    return sign * along > abs(across)


def article(word: str) -> str:
    """ "an" before a vowel, else "a"."""
    return "an" if word[0] in "aeiou" else "a"


class _Words:
    """A caption read word by word, with errors that name the word and what is allowed there."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"a caption is a string, got {type(text).__name__}")
        self.text = text
        self.words = text.split()
        self.position = 0

    def peek(self) -> str | None:
        return self.words[self.position] if self.position < len(self.words) else None

    def take(self, allowed: Sequence[str] | MappingProxyType) -> str:
        word = self.peek()
        if word is None or word not in allowed:
            found = "the end" if word is None else repr(word)
            raise ValueError(
                f"caption {self.text!r}: {found} at word {self.position + 1} is not understood; "
                f"allowed here: {', '.join(allowed)}"
            )
        self.position += 1
        return word

    def end(self) -> None:
        if self.position != len(self.words):
            raise ValueError(
                f"caption {self.text!r}: {self.words[self.position]!r} at word {self.position + 1} is too much; "
                "a caption ends with 'background'"
            )


@cache
def _split_captions(kind: str, split: Split) -> tuple[str, ...]:
    groups = _meanings(kind)
    sizes = (_NUM_HELDOUT[kind], _NUM_DEV[kind])
    chosen: dict[str, list[str]] = {"heldout": [], "dev": [], "train": []}
    for group in groups:
        if len(chosen["heldout"]) < sizes[0]:
            chosen["heldout"].extend(group)
        elif len(chosen["dev"]) < sizes[1]:
            chosen["dev"].extend(group)
        else:
            chosen["train"].extend(group)
    return tuple(chosen[split])


def _meanings(kind: str) -> list[tuple[str, ...]]:
    """Groups of captions that say the same, in hash order."""
    groups: list[tuple[str, ...]] = []
    if kind == "attribute":
        specs = product(BACKGROUNDS, COLOURS, SHAPES, SIZES)
        groups = [(caption(SceneSpec(b, (ObjectSpec(c, s, z),))),) for b, c, s, z in specs]
    elif kind == "count":
        groups = [
            (caption(SceneSpec(b, (ObjectSpec(c, s),) * n)),)
            for b, c, s, n in product(BACKGROUNDS, COLOURS, SHAPES, COUNT_WORDS.values())
        ]
    else:
        kinds = [ObjectSpec(c, s) for c, s in product(COLOURS, SHAPES)]
        for b, first, second, relation in product(BACKGROUNDS, kinds, kinds, ("left of", "above")):
            # Equal colours would make "which of the two" a question of shape alone.
            if first.colour != second.colour:
                there = caption(SceneSpec(b, (first, second), relation))
                back = caption(SceneSpec(b, (second, first), OPPOSITE_RELATION[relation]))
                groups.append((there, back))
    groups.sort(key=lambda group: hashlib.sha256(f"{_SPLIT_SALT} {group[0]}".encode()).hexdigest())
    return groups[: _NUM_POSITION_CAPTIONS // 2] if kind == "position" else groups


def _draw_cells(spec: SceneSpec, rng: np.random.Generator) -> list[int]:
    num_cells = GRID_CELLS * GRID_CELLS
    if spec.relation is None:
        return [int(c) for c in rng.choice(num_cells, size=len(spec.objects), replace=False)]
    allowed = [
        (a, b)
        for a, b in product(range(num_cells), repeat=2)
        if relation_holds(spec.relation, a % GRID_CELLS - b % GRID_CELLS, a // GRID_CELLS - b // GRID_CELLS)
    ]
    return list(allowed[int(rng.integers(len(allowed)))])


def place_in_cell(spec: ObjectSpec, cell: int, rng: np.random.Generator) -> SceneObject:
    """The object somewhere inside grid cell `cell` (0-8), with a radius from `CELL_RADIUS`."""
    radius = float(rng.uniform(*CELL_RADIUS))
    room = 0.5 / GRID_CELLS - radius - CELL_GAP
    centre_x = (cell % GRID_CELLS + 0.5) / GRID_CELLS
    centre_y = (cell // GRID_CELLS + 0.5) / GRID_CELLS
    dx, dy = (float(v) for v in rng.uniform(-room, room, size=2))
    return SceneObject(spec.colour, spec.shape, centre_x + dx, centre_y + dy, radius, spec.size)
