"""From encoded bytes to the square uint8 array an encoder sees. Everything odd about image files is handled here.

Shape legend: H height, W width, 3 = RGB. Sizes are (height, width), positions (y, x), in pixels.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from mmalign.types import DataError

MIN_SIDE_PX = 8
# PIL's own limit (it raises at this many pixels), fixed here so that a library that lifts it cannot lift ours.
MAX_PIXELS = 178_956_970
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class PreparedImage:
    """An image after resize, flip and crop.

    Args:
        pixels: uint8 [H, W, 3], H = W = resolution.
        original_size: (height, width) of the decoded image, before resizing.
        crop_top_left: (y, x) of the crop in the resized, flipped image.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def decode_image(content: bytes, *, source: str) -> Image.Image:
    """Encoded bytes as an upright RGB image.

    EXIF rotation is applied; alpha is composited on white; greyscale, palette, CMYK and 16-bit greyscale are converted.
    Of an animation the first frame is taken.

    Raises `DataError`, naming `source`, when the bytes are empty, undecodable or truncated, when a side is shorter than
    8 px, when the image has more than 178 956 970 pixels, or when its pixel format has no agreed range (float).
    """
    if not content:
        raise DataError(f"{source}: the image file is empty (0 bytes); replace it or remove the row")
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        _check_size(image, source)
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image, source)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{source}: the image has more pixels than the limit of {MAX_PIXELS:,}; downscale it before training"
        ) from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{source}: not an image PIL can read ({len(content)} bytes starting with {content[:8]!r}); "
            f"allowed: PNG, JPEG, WebP, BMP, GIF, TIFF …; convert it or remove the row"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error) as error:
        raise DataError(
            f"{source}: the image is truncated or damaged ({len(content)} bytes; {error}); "
            f"fetch it again or remove the row"
        ) from None


def _check_size(image: Image.Image, source: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{source}: {width}x{height} has more pixels than the limit of {MAX_PIXELS:,}; downscale it before training"
        )
    if min(width, height) < MIN_SIDE_PX:
        raise DataError(
            f"{source}: {width}x{height} px is too small; each side needs at least {MIN_SIDE_PX} px; remove the row"
        )


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        wide = np.asarray(image)
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"{source}: pixel format {image.mode!r} (32-bit) has no agreed brightness range; "
            f"save it as 8- or 16-bit PNG"
        )
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        canvas = Image.new("RGBA", coloured.size, (*WHITE, 255))
        return Image.alpha_composite(canvas, coloured).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def prepare_image(image: Image.Image, *, resolution: int, crop: tuple[float, float], flip: bool) -> PreparedImage:
    """Resize the short side to `resolution` (bicubic, antialiased), flip, then crop a square.

    Args:
        resolution: side of the result in pixels.
        crop: (y, x) as fractions 0…1 of the free range; (0.5, 0.5) is the centre crop of torchvision.
        flip: mirror left-right. The crop counts in the flipped image, so `crop_top_left` is what the published SDXL
            scripts (diffusers `train_text_to_image_sdxl.py`, `train_diffusion_dpo_sdxl.py`) would report.
    """
    for fraction in crop:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"crop {crop} must hold fractions between 0 and 1")
    width, height = image.size
    resized_h, resized_w = resized_size(height, width, resolution)
    top = round(crop[0] * (resized_h - resolution))
    left = round(crop[1] * (resized_w - resolution))
    unflipped_left = resized_w - resolution - left if flip else left
    # Resampling only the crop's box is the same as resizing everything and cropping, without the memory that a very
    # long image would need.
    box = (
        unflipped_left * width / resized_w,
        top * height / resized_h,
        (unflipped_left + resolution) * width / resized_w,
        (top + resolution) * height / resized_h,
    )
    square = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    # Copied: PIL's buffer is read-only, which torch warns about.
    pixels = np.array(square)
    return PreparedImage(np.ascontiguousarray(pixels[:, ::-1] if flip else pixels), (height, width), (top, left))


def resized_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(height, width) after the short side becomes `resolution`; the long side is rounded down, as in torchvision."""
    if height <= width:
        return resolution, int(resolution * width / height)
    return int(resolution * height / width), resolution
