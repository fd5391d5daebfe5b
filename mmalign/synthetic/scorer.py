"""The exact judge of the tiny world: does a uint8 image show what its caption says?

One image gets one score per part of its caption. One-object captions have the parts background, colour, shape
and size; counted captions background, colour, shape and count; position captions background, colour, shape,
count and relation. Each part has a hard reading (right or wrong) and a soft one in [0, 1] that moves before the
hard one flips. Measured on real renders the hard readings are right on more than 99.5 % of one-object images.

How: background = median of the border ring; object pixels = those nearer to the object colour than to the
background; shape = best overlap with the four templates drawn into the object's box; size = side of that box.
Relations first split the object pixels into connected components and read each one alone.

Shapes: N images, P objects to read, H = W pixels, C colour channels, S shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from .render import coverage
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE_THRESHOLD, SceneSpec, parse, relation_holds

# A reading is valid only this near to what the world can draw; beyond it the part is wrong, not "nearest".
MAX_BACKGROUND_DISTANCE = 60.0
MAX_COLOUR_DISTANCE = 90.0
MIN_SHAPE_OVERLAP = 0.70
MIN_CONTRAST = 25.0
MIN_OBJECT_AREA = 0.006  # share of the canvas; the smallest real object covers 0.024
COLOUR_SCALE = 80.0  # soft colour score = exp(-(distance / scale)^2)
SIZE_SCALE = 0.02  # width of the soft size decision, in canvas units
OVERLAP_SHARPNESS = 20.0
# Specks hold less than this share of an object's mass at each end of a row or column profile.
TRIM = 0.015


@dataclass(frozen=True, slots=True)
class PartScore:
    """One part of a caption: `right` is the hard reading, `soft` in [0, 1] the graded one."""

    name: str
    right: bool
    soft: float


@dataclass(frozen=True, slots=True)
class ImageScore:
    """All parts of one image's score against its caption.

    `graded` is the mean soft score, `fraction` the share of right parts, `all_right` 1.0 or 0.0, and `total`
    the mean of `graded` and `fraction`; all in [0, 1].
    """

    caption: str
    parts: tuple[PartScore, ...]

    @property
    def graded(self) -> float:
        return sum(p.soft for p in self.parts) / len(self.parts)

    @property
    def fraction(self) -> float:
        return sum(p.right for p in self.parts) / len(self.parts)

    @property
    def all_right(self) -> float:
        return float(all(p.right for p in self.parts))

    @property
    def total(self) -> float:
        return 0.5 * (self.graded + self.fraction)

    def part(self, name: str) -> PartScore:
        """The part called `name`; raises ValueError naming the parts this caption has."""
        for part in self.parts:
            if part.name == name:
                return part
        raise ValueError(f"no part {name!r} in {self.caption!r}; it has: {', '.join(p.name for p in self.parts)}")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a batch, one per image in order; the properties are float64 arrays [N]."""

    images: tuple[ImageScore, ...]

    @property
    def graded(self) -> np.ndarray:
        return np.array([s.graded for s in self.images])

    @property
    def fraction(self) -> np.ndarray:
        return np.array([s.fraction for s in self.images])

    @property
    def all_right(self) -> np.ndarray:
        return np.array([s.all_right for s in self.images])

    @property
    def total(self) -> np.ndarray:
        return np.array([s.total for s in self.images])

    def accuracy(self, name: str) -> float:
        """Share of right readings of one part, over the images whose caption has it."""
        found = [p.right for s in self.images for p in s.parts if p.name == name]
        if not found:
            raise ValueError(f"no caption in this batch has a part {name!r}")
        return float(np.mean(found))


@dataclass(frozen=True, slots=True)
class Reading:
    """What the scorer sees in P objects: colour [P,C], overlap with each shape [P,S], boxes (x, y, half width,
    half height) of the best shape [P,4], and whether there is an object at all [P]."""

    colour_PC: np.ndarray
    overlap_PS: np.ndarray
    box_P4: np.ndarray
    present_P: np.ndarray


