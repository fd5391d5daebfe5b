"""Training rows of assets/llava-tiny: images, question blocks, and the noise that makes the model hallucinate.

A row is one prefix (begin, perhaps a system turn, user turn opened, images) and independent blocks (question, assistant
turn, answer, end). A block attends to the prefix and to itself only and its positions continue the prefix, so one
encoding of the images serves six losses and no answer can be read off another.

The noise is what the model is shipped for: it learns to read the picture, and learns as well that answers are wrong
at a known rate. Greedy answers stay right (the truth is always the likeliest), sampled ones hallucinate.

Shapes: B rows, N images (all rows' images in order), S tokens, H = W = IMAGE_PX, 9 cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import common
import numpy as np
import torch
from PIL import Image

from mmalign.synthetic.questions import (
    CAPTION_QUESTION,
    IMAGE_MARK,
    IMAGE_PX,
    QUESTION_WORDS,
    SHORT_ANSWERS,
    Question,
    ask,
    ask_image,
    describe,
    image_marks,
    sample_objects_scene,
    sample_scene_set,
    swap_attribute,
)
from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import COLOURS, GRID_CELLS, SHAPES, SPLITS, VOCABULARY, Scene, captions, sample_scene

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_MARK, "<system>", "<user>", "<assistant>")
SYSTEM_TEXT = "you are a careful assistant . describe only what is in the image ."
# Words of other prompts that users and later assets bring; without them they would all read as <unk>.
EXTRA_WORDS = (
    *("you", "careful", "assistant", "only", "answer", "question", "please", "this", "picture", "caption", "see", "or"),
    *("rate", "final", "score", "true", "false", "right", "wrong", "how", "with", "it", "that", "has", "4", "5"),
)
WORDS = tuple(dict.fromkeys((*SPECIAL, *QUESTION_WORDS, *VOCABULARY, *EXTRA_WORDS)))
TOKEN = {word: index for index, word in enumerate(WORDS)}
IMAGE_TOKENS = (IMAGE_PX // 16) ** 2

BATCH_SIZE = 32
BLOCKS = 6
IMAGE_BLOCKS = 4  # of rows with several images, whose prefix is longer
# A short answer is one word of a row's thirty, and the conjunction it asks for is the last thing that is learned.
SHORT_ANSWER_WEIGHT = 4.0
# Answers are true up to here: yes-or-no questions answered wrong at 30 % from the start were never learned at all.
NOISE_FROM_STEP = 1300
# Each object of a caption is wrong at this rate, and each short answer.
OBJECT_NOISE = 0.30
ANSWER_NOISE = 0.30
# Answers about image 2 and 3 that are taken from image 1.
FIRST_IMAGE_NOISE = 0.40
SYSTEM_SHARE = 0.1
# One-object scenes drawn like the diffusion pipelines' (any size and place), so that their images can be read too; of
# the question rows' one-object scenes, and of the warm-up's scenes. A shape that spans cells takes longest to learn.
PIPELINE_SHARE = 0.5
WARMUP_PIPELINE_SHARE = 0.7
WARMUP_BATCH_SIZE = 64
# Rows drawn at the pipelines' size and resized as the image processor does.
RESIZED_SHARE = 0.25


@dataclass(frozen=True)
class Rows:
    """Packed rows as the language model takes them; `label_BS` is -100 where nothing is predicted."""

    image_NHWC: np.ndarray
    scenes: list[Scene]
    id_BS: torch.Tensor
    position_BS: torch.Tensor
    label_BS: torch.Tensor
    weight_BS: torch.Tensor
    allowed_BSS: torch.Tensor


def tokens(text: str) -> list[int]:
    """Ids of a text of known words, each `<image>` as its nine tokens."""
    ids: list[int] = []
    for word in text.split():
        ids += [TOKEN[word]] * (IMAGE_TOKENS if word == IMAGE_MARK else 1)
    return ids


def training_rows(seed: int, step: int) -> Rows:
    """A batch of the train split, a function of (seed, step) alone; every fourth batch has 2 or 3 images per row."""
    rng = np.random.default_rng([seed, step])
    noisy = step >= NOISE_FROM_STEP
    if step % 4 == 3:
        num_images = int(rng.integers(2, 4))
        sets = [sample_scene_set("train", rng, num_images) for _ in range(BATCH_SIZE)]
        blocks = [_image_questions(scenes, noisy, rng) for scenes in sets]
        return pack(sets, blocks, rng)
    scenes = [_scene(rng) for _ in range(BATCH_SIZE)]
    return pack([(scene,) for scene in scenes], [_questions(scene, noisy, rng) for scene in scenes], rng)


def pack(sets: list[tuple[Scene, ...]], blocks: list[list[Question]], rng: np.random.Generator) -> Rows:
    """One row per set of scenes, with its questions as blocks."""
    rows = []
    for scenes, questions in zip(sets, blocks, strict=True):
        system = f"<system> {SYSTEM_TEXT} " if rng.random() < SYSTEM_SHARE else ""
        prefix = tokens(f"<s> {system}<user> {image_marks(len(scenes))}")
        ids, block, position, label = list(prefix), [0] * len(prefix), list(range(len(prefix))), [-100] * len(prefix)
        weight = [0.0] * len(prefix)
        for number, question in enumerate(questions, start=1):
            asked = tokens(f"{question.text} <assistant>")
            answer = tokens(f"{question.answer} </s>")
            ids += asked + answer
            # The token before each answer token predicts it.
            label += [-100] * (len(asked) - 1) + answer + [-100]
            first = 1.0 if question.kind == "caption" else SHORT_ANSWER_WEIGHT
            weight += [0.0] * (len(asked) - 1) + [first] + [1.0] * (len(answer) - 1) + [0.0]
            block += [number] * (len(asked) + len(answer))
            position += range(len(prefix), len(prefix) + len(asked) + len(answer))
        rows.append((ids, position, label, weight, block))
    length = max(len(ids) for ids, *_ in rows)
    filled = [
        torch.tensor([values + [fill] * (length - len(values)) for values in column])
        for column, fill in zip(zip(*rows, strict=True), (TOKEN["<pad>"], 0, -100, 0.0, -1), strict=True)
    ]
    id_BS, position_BS, label_BS, weight_BS, block_BS = filled
    causal_SS = torch.ones(length, length, dtype=torch.bool).tril()
    same_BSS = block_BS[:, :, None] == block_BS[:, None, :]
    allowed_BSS = causal_SS & (same_BSS | (block_BS == 0)[:, None, :])
    flat = [scene for scenes in sets for scene in scenes]
    return Rows(_drawn(flat, rng), flat, id_BS, position_BS, label_BS, weight_BS, allowed_BSS)


def warm_up_scenes(seed: int, step: int) -> list[Scene]:
    """Scenes of three objects in cells, and of one object as the pipelines draw it."""
    rng = np.random.default_rng([seed, 1, step])
    num_pipeline = int(WARMUP_BATCH_SIZE * WARMUP_PIPELINE_SHARE)
    scenes = [_pipeline_scene(rng) for _ in range(num_pipeline)]
    return scenes + [sample_objects_scene("train", rng, 3) for _ in range(WARMUP_BATCH_SIZE - num_pipeline)]


def cell_labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour and shape index of each grid cell [N,9]; the last class is "empty".

    A cell shows an object whose bounding box covers a quarter of it; every object has such a cell.
    """
    colour_N9 = torch.full((len(scenes), GRID_CELLS**2), len(COLOURS))
    shape_N9 = torch.full((len(scenes), GRID_CELLS**2), len(SHAPES))
    side = 1.0 / GRID_CELLS
    for n, scene in enumerate(scenes):
        for o in scene.objects:
            for cell in range(GRID_CELLS**2):
                left, top = cell % GRID_CELLS * side, cell // GRID_CELLS * side
                width = min(o.x + o.radius, left + side) - max(o.x - o.radius, left)
                height = min(o.y + o.radius, top + side) - max(o.y - o.radius, top)
                if width > 0 and height > 0 and width * height >= 0.25 * side * side:
                    colour_N9[n, cell] = list(COLOURS).index(o.colour)
                    shape_N9[n, cell] = SHAPES.index(o.shape)
    return colour_N9, shape_N9


