"""Scenes of several objects, their splits, and questions whose answers are checked against the scene by other means."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from mmalign.synthetic.questions import (
    IMAGE_PX,
    KINDS,
    QUESTION_KINDS,
    QUESTION_WORDS,
    SHORT_ANSWERS,
    ask,
    ask_image,
    describe,
    evaluation_questions,
    image_marks,
    sample_objects_scene,
    sample_scene_set,
    split_of,
    swap_attribute,
)
from mmalign.synthetic.scenes import COLOURS, SHAPES, SPLITS, VOCABULARY, ObjectSpec, Scene, SceneObject
from mmalign.synthetic.scorer import MAX_COLOUR_DISTANCE, read_objects

NUM = 400
# Of sets of "red circle" and one more kind. Shipped models were trained on this partition.
FROZEN_SPLITS = ["train", "dev", "train", "train", "dev", "train", "heldout", "train", "train", "dev"]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_objects_scene("train", rng) for _ in range(NUM)]


def kinds_of(scene: Scene) -> list[ObjectSpec]:
    return [ObjectSpec(o.colour, o.shape) for o in scene.objects]


def scene_of(*words: str) -> Scene:
    """A scene of "red circle", … in reading order."""
    objects = [SceneObject(*text.split(), x=(k + 0.5) / 3, y=0.5, radius=0.12) for k, text in enumerate(words)]
    return Scene("white", tuple(objects))


def test_splits_partition_all_sets_of_kinds() -> None:
    sets = [set_ for size in (2, 3) for set_ in combinations(KINDS, size)]
    shares = Counter(split_of(set_) for set_ in sets)
    assert set(shares) == set(SPLITS)
    assert shares["heldout"] / len(sets) == pytest.approx(1 / 8, abs=0.02)
    assert shares["dev"] / len(sets) == pytest.approx(1 / 8, abs=0.02)
    for kind in KINDS:
        assert split_of([kind]) is None


def test_split_depends_on_the_set_alone_and_never_moves() -> None:
    red, blue = ObjectSpec("red", "circle"), ObjectSpec("blue", "square")
    assert split_of([red, blue]) == split_of([blue, red]) == split_of([blue, red, red])
    assert [split_of([KINDS[0], kind]) for kind in KINDS[1:11]] == FROZEN_SPLITS


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("num", [1, 2, 3])
def test_scenes_belong_to_their_split_and_are_laid_out_in_cells(split: str, num: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = sample_objects_scene(split, rng, num)
        cells = [o.cell for o in scene.objects]
        assert len(cells) == num
        assert cells == sorted(set(cells))
        assert len(set(kinds_of(scene))) == num
        assert split_of(kinds_of(scene)) in (split, None)
        for o in scene.objects:
            left, top = o.cell % 3 / 3, o.cell // 3 / 3
            assert left < o.x - o.radius
            assert o.x + o.radius < left + 1 / 3
            assert top < o.y - o.radius
            assert o.y + o.radius < top + 1 / 3


@pytest.mark.parametrize("split", SPLITS)
def test_number_of_objects_is_fixed_before_kinds_are_rejected(split: str) -> None:
    rng = np.random.default_rng(2)
    counts = Counter(len(sample_objects_scene(split, rng).objects) for _ in range(600))
    assert all(counts[n] / 600 == pytest.approx(1 / 3, abs=0.07) for n in (1, 2, 3))


def test_single_objects_of_every_kind_occur_in_every_split() -> None:
    for split in SPLITS:
        rng = np.random.default_rng(3)
        seen = {kinds_of(sample_objects_scene(split, rng, 1))[0] for _ in range(600)}
        assert seen == set(KINDS)


def test_caption_lists_objects_in_reading_order() -> None:
    scene = scene_of("red circle", "orange square", "blue cross")
    assert describe(scene.objects) == "there is a red circle and an orange square and a blue cross ."
    assert describe(scene.objects[:1]) == "there is a red circle ."
    with pytest.raises(ValueError, match="no object"):
        describe([])


def test_answers_are_what_a_search_of_the_scene_finds(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(4)
    for scene in scenes:
        present = kinds_of(scene)
        count = ask(scene, "count", rng)
        assert {"one": 1, "two": 2, "three": 3}[count.answer] == len(present)
        exists = ask(scene, "exists", rng)
        _, _, _, colour, shape, _ = exists.text.split()
        assert (ObjectSpec(colour, shape) in present) == (exists.answer == "yes")
        of_shape = ask(scene, "colour", rng)
        if of_shape is not None:
            shape = of_shape.text.split()[-2]
            assert [o.colour for o in present if o.shape == shape] == [of_shape.answer]
        of_colour = ask(scene, "shape", rng)
        if of_colour is not None:
            colour = of_colour.text.split()[-3]
            assert [o.shape for o in present if o.colour == colour] == [of_colour.answer]


def test_questions_without_a_unique_answer_are_not_asked() -> None:
    rng = np.random.default_rng(5)
    assert ask(scene_of("red circle", "blue circle"), "colour", rng) is None
    assert ask(scene_of("red circle", "red square"), "shape", rng) is None
    assert ask(scene_of("red circle", "blue circle", "green cross"), "colour", rng).answer == "green"
    with pytest.raises(ValueError, match=r"'size' is unknown; allowed: caption"):
        ask(scene_of("red circle"), "size", rng)


def test_existence_is_balanced_and_half_the_negatives_are_hard(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(6)
    yes = hard = no = 0
    for scene in scenes * 2:
        question = ask(scene, "exists", rng)
        if question.answer == "yes":
            yes += 1
            continue
        no += 1
        _, _, _, colour, shape, _ = question.text.split()
        hard += any(o.colour == colour or o.shape == shape for o in scene.objects)
    assert yes / (yes + no) == pytest.approx(0.5, abs=0.06)
    # Half are hard by design, and a random absent object often shares an attribute as well.
    assert 0.6 < hard / no < 0.9


def test_swapped_attribute_changes_one_word_and_is_absent(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(7)
    changed = Counter()
    for scene in scenes:
        for index, old in enumerate(kinds_of(scene)):
            new = swap_attribute(scene.objects, index, rng)
            assert new not in kinds_of(scene)
            assert (new.colour == old.colour) != (new.shape == old.shape)
            changed["colour" if new.shape == old.shape else "shape"] += 1
    assert changed["colour"] / changed.total() == pytest.approx(0.5, abs=0.06)


def test_scene_sets_are_split_by_all_their_kinds_and_asked_by_number() -> None:
    for split in SPLITS:
        rng = np.random.default_rng(8)
        for num in (2, 3):
            scenes = sample_scene_set(split, rng, num)
            kinds = [kinds_of(scene)[0] for scene in scenes]
            assert len(set(kinds)) == num
            assert split_of(kinds) == split
            for index, kind in enumerate(kinds):
                question = ask_image(scenes, index, "shape")
                assert question.answer == kind.shape
                assert f"in image {index + 1} ," in question.text
    assert image_marks(1) == "<image>"
    assert image_marks(3) == "image 1 : <image> image 2 : <image> image 3 : <image>"


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_evaluation_questions_are_a_function_of_their_arguments(kind: str) -> None:
    first = evaluation_questions("dev", 9, 3, kind)
    longer = evaluation_questions("dev", 15, 3, kind)
    for a, b in zip(first, longer, strict=False):
        assert (a.id, a.prompt, a.truth) == (b.id, b.prompt, b.truth)
        assert np.array_equal(a.images[0], b.images[0])
    assert len({q.id for q in longer}) == 15
    assert all(q.prompt.startswith("<image>\n") for q in longer)
    assert all(q.images[0].shape == (IMAGE_PX, IMAGE_PX, 3) for q in longer)
    other_seed = evaluation_questions("dev", 15, 4, kind)
    assert not np.array_equal(other_seed[0].images[0], longer[0].images[0])
    assert Counter(len(q.scenes[0].objects) for q in longer)[2] >= 4


def test_evaluation_images_show_what_the_truth_says() -> None:
    """Read back by the diffusion scorer, which shares no code with the captions."""
    single = [q for q in evaluation_questions("heldout", 90, 0) if len(q.scenes[0].objects) == 1]
    reading = read_objects(np.stack([q.images[0] for q in single]))
    right = 0
    for n, question in enumerate(single):
        (only,) = question.scenes[0].objects
        assert np.linalg.norm(reading.colour_PC[n] - np.array(COLOURS[only.colour])) < MAX_COLOUR_DISTANCE
        right += SHAPES[int(reading.overlap_PS[n].argmax())] == only.shape
        assert f"{only.colour} {only.shape}" in question.truth
    assert right >= 0.9 * len(single)


def test_no_heldout_scene_is_a_train_or_dev_scene() -> None:
    def sets(split: str) -> set[frozenset[ObjectSpec]]:
        asked = evaluation_questions(split, 300, 0)
        return {frozenset(kinds_of(q.scenes[0])) for q in asked if len(q.scenes[0].objects) > 1}

    train, dev, heldout = (sets(split) for split in SPLITS)
    assert not train & dev
    assert not train & heldout
    assert not dev & heldout
    assert len(heldout) > 100


@pytest.mark.parametrize("num_images", [2, 3])
def test_several_images_stand_in_the_order_of_their_marks(num_images: int) -> None:
    asked = evaluation_questions("dev", 12, 0, "colour", num_images)
    targets = Counter()
    for question in asked:
        assert question.prompt.count("<image>") == num_images == len(question.images)
        target = int(question.prompt.split("in image ")[1].split()[0]) - 1
        targets[target] += 1
        assert question.scenes[target].objects[0].colour == question.truth
    assert set(targets.values()) == {12 // num_images}


def test_every_word_is_in_the_vocabulary() -> None:
    known = {*QUESTION_WORDS, *VOCABULARY, "<image>"}
    for split in SPLITS:
        for kind in QUESTION_KINDS:
            for question in evaluation_questions(split, 60, 0, kind):
                assert {*question.prompt.split(), *question.truth.split()} <= known
    assert {answer for answers in SHORT_ANSWERS.values() for answer in answers} <= known


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("test", 3, 0), "split 'test' is unknown; allowed: train, dev, heldout"),
        (("dev", 0, 0), "num 0"),
        (("dev", 3, -1), "seed -1"),
        (("dev", 3, 0, "size"), "question kind 'size' is unknown"),
        (("dev", 3, 0, "colour", 4), "num_images 4 is out of range; allowed: 1 to 3"),
        (("dev", 3, 0, "caption", 2), "allowed for 2: colour, shape"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluation_questions(*arguments)


def test_bad_scene_requests_are_named() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="4 objects or images are out of range; allowed: 1 to 3"):
        sample_objects_scene("train", rng, 4)
    with pytest.raises(ValueError, match="split 'all' is unknown"):
        sample_scene_set("all", rng, 2)