def score(images: np.ndarray | Sequence[object], captions: Sequence[str]) -> Scores:
    """Score images against captions, one each.

    Args:
        images: uint8 [N, H, W, 3], or a sequence of square PIL images or uint8 [H, W, 3] arrays of one size.
        captions: N captions of either tier.

    Raises ValueError for another dtype or shape, an unequal number of captions, or a caption that the world
    cannot parse (naming the word).
    """
    images_NHWC = as_images(images)
    if isinstance(captions, str):
        raise ValueError("captions is one string; pass a list with one caption per image")
    if len(captions) != len(images_NHWC):
        raise ValueError(f"{len(images_NHWC)} images but {len(captions)} captions; pass one caption per image")
    specs = [parse(text) for text in captions]
    background_NC = _border_colour(images_NHWC)
    parts: list[tuple[PartScore, ...]] = [()] * len(specs)
    single = [n for n, spec in enumerate(specs) if spec.tier == "attributes"]
    if single:
        contrast_KHW = _contrast(images_NHWC[single], background_NC[single])
        reading = _read(images_NHWC[single], background_NC[single], contrast_KHW)
        for k, n in enumerate(single):
            parts[n] = _attribute_parts(specs[n], background_NC[n], reading, k)
    for n, spec in enumerate(specs):
        if spec.tier == "relations":
            parts[n] = _relation_parts(spec, images_NHWC[n], background_NC[n])
    return Scores(tuple(ImageScore(text, p) for text, p in zip(captions, parts, strict=True)))


def read_objects(images: np.ndarray | Sequence[object]) -> Reading:
    """Read each image as one object, without a caption; see `Reading`."""
    images_NHWC = as_images(images)
    background_NC = _border_colour(images_NHWC)
    return _read(images_NHWC, background_NC, _contrast(images_NHWC, background_NC))


def as_images(images: np.ndarray | Sequence[object]) -> np.ndarray:
    """Anything `score` accepts as uint8 [N, H, W, 3]; raises ValueError saying what came instead."""
    if not isinstance(images, np.ndarray):
        arrays = [np.asarray(image) for image in images]
        shapes = {a.shape for a in arrays}
        if len(shapes) != 1:
            raise ValueError(f"images must have one common size, got {sorted(shapes)}; resize them first")
        images = np.stack(arrays)
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 in 0-255, got {images.dtype}; convert floats with * 255 and rint")
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2] or images.shape[1] < 16:
        raise ValueError(f"images must be [N, H, W, 3] with H = W >= 16, got {list(images.shape)}")
    return images


def _border_colour(images_NHWC: np.ndarray) -> np.ndarray:
    ring = [images_NHWC[:, 0], images_NHWC[:, -1], images_NHWC[:, 1:-1, 0], images_NHWC[:, 1:-1, -1]]
    return np.median(np.concatenate(ring, axis=1), axis=1)


def _contrast(images_NHWC: np.ndarray, background_NC: np.ndarray) -> np.ndarray:
    """RGB distance of each pixel from its background, float32 [N, H, W]."""
    return _distance(images_NHWC, background_NC)


def _distance(images_NHWC: np.ndarray, colour_NC: np.ndarray) -> np.ndarray:
    difference = images_NHWC.astype(np.float32) - colour_NC.astype(np.float32)[:, None, None, :]
    return np.sqrt(np.einsum("nhwc,nhwc->nhw", difference, difference))


def _read(images_PHWC: np.ndarray, background_PC: np.ndarray, contrast_PHW: np.ndarray) -> Reading:
    """Read one object per image; pixels whose contrast was set to 0 count as background."""
    num, size_px = contrast_PHW.shape[:2]
    peak_P = np.quantile(contrast_PHW.reshape(num, -1), 0.99, axis=1)
    core_PHW = contrast_PHW > 0.6 * peak_P[:, None, None]
    colour_PC = np.empty((num, 3))
    for p in range(num):
        core = images_PHWC[p][core_PHW[p]]
        colour_PC[p] = np.median(core, axis=0) if len(core) else background_PC[p]
    mask_PHW = (_distance(images_PHWC, colour_PC) < contrast_PHW).astype(np.float32)
    area_P = mask_PHW.mean(axis=(1, 2))
    present_P = (peak_P > MIN_CONTRAST) & (area_P > MIN_OBJECT_AREA)
    left, right = _trimmed_span(mask_PHW.sum(axis=1))
    top, bottom = _trimmed_span(mask_PHW.sum(axis=2))
    box_PS4 = np.empty((num, len(SHAPES), 4), np.float32)
    for s in range(len(SHAPES)):
        # Trimming cuts more off a triangle's tip than off a square, so each template undoes its own share.
        x_low, x_high, y_low, y_high = _template_span(s)
        half_x = np.maximum((right - left) / (x_high - x_low), 0.5 / size_px)
        half_y = np.maximum((bottom - top) / (y_high - y_low), 0.5 / size_px)
        box_PS4[:, s] = np.stack([left - x_low * half_x, top - y_low * half_y, half_x, half_y], axis=1)
    overlap_PS = np.zeros((num, len(SHAPES)))
    for s in range(len(SHAPES)):
        template_PHW = coverage(np.full(num, s), box_PS4[:, s], size_px)
        both = np.einsum("phw,phw->p", template_PHW, mask_PHW)
        either = template_PHW.sum(axis=(1, 2)) + mask_PHW.sum(axis=(1, 2)) - both
        overlap_PS[:, s] = both / np.maximum(either, 1e-6)
    overlap_PS[~present_P] = 0.0
    best_P = overlap_PS.argmax(axis=1)
    return Reading(colour_PC, overlap_PS, box_PS4[np.arange(num), best_P], present_P)


