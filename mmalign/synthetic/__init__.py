"""The tiny world: procedural scenes with captions and questions, a renderer, and scorers that know the exact truth.

Every method in mmalign has to move this ground truth on held-out captions, on a CPU, in minutes. That needs a
world in which "is the image what the prompt asked for" is a computation and not a judgement.

* `scenes`: canvas, palette, words, captions and their splits, placement. The only home of the world's constants.
* `render`: scenes to uint8 images at any size.
* `scorer`: images and captions to hard and soft scores per part (colour, shape, size, background, count, relation).
* `pairs`: preference pairs of images with a known reason.

For models that answer in text:

* `questions`: scenes of one to three objects, true captions, questions with exact answers, sets of images.
* `answers`: free text to exact scores: objects mentioned, absent and missed; short answers right or wrong.
* `answer_pairs`: preference pairs of answers with a known reason.

The trained models that live in this world are in `mmalign.assets`; the scripts that made them in `assets/build`.

To add a word: put it into the table in `scenes`, teach `render` to draw it and `scorer` to read it, and run
tests/synthetic, which measures the scorer on real renders. A new word reshuffles no existing caption, but it
adds captions, so the shipped models have to be built again. To add a kind of scene: a branch in `caption`, `parse`
and `sample_scene`, and its parts in `scorer`. To add a kind of pair: a branch in `pairs.preference_pairs` or
`answer_pairs.answer_pairs`. To add a kind of question: a branch in `questions.ask` and its answers in `SHORT_ANSWERS`.

Everything here is numpy and draws its randomness from a generator or seed that is passed in.
"""

from .answer_pairs import ANSWER_PAIR_KINDS, AnswerPair, answer_pairs
from .answers import CaptionScore, score_caption, short_answer_is_right
from .pairs import PAIR_KINDS, PreferencePair, preference_pairs
from .questions import EvaluationQuestion, Question, ask, describe, evaluation_questions, sample_objects_scene
from .render import render
from .scenes import Scene, SceneObject, SceneSpec, caption, captions, parse, sample_scene, sample_scenes
from .scorer import ImageScore, PartScore, Scores, score

__all__ = [
    "ANSWER_PAIR_KINDS",
    "PAIR_KINDS",
    "AnswerPair",
    "CaptionScore",
    "EvaluationQuestion",
    "ImageScore",
    "PartScore",
    "PreferencePair",
    "Question",
    "Scene",
    "SceneObject",
    "SceneSpec",
    "Scores",
    "answer_pairs",
    "ask",
    "caption",
    "captions",
    "describe",
    "evaluation_questions",
    "parse",
    "preference_pairs",
    "render",
    "sample_objects_scene",
    "sample_scene",
    "sample_scenes",
    "score",
    "score_caption",
    "short_answer_is_right",
]
