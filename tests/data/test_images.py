"""Decoding of odd files, and resize + flip + crop."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from mmalign.data.images import MAX_PIXELS, decode_image, prepare_image, resized_size
from mmalign.types import DataError


def save(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def decode(content: bytes) -> np.ndarray:
    image = decode_image(content, source="pairs.jsonl:7 chosen")
    assert image.mode == "RGB"
    return np.asarray(image)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; almost no data follows."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_rgb_png_comes_back_exactly(picture):
    assert np.array_equal(decode(save(picture(3))), np.asarray(picture(3)))


def test_alpha_is_composited_on_white():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (200, 0, 0, 255)
    pixels[4:] = (0, 0, 0, 0)
    pixels[0, 0] = (0, 0, 0, 128)
    rgb = decode(save(Image.fromarray(pixels)))
    assert tuple(rgb[2, 2]) == (200, 0, 0)
    assert tuple(rgb[6, 6]) == (255, 255, 255)
    assert tuple(rgb[0, 0]) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_greyscale_bilevel_and_palette_are_converted(mode, picture):
    image = picture(1).convert(mode)
    assert np.array_equal(decode(save(image)), np.asarray(image.convert("RGB")))


def test_transparent_palette_colour_becomes_white():
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    rgb = decode(save(image, transparency=0))
    assert tuple(rgb[0, 0]) == (255, 255, 255)
    assert tuple(rgb[5, 5]) == (10, 20, 30)


def test_grey_with_alpha_is_composited():
    image = Image.merge("LA", [Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 0)])
    assert (decode(save(image)) == 255).all()


def test_cmyk_jpeg_is_converted():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = decode(save(image, "JPEG", quality=95))[8, 8]
    assert red > 240
    assert green < 15
    assert blue < 15


def test_16_bit_grey_keeps_its_brightness():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    rgb = decode(save(Image.fromarray(values)))
    assert np.array_equal(rgb[..., 0], (values >> 8).astype(np.uint8))
    assert rgb.max() == 255


def test_float_image_is_refused():
    content = save(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    with pytest.raises(DataError, match=r"pairs.jsonl:7 chosen: pixel format 'F'.*8- or 16-bit"):
        decode(content)


def test_exif_rotation_is_applied(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image = picture(2, width=24, height=16)
    rgb = decode(save(image, exif=exif))
    assert np.array_equal(rgb, np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    content = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(decode(content)[5, 5]) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_file_is_named(format, encoded):
    content = encoded(1, format, width=64, height=64)
    with pytest.raises(DataError, match=r"pairs.jsonl:7 chosen: .*(truncated|not an image)"):
        decode(content[: len(content) // 2])


def test_no_lenient_loading_is_switched_on(encoded):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "empty"), (b"<html>404</html>", "not an image"), (b"\x89PNG\r\n", "")]
)
def test_what_is_no_image_is_named(content, says):
    with pytest.raises(DataError, match=rf"pairs.jsonl:7 chosen: .*{says}"):
        decode(content)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 100), (100, 7)])
def test_tiny_image_is_refused(width, height):
    with pytest.raises(DataError, match=rf"{width}x{height} px is too small; each side needs at least 8 px"):
        decode(save(Image.new("RGB", (width, height))))


@pytest.mark.parametrize("side", [13_380, 60_000])
def test_decompression_bomb_is_refused(side):
    """13 380² lies between PIL's warning and its error; both must stop here, before any pixel is decoded."""
    assert side**2 > MAX_PIXELS
    with pytest.raises(DataError, match=r"pairs.jsonl:7 chosen: .*limit of 178,956,970"):
        decode(png_of_size(side, side))


def test_limit_holds_when_a_library_has_lifted_that_of_pil(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match="more pixels than the limit"):
        decode(png_of_size(60_000, 60_000))


# --- resize, flip, crop -----------------------------------------------------------------------------------------------


def test_square_image_of_the_right_size_is_untouched(picture):
    image = picture(1, width=32, height=32)
    prepared = prepare_image(image, resolution=32, crop=(0.5, 0.5), flip=False)
    assert np.array_equal(prepared.pixels, np.asarray(image))
    assert (prepared.original_size, prepared.crop_top_left) == ((32, 32), (0, 0))


@pytest.mark.parametrize(("width", "height"), [(90, 61), (61, 90), (33, 32), (40, 20)])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.0, 1.0), (0.31, 0.77)])
def test_equals_resizing_all_and_then_cropping(width, height, crop, picture):
    image = picture(4, width=width, height=height)
    prepared = prepare_image(image, resolution=32, crop=crop, flip=False)
    h, w = resized_size(height, width, 32)
    top, left = round(crop[0] * (h - 32)), round(crop[1] * (w - 32))
    whole = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)).astype(int)
    assert prepared.crop_top_left == (top, left)
    assert prepared.original_size == (height, width)
    assert np.abs(prepared.pixels - whole[top : top + 32, left : left + 32]).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(100, 75), (75, 100), (64, 64), (513, 512)])
def test_geometry_is_that_of_torchvision(width, height):
    """The published scripts use transforms.Resize(r) and CenterCrop(r)."""
    from torchvision.transforms import functional

    image = Image.new("RGB", (width, height))
    resized = functional.resize(image, 64)
    assert resized_size(height, width, 64) == (resized.height, resized.width)
    prepared = prepare_image(image, resolution=64, crop=(0.5, 0.5), flip=False)
    top, left = (max(0, round((side - 64) / 2.0)) for side in (resized.height, resized.width))
    assert prepared.crop_top_left == (top, left)


def test_flip_comes_before_the_crop_as_in_the_published_scripts(picture):
    image = picture(5, width=80, height=32)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flipped = prepare_image(image, resolution=32, crop=(0.0, 0.25), flip=True)
    reference = prepare_image(mirrored, resolution=32, crop=(0.0, 0.25), flip=False)
    assert flipped.crop_top_left == reference.crop_top_left == (0, 12)
    assert np.abs(flipped.pixels.astype(int) - reference.pixels).max() <= 1


def test_flipping_twice_gives_the_image_back(picture):
    image = picture(6, width=48, height=32)
    plain = prepare_image(image, resolution=32, crop=(0.5, 0.5), flip=False)
    flipped = prepare_image(image, resolution=32, crop=(0.5, 0.5), flip=True)
    assert np.array_equal(flipped.pixels[:, ::-1], plain.pixels)
    assert flipped.pixels.flags.c_contiguous


def test_pair_of_equal_size_gets_the_same_crop_and_flip(picture):
    pair = [prepare_image(picture(s, width=60, height=40), resolution=32, crop=(0.2, 0.9), flip=True) for s in (1, 2)]
    assert pair[0].crop_top_left == pair[1].crop_top_left


def test_very_long_image_needs_no_memory():
    prepared = prepare_image(Image.new("RGB", (20_000, 8)), resolution=512, crop=(0.5, 1.0), flip=False)
    assert prepared.pixels.shape == (512, 512, 3)
    assert prepared.crop_top_left == (0, 1_280_000 - 512)


def test_crop_outside_the_range_is_refused(picture):
    with pytest.raises(ValueError, match="fractions between 0 and 1"):
        prepare_image(picture(), resolution=16, crop=(0.5, 1.5), flip=False)
