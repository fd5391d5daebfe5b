"""The scorer: right on real renders, sensitive to each part, strict about its input."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmalign.synthetic import scenes
from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import Scene, SceneObject, captions, parse, sample_scene, sample_scenes
from mmalign.synthetic.scorer import PartScore, read_objects, score

ALL_ATTRIBUTES = [t for split in scenes.SPLITS for t in captions("attributes", split)]
ALL_RELATIONS = [t for split in scenes.SPLITS for t in captions("relations", split)]


def renders(texts: list[str], size_px: int, seed: int = 0) -> np.ndarray:
    return render(sample_scenes(texts, np.random.default_rng(seed)), size_px)


@pytest.mark.parametrize(
    ("size_px", "repeats", "least"), [(64, 5, 0.995), (32, 4, 0.99), (96, 1, 0.995), (128, 1, 0.995)]
)
def test_right_on_real_renders_of_one_object(size_px: int, repeats: int, least: float) -> None:
    texts = ALL_ATTRIBUTES * repeats
    scores = score(renders(texts, size_px), texts)
    assert scores.all_right.mean() >= least
    assert scores.graded.mean() > 0.95
    for name in ("background", "colour", "shape", "size"):
        assert scores.accuracy(name) >= least


@pytest.mark.parametrize(("size_px", "least"), [(64, 0.99), (48, 0.97)])
def test_right_on_real_renders_of_relations(size_px: int, least: float) -> None:
    texts = ALL_RELATIONS[::8]
    scores = score(renders(texts, size_px), texts)
    assert scores.all_right.mean() >= least


def test_wrong_captions_score_exactly_the_parts_they_share() -> None:
    rng = np.random.default_rng(3)
    texts = [str(t) for t in rng.choice(ALL_ATTRIBUTES, 300)]
    asked = [str(t) for t in rng.choice(ALL_ATTRIBUTES, 300)]
    scores = score(renders(texts, 64), asked)
    for text, other, found in zip(texts, asked, scores.images, strict=True):
        true, spec = parse(text), parse(other)
        (a,), (b,) = true.objects, spec.objects
        same = (true.background == spec.background, a.colour == b.colour, a.shape == b.shape, a.size == b.size)
        assert tuple(p.right for p in found.parts) == same
        assert found.fraction == sum(same) / 4
        assert found.all_right == float(all(same))


def test_soft_scores_stay_in_range_and_rank_truth_first() -> None:
    texts = ALL_ATTRIBUTES[:64]
    images = renders(texts, 64)
    right, wrong = score(images, texts), score(images, [*texts[1:], texts[0]])
    for scores in (right, wrong):
        for values in (scores.graded, scores.fraction, scores.total):
            assert values.min() >= 0.0
            assert values.max() <= 1.0
    assert (right.graded > wrong.graded).all()
    np.testing.assert_allclose(right.total, 0.5 * (right.graded + right.fraction))


def test_soft_size_moves_with_the_radius() -> None:
    pictures = [Scene("white", (SceneObject("blue", "square", 0.5, 0.5, r),)) for r in (0.2, 0.25, 0.28, 0.35)]
    scores = score(render(pictures, 64), ["a large blue square on a white background"] * 4)
    soft = [s.part("size").soft for s in scores.images]
    assert soft == sorted(soft)
    assert [s.part("size").right for s in scores.images] == [False, False, True, True]


def test_an_empty_picture_has_only_its_background() -> None:
    blank = render([Scene("white", ())], 64)
    (found,) = score(blank, ["a large red circle on a white background"]).images
    assert found.parts == (
        PartScore("background", True, 1.0),
        PartScore("colour", False, 0.0),
        PartScore("shape", False, 0.0),
        PartScore("size", False, 0.0),
    )
    assert score(blank, ["two red circles on a white background"]).images[0].fraction == 0.25
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    assert score(noise, list(ALL_ATTRIBUTES[:8])).all_right.sum() == 0


def test_count_and_relation_are_read() -> None:
    rng = np.random.default_rng(0)
    three = render([sample_scene("three blue squares on a black background", rng)], 64)
    (found,) = score(three, ["two blue squares on a black background"]).images
    assert not found.part("count").right
    beside = "a red circle left of a blue square on a white background"
    image = render([sample_scene(beside, rng)], 64)
    turned = "a red circle right of a blue square on a white background"
    assert score(image, [beside]).images[0].all_right == 1.0
    (found,) = score(image, [turned]).images
    assert [p.name for p in found.parts if not p.right] == ["relation"]
    assert found.part("relation").soft < 0.1


def test_small_noise_does_not_change_the_reading() -> None:
    texts = ALL_ATTRIBUTES
    noise = np.random.default_rng(1).normal(0, 12, (len(texts), 64, 64, 3))
    noisy = np.clip(renders(texts, 64) + noise, 0, 255).astype(np.uint8)
    assert score(noisy, texts).all_right.mean() > 0.97


def test_scores_do_not_depend_on_the_batch() -> None:
    texts = [*ALL_ATTRIBUTES[:5], *ALL_RELATIONS[:5]]
    images = renders(texts, 64)
    together = score(images, texts)
    alone = [score(images[n : n + 1], [text]).images[0] for n, text in enumerate(texts)]
    for a, b in zip(together.images, alone, strict=True):
        assert [(p.name, p.right) for p in a.parts] == [(p.name, p.right) for p in b.parts]
        assert a.graded == pytest.approx(b.graded, abs=1e-6)


def test_pil_images_are_accepted() -> None:
    texts = ALL_ATTRIBUTES[:3]
    images = renders(texts, 64)
    from_pil = score([Image.fromarray(i) for i in images], texts)
    assert from_pil == score(images, texts)


def test_boxes_are_found_where_the_objects_are() -> None:
    drawn = sample_scenes(ALL_ATTRIBUTES, np.random.default_rng(4))
    reading = read_objects(render(drawn, 64))
    true = np.array([(s.objects[0].x, s.objects[0].y, s.objects[0].radius, s.objects[0].radius) for s in drawn])
    assert np.abs(reading.box_P4 - true).max() < 1.5 / 64


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 64, 3), np.uint8), r"\[64, 64, 3\]"),
        (np.zeros((1, 64, 48, 3), np.uint8), r"\[1, 64, 48, 3\]"),
        (np.zeros((1, 64, 64, 4), np.uint8), r"\[1, 64, 64, 4\]"),
        ([np.zeros((64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)], "one common size"),
    ],
)
def test_bad_images_are_named(images: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(images, ["a large red circle on a white background"])  # type: ignore[arg-type]


def test_bad_captions_are_named() -> None:
    image = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="'teal'"):
        score(image, ["a large teal circle on a white background"])
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        score(image, ["a large red circle on a white background"] * 2)
    with pytest.raises(ValueError, match="one string"):
        score(image, "a large red circle on a white background")
    with pytest.raises(ValueError, match=r"no part 'count'.*background, colour, shape, size"):
        score(image, ["a large red circle on a white background"]).images[0].part("count")
