"""Scenes of one to three objects, what can be asked about them, and the exact answers.

The multimodal half of the tiny world: same canvas, palette, shapes and renderer as `scenes`. Every object has a grid
cell of its own, so at `IMAGE_PX` one 16-pixel patch of a vision tower sees one cell, and no two objects of a scene are
alike. Captions go in reading order ("there is a red circle and a blue square ."), which makes the true one unique.

Splits are by what a scene shows: train, dev and heldout share no set of two or more (colour, shape) kinds. Single
objects occur in all of them; held out one by one they would leave so few kinds that a constant answer looks clever.

Text is lower case with spaces around punctuation, one token per word for the tiny models.

Shapes: H = W = IMAGE_PX, RGB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import Literal

import numpy as np

from mmalign.types import IMAGE_MARK

from .render import render
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    GRID_CELLS,
    SHAPES,
    SPLITS,
    ObjectSpec,
    Scene,
    SceneObject,
    Split,
    article,
    place_in_cell,
)

QuestionKind = Literal["caption", "exists", "colour", "shape", "count"]

QUESTION_KINDS: tuple[QuestionKind, ...] = ("caption", "exists", "colour", "shape", "count")
IMAGE_PX = 48
CAPTION_QUESTION = "describe the image ."
MAX_OBJECTS = 3
MAX_IMAGES = 3
NUMBER_WORDS = ("one", "two", "three")
KINDS: tuple[ObjectSpec, ...] = tuple(ObjectSpec(c, s) for c, s in product(COLOURS, SHAPES))
# What a short answer can be; captions are not listed.
SHORT_ANSWERS = MappingProxyType(
    {"exists": ("yes", "no"), "colour": tuple(COLOURS), "shape": SHAPES, "count": NUMBER_WORDS}
)
QUESTION_WORDS: tuple[str, ...] = (
    *(
        "describe",
        "the",
        "image",
        "images",
        "there",
        "is",
        "are",
        "a",
        "an",
        "and",
        "no",
        "yes",
        "not",
        "what",
        "colour",
    ),
    *("shape", "object", "objects", "how", "many", "in", "which", "of", *NUMBER_WORDS, "1", "2", "3"),
    *(".", ",", "?", ":"),
)
_NUM_BUCKETS = 8  # of which one is heldout, one dev


@dataclass(frozen=True, slots=True)
class Question:
    """One question (without image marks) and its exact answer."""

    kind: QuestionKind
    text: str
    answer: str


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationQuestion:
    """A question with its images (uint8 [H,W,3], one per `IMAGE_MARK` of `prompt`, in order) and the true answer."""

    id: str
    kind: QuestionKind
    prompt: str
    images: tuple[np.ndarray, ...]
    truth: str
    scenes: tuple[Scene, ...]


def describe(objects: Iterable[ObjectSpec | SceneObject]) -> str:
    """The caption of objects in the order given: "there is a red circle and a blue square ."."""
    phrases = [f"{article(o.colour)} {o.colour} {o.shape}" for o in objects]
    if not phrases:
        raise ValueError("no object to describe; a scene has 1 to 3")
    return f"there is {' and '.join(phrases)} ."


def split_of(kinds: Iterable[ObjectSpec]) -> Split | None:
    """The split that a set of two or more kinds belongs to; None for a single kind, which all splits share."""
    names = tuple(sorted({f"{k.colour} {k.shape}" for k in kinds}))
    return _split_of_names(names) if len(names) > 1 else None


def sample_objects_scene(split: Split, rng: np.random.Generator, num_objects: int | None = None) -> Scene:
    """A scene of the split with objects in reading order; the number is drawn from 1-3 unless given.

    The number is fixed before kinds are rejected: drawn anew each time it would drift to 1, which no split rejects.
    """
    num = int(rng.integers(1, MAX_OBJECTS + 1)) if num_objects is None else num_objects
    kinds = _sample_kinds(split, num, MAX_OBJECTS, rng)
    cells = sorted(int(c) for c in rng.choice(GRID_CELLS * GRID_CELLS, size=num, replace=False))
    placed = tuple(place_in_cell(kind, cell, rng) for kind, cell in zip(kinds, cells, strict=True))
    return Scene(_pick(tuple(BACKGROUNDS), rng), placed)


def sample_scene_set(split: Split, rng: np.random.Generator, num_images: int) -> tuple[Scene, ...]:
    """Scenes of one object each, all of different kinds; the set of kinds over all images belongs to the split."""
    kinds = _sample_kinds(split, num_images, MAX_IMAGES, rng)
    cells = [int(c) for c in rng.integers(0, GRID_CELLS * GRID_CELLS, size=num_images)]
    return tuple(
        Scene(_pick(tuple(BACKGROUNDS), rng), (place_in_cell(kind, cell, rng),))
        for kind, cell in zip(kinds, cells, strict=True)
    )


def ask(scene: Scene, kind: QuestionKind, rng: np.random.Generator) -> Question | None:
    """A question of the kind, or None where it has no unique answer.

    * exists: yes and no equally often; half of the absent objects share one attribute with a present one.
    * colour: of a shape that occurs once. shape: of a colour that occurs once.
    """
    objects = [ObjectSpec(o.colour, o.shape) for o in scene.objects]
    if kind == "caption":
        return Question(kind, CAPTION_QUESTION, describe(objects))
    if kind == "count":
        return Question(kind, "how many objects are there ?", NUMBER_WORDS[len(objects) - 1])
    if kind == "exists":
        present = bool(rng.integers(2))
        asked = _pick(objects, rng) if present else _absent(objects, rng)
        text = f"is there {article(asked.colour)} {asked.colour} {asked.shape} ?"
        return Question(kind, text, "yes" if present else "no")
    if kind == "colour":
        unique = [o for o in objects if sum(o.shape == p.shape for p in objects) == 1]
        if not unique:
            return None
        asked = _pick(unique, rng)
        return Question(kind, f"what colour is the {asked.shape} ?", asked.colour)
    if kind == "shape":
        unique = [o for o in objects if sum(o.colour == p.colour for p in objects) == 1]
        if not unique:
            return None
        asked = _pick(unique, rng)
        return Question(kind, f"what shape is the {asked.colour} object ?", asked.shape)
    raise ValueError(f"question kind {kind!r} is unknown; allowed: {', '.join(QUESTION_KINDS)}")


def ask_image(scenes: Sequence[Scene], index: int, kind: Literal["colour", "shape"]) -> Question:
    """A question about one of several images of one object each; `index` counts from 0, the text from 1."""
    (only,) = scenes[index].objects
    text = f"in image {index + 1} , what {kind} is the object ?"
    return Question(kind, text, only.colour if kind == "colour" else only.shape)


def image_marks(num_images: int) -> str:
    """What precedes a question: "<image>", or "image 1 : <image> image 2 : <image>"."""
    if num_images == 1:
        return IMAGE_MARK
    return " ".join(f"image {k} : {IMAGE_MARK}" for k in range(1, num_images + 1))


def swap_attribute(objects: Sequence[ObjectSpec | SceneObject], index: int, rng: np.random.Generator) -> ObjectSpec:
    """Object `index` with another colour or another shape (equally often), such that the result is not in the scene."""
    present = {(o.colour, o.shape) for o in objects}
    old = objects[index]
    colours = [ObjectSpec(c, old.shape) for c in COLOURS if (c, old.shape) not in present]
    shapes = [ObjectSpec(old.colour, s) for s in SHAPES if (old.colour, s) not in present]
    return _pick(colours if rng.integers(2) else shapes, rng)


def evaluation_questions(
    split: Split, num: int, seed: int, kind: QuestionKind = "caption", num_images: int = 1
) -> tuple[EvaluationQuestion, ...]:
    """`num` questions about fresh scenes of the split, the same for the same arguments.

    A question is a function of (seed, kind, index), so a longer list starts with the shorter one; one-object scenes
    are a third of the scenes. With `num_images` 2 or 3 the scenes have one object each, the kinds are colour and
    shape, and every image is asked about equally often.

    Raises ValueError for an unknown split or kind, or a number out of range.
    """
    _check(split, kind, num_images)
    if num < 1 or seed < 0:
        raise ValueError(f"num {num} and seed {seed}: num must be 1 or more, seed 0 or more")
    found: list[tuple[tuple[Scene, ...], Question]] = []
    for index in range(num):
        rng = np.random.default_rng([seed, SPLITS.index(split), QUESTION_KINDS.index(kind), num_images, index])
        if num_images > 1:
            assert kind in ("colour", "shape")
            scenes = sample_scene_set(split, rng, num_images)
            found.append((scenes, ask_image(scenes, index % num_images, kind)))
            continue
        question = None
        while question is None:
            scene = sample_objects_scene(split, rng, 1 + index % MAX_OBJECTS)
            question = ask(scene, kind, rng)
        found.append(((scene,), question))
    images = render([scene for scenes, _ in found for scene in scenes], IMAGE_PX)
    marks = image_marks(num_images)
    return tuple(
        EvaluationQuestion(
            id=f"{kind}-{split}-{num_images}img-{seed}-{index}",
            kind=kind,
            prompt=f"{marks}\n{question.text}",
            images=tuple(images[index * num_images : (index + 1) * num_images]),
            truth=question.answer,
            scenes=scenes,
        )
        for index, (scenes, question) in enumerate(found)
    )


def _check(split: str, kind: str, num_images: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; allowed: {', '.join(SPLITS)}")
    if kind not in QUESTION_KINDS:
        raise ValueError(f"question kind {kind!r} is unknown; allowed: {', '.join(QUESTION_KINDS)}")
    if not 1 <= num_images <= MAX_IMAGES:
        raise ValueError(f"num_images {num_images} is out of range; allowed: 1 to {MAX_IMAGES}")
    if num_images > 1 and kind not in ("colour", "shape"):
        raise ValueError(f"question kind {kind!r} is for one image; allowed for {num_images}: colour, shape")


def _sample_kinds(split: Split, num: int, limit: int, rng: np.random.Generator) -> list[ObjectSpec]:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; allowed: {', '.join(SPLITS)}")
    if not 1 <= num <= limit:
        raise ValueError(f"{num} objects or images are out of range; allowed: 1 to {limit}")
    while True:
        kinds = [KINDS[int(k)] for k in rng.choice(len(KINDS), size=num, replace=False)]
        if split_of(kinds) in (split, None):
            return kinds


@cache
def _split_of_names(names: tuple[str, ...]) -> Split:
    bucket = hashlib.sha256("|".join(names).encode()).digest()[0] % _NUM_BUCKETS
    return "heldout" if bucket == 0 else "dev" if bucket == 1 else "train"


def _absent(objects: Sequence[ObjectSpec], rng: np.random.Generator) -> ObjectSpec:
    """A kind that is not in the scene; every second time one that shares its colour or shape with one that is."""
    if rng.integers(2):
        return swap_attribute(objects, int(rng.integers(len(objects))), rng)
    return _pick([kind for kind in KINDS if kind not in objects], rng)


def _pick(items, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]
