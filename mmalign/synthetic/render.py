"""Scenes to pixels: signed distances, one pixel of anti-aliasing, whole batches at once.

Shapes: N scenes (or objects), H = W = size_px, C = 3 colour channels (RGB).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .scenes import BACKGROUNDS, COLOURS, SHAPES, Scene

CROSS_ARM = 0.36  # half the width of a cross's arm, as a share of its radius


def render(scenes: Sequence[Scene], size_px: int) -> np.ndarray:
    """Draw scenes as uint8 images [N, H, W, 3] with H = W = `size_px` (at least 16).

    Objects are drawn in order; each pixel blends by its coverage, which falls from 1 to 0 over one pixel.
    """
    if size_px < 16:
        raise ValueError(f"size_px {size_px} is too small to draw on; allowed: 16 or more")
    num_scenes = len(scenes)
    image_NHWC = np.empty((num_scenes, size_px, size_px, 3), dtype=np.float32)
    image_NHWC[:] = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32).reshape(-1, 1, 1, 3)
    for slot in range(max((len(s.objects) for s in scenes), default=0)):
        index = [n for n, s in enumerate(scenes) if len(s.objects) > slot]
        objects = [scenes[n].objects[slot] for n in index]
        shape_N = np.array([SHAPES.index(o.shape) for o in objects])
        box_N4 = np.array([(o.x, o.y, o.radius, o.radius) for o in objects], np.float32)
        colour_NC = np.array([COLOURS[o.colour] for o in objects], np.float32)
        alpha_NHW1 = coverage(shape_N, box_N4, size_px)[..., None]
        image_NHWC[index] += alpha_NHW1 * (colour_NC[:, None, None, :] - image_NHWC[index])
    return np.rint(image_NHWC).astype(np.uint8)


def coverage(shape_N: np.ndarray, box_N4: np.ndarray, size_px: int) -> np.ndarray:
    """Share of each pixel that a shape covers, float32 [N, H, W] in [0, 1].

    `shape_N` indexes `scenes.SHAPES`; `box_N4` holds centre x, centre y, half width, half height in canvas units.
    """
    out_NHW = np.empty((len(shape_N), size_px, size_px), dtype=np.float32)
    grid = ((np.arange(size_px, dtype=np.float32) + 0.5) / size_px)[None, :]
    u_NW = np.abs(grid - box_N4[:, 0:1])[:, None, :]
    v_NH = (grid - box_N4[:, 1:2])[:, :, None]
    half_x = box_N4[:, 2][:, None, None]
    half_y = box_N4[:, 3][:, None, None]
    for index, name in enumerate(SHAPES):
        pick = shape_N == index
        if pick.any():
            out_NHW[pick] = _distance(name, u_NW[pick], v_NH[pick], half_x[pick], half_y[pick])
    np.multiply(out_NHW, -size_px, out=out_NHW)
    out_NHW += 0.5
    return np.clip(out_NHW, 0.0, 1.0, out=out_NHW)


def _distance(name: str, u: np.ndarray, v: np.ndarray, half_x: np.ndarray, half_y: np.ndarray) -> np.ndarray:
    """Signed distance to a shape's edge, negative inside; `u` is |x - centre|, `v` is y - centre.

    Exact along the edges, which is all that anti-aliasing reads; not Euclidean around corners.
    """
    if name == "circle":
        mean_half = 0.5 * (half_x + half_y)
        return (np.sqrt((u / half_x) ** 2 + (v / half_y) ** 2) - 1.0) * mean_half
    if name == "square":
        return np.maximum(u - half_x, np.abs(v) - half_y)
    if name == "triangle":
        side = (2.0 * u / half_x - v / half_y - 1.0) / np.sqrt((2.0 / half_x) ** 2 + (1.0 / half_y) ** 2)
        return np.maximum(side, v - half_y)
    if name == "cross":
        flat = np.maximum(u - half_x, np.abs(v) - CROSS_ARM * half_y)
        upright = np.maximum(u - CROSS_ARM * half_x, np.abs(v) - half_y)
        return np.minimum(flat, upright)
    raise AssertionError(f"shape {name!r} has no distance")
