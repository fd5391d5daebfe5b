"""The renderer: exact colours, true areas, independence of batching."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.synthetic import scenes
from mmalign.synthetic.render import CROSS_ARM, coverage, render
from mmalign.synthetic.scenes import Scene, SceneObject, captions, sample_scenes

BOX_AREA_SHARE = {
    "circle": np.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "cross": 2 * CROSS_ARM - CROSS_ARM**2,
}


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("size_px", [32, 64, 200])
def test_covered_area_is_the_area_of_the_shape(shape: str, size_px: int) -> None:
    half = 0.31
    box = np.array([[0.47, 0.52, half, half]], np.float32)
    covered = coverage(np.array([scenes.SHAPES.index(shape)]), box, size_px)[0]
    assert covered.mean() == pytest.approx(BOX_AREA_SHARE[shape] * 4 * half**2, rel=0.03)


def test_colours_are_exact_inside_and_outside() -> None:
    for colour, rgb in scenes.COLOURS.items():
        image = render([Scene("gray", (SceneObject(colour, "square", 0.5, 0.5, 0.25),))], 64)[0]
        assert tuple(image[32, 32]) == rgb
        assert tuple(image[2, 2]) == scenes.BACKGROUNDS["gray"]


def test_edges_blend_and_later_objects_cover_earlier_ones() -> None:
    white_on_black = Scene("black", (SceneObject("red", "circle", 0.5, 0.5, 0.3),))
    levels = np.unique(render([white_on_black], 64)[0, :, :, 0])
    assert len(levels) > 5
    both = (SceneObject("red", "circle", 0.5, 0.5, 0.3), SceneObject("blue", "circle", 0.5, 0.5, 0.2))
    assert tuple(render([Scene("black", both)], 64)[0, 32, 32]) == scenes.COLOURS["blue"]


def test_batch_equals_one_by_one() -> None:
    texts = [*captions("attributes", "dev")[:6], *captions("relations", "dev")[:3], *captions("relations", "dev")[-3:]]
    batch = sample_scenes(texts, np.random.default_rng(0))
    together = render(batch, 48)
    assert together.shape == (12, 48, 48, 3)
    assert together.dtype == np.uint8
    for scene, image in zip(batch, together, strict=True):
        np.testing.assert_array_equal(render([scene], 48)[0], image)


def test_empty_batch_and_too_small_canvas() -> None:
    assert render([], 32).shape == (0, 32, 32, 3)
    with pytest.raises(ValueError, match="size_px 8"):
        render([], 8)
