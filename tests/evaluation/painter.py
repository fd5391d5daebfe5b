"""A tiny real policy for these tests: it paints from (prompt, seed, weights) alone, so every expectation is exact."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmalign.policies.base import View
from mmalign.reward import RewardOutput, Scorer
from mmalign.types import Sample


class Painter:
    """Images whose left half is noise of (prompt, seed) and whose right half has the brightness of the weights.

    `lift` is the adapter's weight: the reference paints as if it were 0. With `only`, just prompts that contain the
    word are lifted.
    """

    device = torch.device("cpu")
    modality = "image"
    default_guidance_scale = 2.0
    default_num_steps = 4

    def __init__(
        self, *, lift: float = 40.0, base: float = 100.0, size: int = 16, only: str = "", name: str = "painter"
    ):
        self.name, self.resolution, self.only = name, size, only
        self.network = nn.Module()
        self.network.base = nn.Parameter(torch.tensor([float(base)]), requires_grad=False)
        self.network.lora_lift = nn.Parameter(torch.tensor([float(lift)]))
        self.current: View = "policy"
        self.painted: list[tuple[str, str, int, float]] = []
        self.batches: list[int] = []
        self.made: list[weakref.ref[Image.Image]] = []
        self.most_alive = 0
        self.fail_after: int | None = None

    def encode_key(self, kind: str) -> str:
        return f"{kind}-encoder"

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.network}

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [("lora_lift", self.network.lora_lift)]

    @contextmanager
    def view(self, name: View) -> Iterator[None]:
        outer, self.current = self.current, name
        try:
            yield
        finally:
            self.current = outer

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, guidance_scale: float, num_steps: int
    ) -> list[Sample]:
        if self.fail_after is not None and len(self.painted) >= self.fail_after:
            raise RuntimeError("power cut")
        self.most_alive = max(self.most_alive, sum(image() is not None for image in self.made))
        self.batches.append(len(prompts))
        samples = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            key = int.from_bytes(hashlib.sha256(f"{prompt}|{seed}".encode()).digest()[:4], "big")
            pixels = np.random.default_rng(key).integers(0, 256, (self.resolution, self.resolution, 3), dtype=np.uint8)
            level = self.network.base.item()
            if self.current != "reference" and self.only in prompt:
                level += self.network.lora_lift.item() * guidance_scale / self.default_guidance_scale
            pixels[:, self.resolution // 2 :] = round(level)
            image = Image.fromarray(pixels)
            self.made.append(weakref.ref(image))
            self.painted.append((self.current, prompt, seed, guidance_scale))
            samples.append(Sample(prompt, image, seed, guidance_scale, num_steps, self.name))
        return samples


def right_half(image: Image.Image) -> float:
    return float(np.asarray(image)[:, image.width // 2 :].mean()) / 255


def brightness(images: list[Image.Image], prompts: list[str]) -> RewardOutput:
    scores = [right_half(image) for image in images]
    return RewardOutput(scores, {"above_half": [float(score > 0.5) for score in scores]})


def darkness(images: list[Image.Image]) -> list[float | None]:
    return [1 - right_half(image) for image in images]


def noise(images: list[Image.Image]) -> list[float]:
    """Reads only what the weights cannot change."""
    return [float(np.asarray(image)[:, : image.width // 2].mean()) for image in images]


def scorer(function: Any, name: str = "") -> Scorer:
    return Scorer(function, name=name or function.__name__)
