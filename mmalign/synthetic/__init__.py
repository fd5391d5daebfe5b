"""The tiny world: procedural scenes with captions, a renderer, and a scorer that knows the exact truth.

Every method in mmalign has to move this ground truth on held-out captions, on a CPU, in minutes. That needs a
world in which "is the image what the prompt asked for" is a computation and not a judgement.

* `scenes`: canvas, palette, words, captions and their splits, placement. The only home of the world's constants.
* `render`: scenes to uint8 images at any size.
* `scorer`: images and captions to hard and soft scores per part (colour, shape, size, background, count, relation).
* `pairs`: preference pairs with a known reason.

The trained models that live in this world are in `mmalign.assets`; the scripts that made them in `assets/build`.

To add a word: put it into the table in `scenes`, teach `render` to draw it and `scorer` to read it, and run
tests/synthetic, which measures the scorer on real renders. A new word reshuffles no existing caption, but it
adds captions, so the shipped models have to be built again. To add a kind of scene: a branch in `caption`, `parse`
and `sample_scene`, and its parts in `scorer`. To add a kind of pair: a branch in `pairs.preference_pairs`.

Everything here is numpy and draws its randomness from a generator or seed that is passed in.
"""

from .pairs import PAIR_KINDS, PreferencePair, preference_pairs
from .render import render
from .scenes import Scene, SceneObject, SceneSpec, caption, captions, parse, sample_scene, sample_scenes
from .scorer import ImageScore, PartScore, Scores, score

__all__ = [
    "PAIR_KINDS",
    "ImageScore",
    "PartScore",
    "PreferencePair",
    "Scene",
    "SceneObject",
    "SceneSpec",
    "Scores",
    "caption",
    "captions",
    "parse",
    "preference_pairs",
    "render",
    "sample_scene",
    "sample_scenes",
    "score",
]
