"""Preference pairs of answers whose truth is known: the true caption of an image against one with a wrong attribute.

A pair is a function of (seed, split, index) alone, so a longer list starts with the shorter one. Both answers have the
same number of words: a rejected answer that is longer or shorter than the truth teaches length before it teaches truth.

Pairs whose rejected answers are a model's own (what a model has to unlearn, rather than what an editor thought of) need
that model; those of the shipped one are data, in `mmalign.assets` under llava-pairs.

Shapes: H = W = IMAGE_PX, RGB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .questions import CAPTION_QUESTION, IMAGE_MARK, IMAGE_PX, describe, sample_objects_scene, swap_attribute
from .render import render
from .scenes import SPLITS, ObjectSpec, Split

AnswerPairKind = Literal["swapped_attribute"]
ANSWER_PAIR_KINDS: tuple[AnswerPairKind, ...] = ("swapped_attribute",)


@dataclass(frozen=True, slots=True, eq=False)
class AnswerPair:
    """One prompt with its image (uint8 [H,W,3], at the `<image>` mark), and two answers.

    `truth` is the true answer (here the chosen one); `wrong` says which attribute of which object, counted from 0 in
    reading order, is false in `rejected`. `id` is unique within and across calls with different arguments.
    """

    id: str
    prompt: str
    image_HWC: np.ndarray
    chosen: str
    rejected: str
    truth: str
    wrong: tuple[str, int]


def answer_pairs(kind: AnswerPairKind, num_pairs: int, seed: int, split: Split = "train") -> tuple[AnswerPair, ...]:
    """`num_pairs` pairs of the given kind.

    Args:
        kind: "swapped_attribute": chosen is the true caption; in rejected one object has another colour or shape, such
            that it is not in the image. A third of the images each show one, two and three objects.
        num_pairs: at least 1.
        seed: a non-negative integer.
        split: which sets of objects are drawn, see `questions`.

    Raises ValueError for an unknown kind or split, or a number out of range.
    """
    if kind not in ANSWER_PAIR_KINDS:
        raise ValueError(f"answer pair kind {kind!r} is unknown; allowed: {', '.join(ANSWER_PAIR_KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; allowed: {', '.join(SPLITS)}")
    if num_pairs < 1:
        raise ValueError(f"num_pairs {num_pairs} is out of range; allowed: 1 or more")
    if seed < 0:
        raise ValueError(f"seed {seed} is out of range; allowed: 0 or more")
    scenes, rejected, wrong = [], [], []
    for index in range(num_pairs):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        scene = sample_objects_scene(split, rng, 1 + index % 3)
        objects = [ObjectSpec(o.colour, o.shape) for o in scene.objects]
        place = int(rng.integers(len(objects)))
        old, objects[place] = objects[place], swap_attribute(objects, place, rng)
        scenes.append(scene)
        rejected.append(describe(objects))
        wrong.append(("colour" if objects[place].colour != old.colour else "shape", place))
    return tuple(
        AnswerPair(
            id=f"{kind}-{split}-{seed}-{index}",
            prompt=f"{IMAGE_MARK}\n{CAPTION_QUESTION}",
            image_HWC=image_HWC,
            chosen=describe(scene.objects),
            rejected=text,
            truth=describe(scene.objects),
            wrong=names,
        )
        for index, (scene, image_HWC, text, names) in enumerate(
            zip(scenes, render(scenes, IMAGE_PX), rejected, wrong, strict=True)
        )
    )
