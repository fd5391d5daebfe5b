"""The frozen encoders of a policy, as small as they can be: fixed linear maps of pixels and of character counts."""

from __future__ import annotations

import torch

SCALE = torch.tensor([0.5, -1.0, 2.0])


class LinearPolicy:
    """`images` and `texts` list what was encoded, in order, so that tests can count."""

    modality = "image"
    resolution = 16

    def __init__(self, version: str = "1", resolution: int = 16) -> None:
        self.version, self.resolution = version, resolution
        self.images: list[bytes] = []
        self.texts: list[str] = []

    def encode_key(self, kind: str) -> str:
        return f"linear-{kind}-{self.version}"

    def encode_prompts(self, prompts):
        self.texts += prompts
        rows = [[float(text.count(letter)) for letter in "abcdefghij"] for text in prompts]
        return [{"embedding": row} for row in torch.tensor(rows).reshape(len(prompts), 10)]

    def encode_images(self, images):
        self.images += [image.pixels.tobytes() for image in images]
        pixels_NHWC = torch.stack([torch.from_numpy(image.pixels) for image in images]).float() / 255
        mean_NHWC = pixels_NHWC * SCALE
        sizes = [torch.tensor([*image.original_size, *image.crop_top_left]) for image in images]
        return [{"mean": mean, "size": size} for mean, size in zip(mean_NHWC, sizes, strict=True)]