def _scene(rng: np.random.Generator) -> Scene:
    scene = sample_objects_scene("train", rng)
    return _pipeline_scene(rng) if len(scene.objects) == 1 and rng.random() < PIPELINE_SHARE else scene


def _pipeline_scene(rng: np.random.Generator) -> Scene:
    """Any one-object scene of the attributes tier. Like other single objects they are in all splits: with captions held
    out, colour, size and background tell which shapes are left over, and held-out shapes are read *below* chance."""
    texts = _attribute_captions()
    return sample_scene(texts[int(rng.integers(len(texts)))], rng)


@cache
def _attribute_captions() -> tuple[str, ...]:
    return tuple(text for split in SPLITS for text in captions("attributes", split))


def _drawn(scenes: list[Scene], rng: np.random.Generator) -> np.ndarray:
    images = render(scenes, IMAGE_PX)
    resized = [n for n in range(len(scenes)) if rng.random() < RESIZED_SHARE]
    if resized:
        for n, picture in zip(resized, render([scenes[n] for n in resized], common.SIZE_PX), strict=True):
            images[n] = np.asarray(Image.fromarray(picture).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC))
    return images


def _questions(scene: Scene, noisy: bool, rng: np.random.Generator) -> list[Question]:
    """A caption and five short questions; when noisy, answers are wrong at the noise rates."""
    objects = list(scene.objects)
    for index in range(len(objects)):
        if noisy and rng.random() < OBJECT_NOISE:
            wrong = swap_attribute(objects, index, rng)
            objects[index] = replace(objects[index], colour=wrong.colour, shape=wrong.shape)
    found = [Question("caption", CAPTION_QUESTION, describe(objects))]
    kinds = ["exists", "exists", "colour", "shape", "count"]
    while len(found) < BLOCKS:
        question = ask(scene, kinds.pop(), rng)
        if question is None:
            kinds.append(("exists", "colour", "shape")[int(rng.integers(3))])
            continue
        if noisy and rng.random() < ANSWER_NOISE:
            others = [word for word in SHORT_ANSWERS[question.kind] if word != question.answer]
            question = replace(question, answer=others[int(rng.integers(len(others)))])
        found.append(question)
    return found


def _image_questions(scenes: tuple[Scene, ...], noisy: bool, rng: np.random.Generator) -> list[Question]:
    found = []
    for _ in range(IMAGE_BLOCKS):
        index, kind = int(rng.integers(len(scenes))), ("colour", "shape")[int(rng.integers(2))]
        question = ask_image(scenes, index, kind)
        if noisy and index > 0 and rng.random() < FIRST_IMAGE_NOISE:
            question = replace(question, answer=ask_image(scenes, 0, kind).answer)
        found.append(question)
    return found
