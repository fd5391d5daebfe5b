"""Image negatives: torchvision's crop draw for draw, determinism, and images that are really another row's."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mmalign import randomness
from mmalign.config import NegativeConfig
from mmalign.data.negatives import Others, black, crop_box, make_negative
from mmalign.types import ImageRef

AREA = (0.01, 0.2)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


# --- crop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(336, 336), (640, 427), (100, 300), (8, 8), (48, 9), (8, 2000), (2000, 8), (31, 17)])
@pytest.mark.parametrize("area", [AREA, (0.5, 1.0), (1.0, 1.0)])
def test_box_is_torchvisions_draw_for_draw(size, area):
    height, width = size
    image = Image.new("RGB", (width, height))
    for seed in range(30):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3])
        assert crop_box(height, width, area, torch.Generator().manual_seed(seed)) == tuple(expected)


def test_box_that_never_fits_is_the_largest_central_one_with_an_allowed_ratio():
    # A strip 8 px high: a part of 1 % or more with an aspect ratio of 4/3 or less is higher than that.
    assert crop_box(8, 2000, AREA, torch.Generator().manual_seed(0)) == (0, (2000 - 11) // 2, 8, 11)
    assert crop_box(2000, 8, AREA, torch.Generator().manual_seed(0)) == ((2000 - 11) // 2, 0, 11, 8)
    assert crop_box(30, 30, (1.0, 1.0), torch.Generator().manual_seed(3))[2:] == (30, 30)


def test_area_and_aspect_ratio_cover_the_published_range():
    """mDPO's released code: RandomResizedCrop(scale=(0.01, 0.2)) with torchvision's aspect ratios."""
    shares, ratios = [], []
    for number in range(2000):
        generator = randomness.generator(0, "negative_crop", f"row{number}")
        top, left, height, width = crop_box(672, 672, AREA, generator)
        assert 0 <= top <= 672 - height
        assert 0 <= left <= 672 - width
        shares.append(height * width / 672**2)
        ratios.append(width / height)
    rounding = 0.03
    assert AREA[0] * (1 - rounding) < min(shares) < 0.012
    assert 0.195 < max(shares) < AREA[1] * (1 + rounding)
    assert np.mean(shares) == pytest.approx(sum(AREA) / 2, abs=4 * 0.19 / math.sqrt(12 * 2000))
    assert 0.75 * (1 - rounding) < min(ratios) < 0.76
    assert 1.32 < max(ratios) < 4 / 3 * (1 + rounding)
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=4 * math.log(16 / 9) / math.sqrt(12 * 2000))


def test_crop_keeps_the_size_and_shows_nothing_from_outside_its_box(picture):
    image = picture(0, width=90, height=60)
    config = NegativeConfig(area=(0.05, 0.1))
    negative = make_negative(image, config, seed=1, row_id="a")
    generator = randomness.generator(1, "negative_crop", "a")
    top, left, height, width = crop_box(60, 90, config.area, generator)
    inside = image.crop((left, top, left + width, top + height))
    # All that is outside the box may change without changing the negative.
    outside = Image.new("RGB", image.size, (255, 0, 255))
    outside.paste(inside, (left, top))
    assert negative.size == image.size
    assert np.array_equal(pixels(negative), pixels(make_negative(outside, config, seed=1, row_id="a")))
    assert np.array_equal(pixels(negative), pixels(inside.resize((90, 60), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("kind", ["crop", "noise"])
def test_negative_is_a_function_of_seed_row_variant_and_place(kind, picture):
    image, config = picture(0, width=64, height=48), NegativeConfig(kind=kind)
    base = {"seed": 0, "row_id": "a", "variant": 0, "place": 0}
    first = pixels(make_negative(image, config, **base))
    torch.manual_seed(123)  # Global randomness must not enter.
    assert np.array_equal(first, pixels(make_negative(image, config, **base)))
    for change in ({"seed": 1}, {"row_id": "b"}, {"variant": 1}, {"place": 1}):
        assert not np.array_equal(first, pixels(make_negative(image, config, **{**base, **change}))), change


def test_black_and_noise_hold_nothing_of_the_image(picture):
    images = [picture(seed, width=40, height=30) for seed in (0, 1)]
    for kind in ("black", "noise"):
        made = [make_negative(image, NegativeConfig(kind=kind), seed=0, row_id="a") for image in images]
        assert np.array_equal(pixels(made[0]), pixels(made[1]))
        assert made[0].size == (40, 30)
        assert made[0].mode == "RGB"
    assert pixels(made[1]).std() == pytest.approx(255 / math.sqrt(12), rel=0.05)
    assert not pixels(black(images[0])).any()


def test_other_takes_the_first_of_what_is_offered(picture):
    config = NegativeConfig(kind="other")
    others = [picture(5), picture(6)]
    assert make_negative(picture(0), config, seed=0, row_id="a", others=others) is others[0]
    with pytest.raises(ValueError, match=r"row 'a': no other row shows a different image.*kind: crop"):
        make_negative(picture(0), config, seed=0, row_id="a")


@pytest.mark.parametrize("area", [(0.0, 0.2), (0.3, 0.2), (0.5, 1.1)])
def test_impossible_area_is_an_error_of_the_config(area):
    with pytest.raises(ValueError, match="0 < low <= high <= 1"):
        NegativeConfig(area=area)


# --- other rows -------------------------------------------------------------------------------------------------------


def ref(number: int) -> ImageRef:
    return ImageRef(content=str(number).encode())


def picks(numbers, *, seed: int = 0, variant: int = 0) -> dict[int, str]:
    """The digest picked for each row; row n shows image n."""
    others = Others([ref(n) for n in numbers], ImageRef.digest, seed)
    return {n: next(others.candidates(f"row{n}", variant, 0, {ref(n).digest()}))[0] for n in numbers}


def test_other_image_never_has_the_rows_own_content():
    # Each image stands in three rows, under names of its own.
    numbers = [n % 7 for n in range(21)]
    others = Others([ref(n) for n in numbers], ImageRef.digest, 0)
    for row, own in enumerate(numbers):
        found = list(others.candidates(f"row{row}", 0, 0, {ref(own).digest()}))
        assert len(found) == 6
        assert ref(own).digest() not in {digest for digest, _ in found}
        assert all(digest == image.digest() for digest, image in found)


def test_pick_does_not_depend_on_the_order_and_hardly_on_a_row_more():
    first = picks(range(200))
    assert picks(list(reversed(range(200)))) == first
    changed = [n for n, digest in picks(range(201)).items() if n < 200 and digest != first[n]]
    assert len(changed) < 10, "only those that now pick the new image"
    assert picks(range(200), seed=1) != first
    assert picks(range(200), variant=1) != first


def test_picks_spread_over_the_images():
    """Gaps of a random ring are exponential: half of the images are picked at all, the luckiest a dozen times."""
    counts = np.unique(list(picks(range(300)).values()), return_counts=True)[1]
    assert len(counts) > 120
    assert counts.max() < 25


def test_single_image_has_no_other():
    others = Others([ref(0), ref(0)], ImageRef.digest, 0)
    assert list(others.candidates("row0", 0, 0, {hashlib.blake2b(b"0", digest_size=16).hexdigest()})) == []
