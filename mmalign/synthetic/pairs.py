"""Preference pairs whose truth is known: a render of the caption against a render that gets one or two parts wrong.

A pair is a function of (seed, index) alone, so a longer list starts with the shorter one and any subset can be
made anywhere. The caption order of a seed is a shuffle that repeats only when all captions were used.

Shapes: H = W = size_px, RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .render import render
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_WORDS,
    MARGIN,
    OPPOSITE_RELATION,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Split,
    Tier,
    captions,
    sample_scene,
)

PairKind = Literal["wrong_attribute"]
PAIR_KINDS: tuple[PairKind, ...] = ("wrong_attribute",)


@dataclass(frozen=True, slots=True, eq=False)
class PreferencePair:
    """One prompt and two uint8 images [H,W,3]; `wrong` names the parts that are false in `rejected`.

    The names are those of `scorer.PartScore`. `id` is unique within and across calls with different arguments.
    """

    id: str
    prompt: str
    chosen_HWC: np.ndarray
    rejected_HWC: np.ndarray
    wrong: tuple[str, ...]


def preference_pairs(
    kind: PairKind,
    num_pairs: int,
    seed: int,
    tier: Tier = "attributes",
    split: Split = "train",
    size_px: int = 64,
) -> tuple[PreferencePair, ...]:
    """`num_pairs` pairs of the given kind.

    Args:
        kind: "wrong_attribute": chosen is a render of the caption; rejected is the same scene with one or two
            parts made wrong (half the pairs each; one for scenes of several objects). Objects keep their place;
            one that grows is moved only as far as the canvas demands.
        num_pairs: at least 1.
        seed: a non-negative integer.
        size_px: side of the images.

    Raises ValueError for an unknown kind, tier or split, or a number out of range.
    """
    if kind not in PAIR_KINDS:
        raise ValueError(f"pair kind {kind!r} is unknown; allowed: {', '.join(PAIR_KINDS)}")
    if num_pairs < 1:
        raise ValueError(f"num_pairs {num_pairs} is out of range; allowed: 1 or more")
    if seed < 0:
        raise ValueError(f"seed {seed} is out of range; allowed: 0 or more")
    texts = captions(tier, split)
    prompts = [_prompt(texts, seed, index) for index in range(num_pairs)]
    scenes: list[Scene] = []
    wrong: list[tuple[str, ...]] = []
    for index, prompt in enumerate(prompts):
        rng = np.random.default_rng([seed, 1, index])
        chosen = sample_scene(prompt, rng)
        rejected, names = _spoil(chosen, rng)
        scenes += [chosen, rejected]
        wrong.append(names)
    images = render(scenes, size_px)
    return tuple(
        PreferencePair(
            f"{kind}-{tier}-{split}-{size_px}px-{seed}-{index}", prompt, images[2 * index], images[2 * index + 1], names
        )
        for index, (prompt, names) in enumerate(zip(prompts, wrong, strict=True))
    )


def _prompt(texts: Sequence[str], seed: int, index: int) -> str:
    epoch, position = divmod(index, len(texts))
    order = np.random.default_rng([seed, 0, epoch]).permutation(len(texts))
    return texts[int(order[position])]


def _spoil(scene: Scene, rng: np.random.Generator) -> tuple[Scene, tuple[str, ...]]:
    """The scene with parts of its caption made wrong, and the names of those parts."""
    if len(scene.objects) == 1:
        choices = tuple(_SPOIL_ONE)
        number = int(rng.integers(1, 3))
        picked = sorted(int(i) for i in rng.choice(len(choices), size=number, replace=False))
        for i in picked:
            scene = _SPOIL_ONE[choices[i]](scene, rng)
        return scene, tuple(choices[i] for i in picked)
    choices = ("background", "colour", "shape", "relation" if scene.relation is not None else "count")
    name = choices[int(rng.integers(len(choices)))]
    if name == "relation":
        first, second = scene.objects
        swapped = (
            replace(first, x=second.x, y=second.y),
            replace(second, x=first.x, y=first.y),
        )
        assert scene.relation is not None
        return Scene(scene.background, swapped, OPPOSITE_RELATION[scene.relation]), (name,)
    if name == "count":
        number = _other(COUNT_WORDS.values(), len(scene.objects), rng)
        objects = scene.objects[:number]
        free = [c for c in range(9) if c not in {o.cell for o in scene.objects}]
        free = [free[int(i)] for i in rng.permutation(len(free))]
        for cell in free[: number - len(objects)]:
            pattern = scene.objects[0]
            shift_x = (cell % 3 - pattern.cell % 3) / 3
            shift_y = (cell // 3 - pattern.cell // 3) / 3
            objects += (replace(pattern, x=pattern.x + shift_x, y=pattern.y + shift_y),)
        return replace(scene, objects=objects), (name,)
    return _SPOIL_ONE[name](scene, rng), (name,)


def _wrong_background(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, background=_other(BACKGROUNDS, scene.background, rng))


def _wrong_colour(scene: Scene, rng: np.random.Generator) -> Scene:
    taken = {o.colour for o in scene.objects}
    colour = _other(
        [c for c in COLOURS if c not in taken or c == scene.objects[0].colour], scene.objects[0].colour, rng
    )
    return _with_first_kind(scene, lambda o: replace(o, colour=colour))


def _wrong_shape(scene: Scene, rng: np.random.Generator) -> Scene:
    shape = _other(SHAPES, scene.objects[0].shape, rng)
    return _with_first_kind(scene, lambda o: replace(o, shape=shape))


def _wrong_size(scene: Scene, rng: np.random.Generator) -> Scene:
    (only,) = scene.objects
    assert only.size is not None
    size = _other(SIZES, only.size, rng)
    radius = float(rng.uniform(*SIZES[size]))
    low, high = MARGIN + radius, 1.0 - MARGIN - radius
    x, y = (min(max(v, low), high) for v in (only.x, only.y))
    return replace(scene, objects=(replace(only, size=size, radius=radius, x=x, y=y),))


def _with_first_kind(scene: Scene, change: Callable[[SceneObject], SceneObject]) -> Scene:
    """Change all objects of a counted scene, and only the first of two related ones."""
    number = 1 if scene.relation is not None else len(scene.objects)
    return replace(scene, objects=tuple(change(o) for o in scene.objects[:number]) + scene.objects[number:])


def _other(words, current, rng: np.random.Generator):
    rest = [word for word in words if word != current]
    return rest[int(rng.integers(len(rest)))]


_SPOIL_ONE: dict[str, Callable[[Scene, np.random.Generator], Scene]] = {
    "background": _wrong_background,
    "colour": _wrong_colour,
    "shape": _wrong_shape,
    "size": _wrong_size,
}