def _trimmed_span(profile_PL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in canvas units between which all but `TRIM` at each end of a profile's mass lies."""
    num, length = profile_PL.shape
    mass_PL = np.cumsum(profile_PL, axis=1, dtype=np.float64)
    total_P = np.maximum(mass_PL[:, -1:], 1e-9)
    share_PL = np.concatenate([np.zeros((num, 1)), mass_PL / total_P], axis=1)
    ends = []
    for target in (TRIM, 1.0 - TRIM):
        after = np.clip((share_PL < target).sum(axis=1), 1, length)
        rows = np.arange(num)
        low, high = share_PL[rows, after - 1], share_PL[rows, after]
        ends.append((after - 1 + (target - low) / np.maximum(high - low, 1e-9)) / length)
    return ends[0], ends[1]


@cache
def _template_span(shape: int) -> tuple[float, float, float, float]:
    """The trimmed span of an ideal shape in its own box from -1 to 1: x low, x high, y low, y high."""
    half = 0.4
    ideal = coverage(np.array([shape]), np.array([[0.5, 0.5, half, half]], np.float32), 512)
    left, right = _trimmed_span(ideal.sum(axis=1))
    top, bottom = _trimmed_span(ideal.sum(axis=2))
    return tuple(float((edge[0] - 0.5) / half) for edge in (left, right, top, bottom))  # type: ignore[return-value]


def _attribute_parts(spec: SceneSpec, background_C: np.ndarray, reading: Reading, index: int) -> tuple[PartScore, ...]:
    (wanted,) = spec.objects
    assert wanted.size is not None
    present = bool(reading.present_P[index])
    side = float(reading.box_P4[index, 2:].mean())
    towards = (side - SIZE_THRESHOLD) * (1.0 if wanted.size == "large" else -1.0)
    size_soft = float(1.0 / (1.0 + np.exp(-np.clip(towards / SIZE_SCALE, -30.0, 30.0))))
    return (
        _colour_part("background", background_C, spec.background, BACKGROUNDS, MAX_BACKGROUND_DISTANCE),
        _when(
            present,
            _colour_part("colour", reading.colour_PC[index], wanted.colour, COLOURS, MAX_COLOUR_DISTANCE),
        ),
        _when(present, _shape_part(reading.overlap_PS[index], wanted.shape)),
        _when(present, PartScore("size", towards > 0.0, size_soft)),
    )


def _relation_parts(spec: SceneSpec, image_HWC: np.ndarray, background_C: np.ndarray) -> tuple[PartScore, ...]:
    reading = _read_components(image_HWC, background_C)
    num_found = len(reading.present_P)
    num_wanted = len(spec.objects)
    background = _colour_part("background", background_C, spec.background, BACKGROUNDS, MAX_BACKGROUND_DISTANCE)
    count = PartScore("count", num_found == num_wanted, 1.0 / (1.0 + abs(num_found - num_wanted)))
    colour = [
        [_colour_part("colour", reading.colour_PC[p], o.colour, COLOURS, MAX_COLOUR_DISTANCE) for o in spec.objects]
        for p in range(num_found)
    ]
    shape = [[_shape_part(reading.overlap_PS[p], o.shape) for o in spec.objects] for p in range(num_found)]
    # Each wanted object claims a component of its own; objects without one are wrong.
    claims = _best_claims(
        [[c.soft + s.soft for c, s in zip(*row, strict=True)] for row in zip(colour, shape, strict=True)]
    )
    parts = [
        background,
        _joined("colour", [colour[p][w] for w, p in claims.items()], num_wanted),
        _joined("shape", [shape[p][w] for w, p in claims.items()], num_wanted),
        count,
    ]
    if spec.relation is not None:
        both_known = 0 in claims and 1 in claims and all(colour[claims[w]][w].right for w in (0, 1))
        holds, soft = False, 0.0
        if both_known:
            dx, dy = (float(v) for v in reading.box_P4[claims[0], :2] - reading.box_P4[claims[1], :2])
            holds = relation_holds(spec.relation, dx, dy)
            along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[spec.relation]
            across = dy if spec.relation in ("left of", "right of") else dx
            soft = float(1.0 / (1.0 + np.exp(-np.clip((along - abs(across)) / 0.05, -30.0, 30.0))))
        parts.append(PartScore("relation", holds, soft))
    return tuple(parts)


def _read_components(image_HWC: np.ndarray, background_C: np.ndarray) -> Reading:
    from scipy import ndimage

    contrast_HW = _contrast(image_HWC[None], background_C[None])[0]
    labels_HW, num_labels = ndimage.label(
        contrast_HW > max(MIN_CONTRAST, 0.33 * float(np.quantile(contrast_HW, 0.995)))
    )
    areas = np.bincount(labels_HW.ravel(), minlength=num_labels + 1)[1:] / labels_HW.size
    kept = [k + 1 for k in np.argsort(-areas, kind="stable") if areas[k] > MIN_OBJECT_AREA]
    alone = []
    for label in kept:
        # One pixel of anti-aliased edge around the component belongs to it, other objects do not.
        near_HW = ndimage.binary_dilation(labels_HW == label) & ((labels_HW == 0) | (labels_HW == label))
        alone.append(np.where(near_HW[..., None], image_HWC, background_C[None, None]))
    if not alone:
        empty = np.empty((0, 3))
        return Reading(empty, np.empty((0, len(SHAPES))), np.empty((0, 4)), np.empty(0, bool))
    images_PHWC = np.stack(alone)
    background_PC = np.repeat(background_C[None], len(alone), axis=0)
    return _read(images_PHWC, background_PC, _contrast(images_PHWC, background_PC))


def _best_claims(affinity: Sequence[Sequence[float]]) -> dict[int, int]:
    """Wanted object -> component, maximising the summed affinity; at most four components compete."""
    if not affinity:
        return {}
    num_components, num_wanted = min(len(affinity), 6), len(affinity[0])
    if num_components < num_wanted:
        options = permutations(range(num_wanted), num_components)
        best = max(options, key=lambda wanted: sum(affinity[p][w] for p, w in enumerate(wanted)))
        return {w: p for p, w in enumerate(best)}
    options = permutations(range(num_components), num_wanted)
    best = max(options, key=lambda components: sum(affinity[p][w] for w, p in enumerate(components)))
    return dict(enumerate(best))


def _colour_part(
    name: str, found_C: np.ndarray, wanted: str, palette: Mapping[str, tuple[int, int, int]], limit: float
) -> PartScore:
    distances = {word: float(np.linalg.norm(found_C - np.array(rgb))) for word, rgb in palette.items()}
    nearest = min(distances, key=lambda word: distances[word])
    soft = float(np.exp(-((distances[wanted] / COLOUR_SCALE) ** 2)))
    return PartScore(name, nearest == wanted and distances[wanted] < limit, soft)


def _shape_part(overlap_S: np.ndarray, wanted: str) -> PartScore:
    weight_S = np.exp(OVERLAP_SHARPNESS * (overlap_S - overlap_S.max()))
    index = SHAPES.index(wanted)
    right = bool(overlap_S.argmax() == index and overlap_S[index] > MIN_SHAPE_OVERLAP)
    return PartScore("shape", right, float(weight_S[index] / weight_S.sum() * overlap_S[index]))


def _when(present: bool, part: PartScore) -> PartScore:
    return part if present else PartScore(part.name, False, 0.0)


def _joined(name: str, found: Sequence[PartScore], num_wanted: int) -> PartScore:
    right = len(found) == num_wanted and all(p.right for p in found)
    return PartScore(name, right, sum(p.soft for p in found) / num_wanted)
